"""Efficient methods for language models, complete and readable."""
