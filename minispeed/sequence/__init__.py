"""Sequence parallelism: each rank holds some tokens of every row, and attention alone speaks."""
