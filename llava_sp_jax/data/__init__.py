"""Turns samples into numpy batches of static shapes, on the host; imports no jax."""
