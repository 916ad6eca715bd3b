"""Companion of the chapter on context extension."""
