"""Companion of the chapter on low-rank factorization."""
