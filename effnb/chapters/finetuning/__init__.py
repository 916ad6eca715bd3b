"""Companions of the chapters on fine-tuning."""
