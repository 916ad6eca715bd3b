"""The companions of the chapters in `notebooks/05_inference`."""
