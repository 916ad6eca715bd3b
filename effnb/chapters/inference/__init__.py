"""Companions of the chapters on efficient inference."""
