"""Samples to static numpy batches, on the host; no jax in here."""
