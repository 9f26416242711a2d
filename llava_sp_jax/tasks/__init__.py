"""Benchmarks of vision-language models, one a file; `catalog.TASKS` is the table of them."""
