"""The teacher's pack: slides, plans, answer keys, exports, predictions, preflight.

`python -m effnb.book.workshop` (or `make workshop`) writes it from the chapters as they are stored;
nothing is executed.
"""
