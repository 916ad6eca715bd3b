"""Companion of the chapter on quantization."""
