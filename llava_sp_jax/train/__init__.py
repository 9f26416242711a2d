"""Optimiser table, train state, step and loop."""
