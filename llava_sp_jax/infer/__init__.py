"""Answers requests: prompts, sampling strategies, and the batched engine."""
