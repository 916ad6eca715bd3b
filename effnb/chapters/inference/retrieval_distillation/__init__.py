"""The companion of `notebooks/05_inference/6_retrieval_distillation`."""
