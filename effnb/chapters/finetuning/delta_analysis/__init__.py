"""What the chapter on the analysis of delta tuning consists of, besides its text."""
