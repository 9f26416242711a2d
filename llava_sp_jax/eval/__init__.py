"""Runs benchmarks: from the command, between the steps of training, and through lmms-eval."""
