"""Companion of the chapter on self-distilled quantization."""
