"""The companion of the chapter on retrieval."""
