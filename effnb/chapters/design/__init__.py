"""Companions of the chapters on model design."""
