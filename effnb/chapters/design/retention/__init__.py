"""Companion of the chapter on retention."""
