"""Companions of the chapters on efficient hardware."""
