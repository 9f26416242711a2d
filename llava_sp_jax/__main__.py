"""Runs `python -m llava_sp_jax <command>`, which is the same as `llava-sp <command>`."""

import sys

from llava_sp_jax import cli

if __name__ == "__main__":
  sys.exit(cli.main())
