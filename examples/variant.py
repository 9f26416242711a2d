"""A variant of one's own in all commands: python examples/variant.py train --config ... --workdir ..."""

import sys

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from llava_sp_jax import cli
from llava_sp_jax.models.projector import VARIANTS, Variant
from llava_sp_jax.models.spatial import EXTRACTORS, VIEWS, Extractor, View


def corner(grid: jax.Array, size: int) -> jax.Array:
  """The upper left square. [B, G, G, C] -> [B, size, size, C]."""
  return grid[:, :size, :size]


def mean(view: jax.Array, width: int, dtype: DTypeLike, name: str) -> jax.Array:
  """A linear layer on the mean of a view. [B, s, s, C] -> [B, K]."""
  return nn.Dense(width, dtype=dtype, name=name)(view.mean(axis=(1, 2)))


VIEWS["corner"] = View(corner)
# One use of the kernel for each image, whatever the size of its view; it reads the grid directly.
EXTRACTORS["mean"] = Extractor(mean, uses=((r"kernel", lambda positions: 1, True),), width="kernel")
VARIANTS["corners"] = Variant(views=("corner", "crop"), parts=4, extractor="mean", out_bias=True)

if __name__ == "__main__":
  sys.exit(cli.main(sys.argv[1:]))
