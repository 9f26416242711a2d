"""Benchmarks of vision-language models: one file each; `catalog.TASKS` names them."""
