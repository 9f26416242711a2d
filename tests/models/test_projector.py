"""Views against naive loops, and the projector against its sums written out."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from llava_sp_jax.models.projector import (
  ROWS,
  DetailInteraction,
  Projector,
  crop,
  pool,
  spatial_token_count,
)

SIXTHS = {24: (4, 8, 12, 16, 20, 24), 27: (4, 9, 13, 18, 22, 27), 6: (1, 2, 3, 4, 5, 6)}


def naive_pool(grid: np.ndarray, size: int) -> np.ndarray:
  """torch's AdaptiveAvgPool2d, cell by cell: bins from floor to ceil, which may overlap."""
  side = grid.shape[1]
  out = np.zeros((len(grid), size, size, grid.shape[-1]))
  edges = [(math.floor(i * side / size), math.ceil((i + 1) * side / size)) for i in range(size)]
  for i, (top, bottom) in enumerate(edges):
    for j, (left, right) in enumerate(edges):
      out[:, i, j] = grid[:, top:bottom, left:right].mean(axis=(1, 2))
  return out


@pytest.mark.parametrize(("side", "size"), [(s, n) for s, sizes in SIXTHS.items() for n in sizes])
def test_pool_matches_the_loop(side: int, size: int) -> None:
  grid = np.random.default_rng(side).normal(size=(2, side, side, 3)).astype(np.float32)
  np.testing.assert_allclose(pool(grid, size), naive_pool(grid, size), atol=1e-5)


@pytest.mark.parametrize("size", SIXTHS[24])
def test_pool_matches_torch(size: int) -> None:
  torch = pytest.importorskip("torch")
  grid = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
  channels_first = torch.from_numpy(grid).permute(0, 3, 1, 2)
  wanted = torch.nn.functional.adaptive_avg_pool2d(channels_first, size).permute(0, 2, 3, 1)
  np.testing.assert_allclose(pool(grid, size), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(
  ("side", "size", "start"),
  [(24, 4, 10), (24, 8, 8), (24, 20, 2), (24, 24, 0), (27, 9, 9), (27, 4, 11), (6, 1, 3)],
)
def test_crop_takes_the_centre(side: int, size: int, start: int) -> None:
  grid = np.arange(side * side, dtype=np.float32).reshape(1, side, side, 1)
  wanted = [[r * side + c for c in range(start, start + size)] for r in range(start, start + size)]
  np.testing.assert_array_equal(crop(grid, size)[0, ..., 0], wanted)


@pytest.mark.parametrize("side", SIXTHS)
def test_scales_are_sixths_of_the_grid(side: int) -> None:
  assert ROWS["pooling"].scales(side) == SIXTHS[side]
  assert ROWS["none"].scales(side) == ()
  assert spatial_token_count("cropping", side) == 6
  assert spatial_token_count("none", side) == 0


def gelu(x: np.ndarray) -> np.ndarray:
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_patches_and_spatial_tokens_written_out() -> None:
  grid = np.random.default_rng(1).normal(size=(2, 6, 6, 5)).astype(np.float32)
  module = Projector("pooling", token_width=3, out_width=4)
  params = module.init(jax.random.key(0), grid)["params"]
  out = np.asarray(module.apply({"params": params}, grid))
  p = jax.tree.map(np.asarray, params)
  assert out.shape == (2, 6 + 36, 4)
  patches = gelu(grid.reshape(2, 36, 5) @ p["fc1"]["kernel"] + p["fc1"]["bias"])
  patches = patches @ p["fc2"]["kernel"] + p["fc2"]["bias"]
  np.testing.assert_allclose(out[:, 6:], patches, atol=1e-5)
  for i, size in enumerate(SIXTHS[6]):
    kernel = p[f"pool_{i}"]["kernel"].reshape(size, size, 5, 3)
    token = np.einsum("bhwc,hwck->bk", naive_pool(grid, size), kernel)
    np.testing.assert_allclose(out[:, i], gelu(token) @ p["out"]["kernel"], atol=1e-5)


def test_detail_interaction_is_attention_over_a_strided_convolution() -> None:
  rng = np.random.default_rng(2)
  grid = rng.normal(size=(1, 24, 24, 2)).astype(np.float32)
  tokens = rng.normal(size=(1, 6, 3)).astype(np.float32)
  module = DetailInteraction(16, np.float32)
  p = jax.tree.map(np.asarray, module.init(jax.random.key(0), tokens, grid)["params"])
  kernel = p["conv"]["kernel"]  # [16, 16, 2, 3]
  starts = range(0, 24 - 16 + 1, 2)
  detail = np.stack([np.einsum("hwc,hwck->k", grid[0, r : r + 16, c : c + 16], kernel)
                     for r in starts for c in starts])  # fmt: skip

  def project(name: str, x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x @ p[name]["kernel"] + p[name]["bias"]

  q, k, v = project("query", tokens[0]), project("key", detail), project("value", detail)
  weights = np.exp(q @ k.T / math.sqrt(3))
  wanted = weights / weights.sum(-1, keepdims=True) @ v
  np.testing.assert_allclose(module.apply({"params": p}, tokens, grid)[0], wanted, atol=1e-4)


def test_a_crop_s_token_sees_its_crop_only() -> None:
  """Changing the border moves the token of the whole grid and no smaller one."""
  grid = np.random.default_rng(3).normal(size=(1, 6, 6, 2)).astype(np.float32)
  module = Projector("cropping_sfe", token_width=3, out_width=4)
  variables = module.init(jax.random.key(0), grid)
  changed = grid.copy()
  changed[:, 0, 0] += 1.0
  a, b = (np.asarray(module.apply(variables, g))[0, :6] for g in (grid, changed))
  moved = [not np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
  assert moved == [False] * 5 + [True]
