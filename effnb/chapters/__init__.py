"""Companions of the notebooks: their exercises, verdicts and drawings, one module for each."""
