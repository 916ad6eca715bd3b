"""The companion of `notebooks/05_inference/5_distillation`."""
