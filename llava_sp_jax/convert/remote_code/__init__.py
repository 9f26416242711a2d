"""Holds the files that `--format huggingface` writes beside the weights, for transformers with torch.

They are copied as they are, and transformers runs them where this package is not installed. So they
import one another, transformers, torch, numpy and PIL alone, and nothing here imports them but tests.
"""
