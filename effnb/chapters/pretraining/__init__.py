"""Companions of the chapter on pre-training."""
