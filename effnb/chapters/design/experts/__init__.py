"""Companion of the chapter on experts."""
