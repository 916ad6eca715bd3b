"""Model design: layers and whole architectures that reach a quality with less memory or work."""
