"""Companion of the chapter on the co-design of hardware and software."""
