"""Tensor parallelism: each rank holds a slice of every matrix and computes its part of every layer."""
