"""Pre-training: what a model is asked to predict, and how large it should be."""
