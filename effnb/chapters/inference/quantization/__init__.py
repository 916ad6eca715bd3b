"""The companion of `notebooks/05_inference/3_quantization`."""
