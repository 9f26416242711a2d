"""LLaVA-SP in JAX: visual spatial tokens for vision-language models (arXiv 2507.00505)."""

__version__ = "0.1.0"
