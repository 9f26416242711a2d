"""Sampling, generation and the batched engine."""
