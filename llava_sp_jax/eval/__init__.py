"""Asking a benchmark: from the command, between the steps of a training, and through lmms-eval."""
