"""What the chapter on delta tuning shows besides the methods themselves."""
