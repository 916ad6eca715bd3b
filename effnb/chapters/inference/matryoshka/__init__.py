"""The companion of the chapter on Matryoshka representations."""
