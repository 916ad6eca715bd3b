"""The companion of the chapter on attention."""
