"""Companion of the chapter on pruning."""
