"""Companion of the chapter on sharing."""
