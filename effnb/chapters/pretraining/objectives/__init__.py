"""Companion of the chapter on pre-training objectives."""
