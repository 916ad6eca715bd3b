"""Companion of the chapter on adaptive computation."""
