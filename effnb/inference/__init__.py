"""Inference and compression: the survey's section on doing more with a trained model."""
