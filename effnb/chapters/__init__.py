"""What belongs to one notebook: exercises, verdicts, drawings, queries of stored results."""
