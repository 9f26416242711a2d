"""Computes checksums of arrays, sharded or not: for each leaf of a tree, or for all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llava_sp_jax.errors import CheckpointError


def fingerprint(tree: Mapping[str, Any]) -> str:
  """Returns a hash of a flat `{path: array}` tree, in 16 hexadecimal digits.

  It covers names, shapes, dtypes and every bit of the values. It does not depend on how the arrays
  are sharded, because the sums are over integers.
  """
  digest = hashlib.sha256()
  for path in sorted(tree):
    leaf = tree[path]
    digest.update(f"{path} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  weight = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(x.shape):  # weight each position, so that the order matters
    steps = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weight = weight * jnp.uint32(size) + steps
  return jnp.sum(bits * (weight * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def sums(tree: Any) -> dict[str, int]:
  """Returns {path: checksum} of the arrays of a nested tree; keys of a path are joined by ".".

  Reads every value once, where it is stored, also on the devices of other processes. Arrays are
  summed one after another: simulated devices stall when many sums over all of them run at once.
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): int(_checksum(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def compare_sums(found: Mapping[str, int], saved: Mapping[str, int], place: Path) -> None:
  """Raises CheckpointError that names the arrays whose checksums differ from the saved ones.

  `place` names the checkpoint in the message.
  """
  wrong = sorted(path for path, number in found.items() if saved.get(path) != number)
  if wrong:
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    raise CheckpointError(
      f"{place}: {len(wrong)} arrays are not what was saved (another checksum): {shown}"
    )
