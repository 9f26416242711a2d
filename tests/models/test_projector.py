"""Views against naive loops, and the projector against its sums written out and against torch."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.convert import projector_names, tables
from llava_sp_jax.models.projector import VARIANTS, Projector, spatial_token_count
from llava_sp_jax.models.spatial import (
  EXTRACTORS,
  MERGES,
  VIEWS,
  DetailInteraction,
  crop,
  pool,
)
from llava_sp_jax.models.transformer import Transformer

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
def test_crop_takes_the_center(side: int, size: int, start: int) -> None:
  grid = np.arange(side * side, dtype=np.float32).reshape(1, side, side, 1)
  wanted = [[r * side + c for c in range(start, start + size)] for r in range(start, start + size)]
  np.testing.assert_array_equal(crop(grid, size)[0, ..., 0], wanted)


@pytest.mark.parametrize("side", SIXTHS)
def test_scales_are_sixths_of_the_grid(side: int) -> None:
  assert VARIANTS["pooling"].scales(side) == SIXTHS[side]
  assert VARIANTS["none"].scales(side) == ()
  assert spatial_token_count("cropping", side) == 6
  assert spatial_token_count("none", side) == 0


COUNTS = {"none": 0, "tokens_1": 1, "tokens_3": 3, "tokens_12": 12, "crop_224": 8, "both": 12,
          "detail_only": 49}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_counts_on_the_paper_s_grid(variant: str) -> None:
  assert spatial_token_count(variant, 24) == COUNTS.get(variant, 6)


@pytest.mark.parametrize(
  ("variant", "grid", "wanted"),
  [
    ("tokens_3", 24, (8, 16, 24)), ("tokens_12", 24, tuple(range(2, 25, 2))),
    ("crop_224", 16, tuple(range(2, 17, 2))), ("tokens_1", 24, (24,)),
    ("cropping", 16, (2, 5, 8, 10, 13, 16)), ("cropping", 32, (5, 10, 16, 21, 26, 32)),
  ],
)  # fmt: skip
def test_own_scales_of_a_variant(variant: str, grid: int, wanted: tuple[int, ...]) -> None:
  assert VARIANTS[variant].scales(grid) == wanted


@pytest.mark.parametrize(
  ("variant", "scales", "problem"),
  [
    ("cropping", (4, 30), r"scales \(4, 30\): expected growing sizes from 1 to the grid's 24"),
    ("cropping", (8, 4), "expected growing sizes"), ("cropping", (4, 4), "expected growing sizes"),
    ("pooling", (0, 4), "expected growing sizes"), ("none", (4,), "the variant has no views"),
    ("detail_only", (4,), "the variant has no views"),
  ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_an_error(variant: str, scales: Any, problem: str) -> None:
  with pytest.raises(ValueError, match=problem):
    spatial_token_count(variant, 24, scales)


def test_rows_name_known_views_extractors_and_merges() -> None:
  for variant in VARIANTS.values():
    assert set(variant.views) <= set(VIEWS)
    assert variant.extractor in EXTRACTORS
    assert variant.detail_merge in MERGES
    assert set(variant.detail_values) <= set(variant.detail_kernels)


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
  module = DetailInteraction(16, 3, jnp.float32)
  p = jax.tree.map(np.asarray, module.init(jax.random.key(0), tokens, grid)["params"])
  kernel = p["conv"]["kernel"]  # [16, 16, 2, 3]
  starts = range(0, 24 - 16 + 1, 2)
  detail = np.stack(
    [
      np.einsum("hwc,hwck->k", grid[0, r : r + 16, c : c + 16], kernel)
      for r in starts
      for c in starts
    ]
  )

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


def tokens_of(variant: str, grid: np.ndarray, params: Any, **fields: Any) -> np.ndarray:
  """Spatial tokens alone, for token width 8 and model width 5."""
  module = Projector(variant, token_width=8, out_width=5, **fields)
  count = spatial_token_count(variant, grid.shape[1], module.scales)
  return np.asarray(jax.jit(module.apply)({"params": params}, grid))[:, :count]


def random_params(variant: str, grid: np.ndarray, **fields: Any) -> Any:
  return random_of(Projector(variant, token_width=8, out_width=5, **fields), grid)


def random_of(module: nn.Module, x: np.ndarray) -> Any:
  """Numbers for every parameter, zeros and ones replaced as well."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  rng = np.random.default_rng(4)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 4, shapes)


@pytest.mark.parametrize(
  ("variant", "view"), [("cropping_multiscale_dfi", "crop"), ("pooling_multiscale_dfi", "pool")]
)
def test_details_of_several_kernels(variant: str, view: str) -> None:
  """Crops put them side by side, pools add them up; the middle one has the first one's values."""
  grid = np.random.default_rng(5).normal(size=(2, 12, 12, 3)).astype(np.float32)
  p = random_params(variant, grid)
  assert "value" not in p["detail_9"]
  assert "value_norm" not in p["detail_9"]
  views = [VIEWS[view].apply(grid, size).reshape(2, -1) for size in VARIANTS[variant].scales(12)]
  tokens = np.stack([x @ p[f"{view}_{i}"]["kernel"] for i, x in enumerate(views)], axis=1)
  details = []
  for kernel, size in ((12, 6), (9, 4), (5, 2)):  # half the paper's grid, half its kernels
    shared = {k: p["detail_12"][k] for k in ("value", "value_norm")} if kernel == 9 else {}
    module = DetailInteraction(size, 8, jnp.float32)
    variables = {"params": {**p[f"detail_{kernel}"], **shared}}
    details.append(np.asarray(module.apply(variables, tokens, grid)))
  parts = [tokens, *details] if view == "crop" else [tokens, sum(details)]
  wanted = gelu(np.concatenate(parts, axis=-1)) @ p["out"]["kernel"]
  if view == "pool":
    wanted += p["out"]["bias"]
  np.testing.assert_allclose(tokens_of(variant, grid, p), wanted, atol=1e-5)


def test_positions_of_a_convolution_as_tokens() -> None:
  grid = np.random.default_rng(6).normal(size=(1, 12, 12, 3)).astype(np.float32)
  p = random_params("detail_only", grid)
  kernel = p["detail_12"]["conv"]["kernel"]  # [6, 6, 3, 8]
  wanted = [
    gelu(np.einsum("hwc,hwck->k", grid[0, r : r + 6, c : c + 6], kernel))
    for r in range(0, 7, 2)
    for c in range(0, 7, 2)
  ]
  found = tokens_of("detail_only", grid, p)
  np.testing.assert_allclose(found[0], wanted @ p["out"]["kernel"], atol=1e-5)


def test_both_are_the_crops_and_then_the_pools() -> None:
  grid = np.random.default_rng(7).normal(size=(2, 6, 6, 3)).astype(np.float32)
  p = random_params("both", grid)
  parts = [tokens_of(variant, grid, p) for variant in ("cropping_sfe", "pooling")]
  found = tokens_of("both", grid, p)
  np.testing.assert_allclose(found, np.concatenate(parts, axis=1), atol=1e-6)


def test_registers_do_not_see_the_image() -> None:
  grid = np.random.default_rng(8).normal(size=(2, 6, 6, 3)).astype(np.float32)
  p = random_params("register", grid)
  found = tokens_of("register", grid, p)
  wanted = [gelu(p[f"register_{i}"]["token"]) @ p["out"]["kernel"] for i in range(6)]
  np.testing.assert_allclose(found, [wanted, wanted], atol=1e-6)
  assert len({token.tobytes() for token in found[0]}) == 6
  assert tokens_of("register", grid, p, scales=(1, 2)).shape == (2, 2, 5)


def test_scales_that_stop_before_the_border_see_the_center_only() -> None:
  """The original reads a 27x27 grid so: its crops and details are those of the central 24x24."""
  grid = np.random.default_rng(9).normal(size=(1, 27, 27, 2)).astype(np.float32)
  p = random_params("cropping", crop(grid, 24))
  central = tokens_of("cropping", np.asarray(crop(grid, 24)), p)
  wider = tokens_of("cropping", grid, p, scales=(4, 8, 12, 16, 20, 24))
  np.testing.assert_allclose(wider, central, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("variant", ["cropping_transformer", "pooling_transformer"])
def test_transformer_equals_torch_s(variant: str) -> None:
  """One scale, its weights through the table of names; pools are reshaped, not transposed."""
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  reference = torch.nn.Transformer(16, 8, 4, 4, 16, batch_first=True, norm_first=True, bias=False)
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter += 0.1 * torch.randn(parameter.shape)
  query = torch.randn(1, 1, 16)
  rows = projector_names.projector(variant, 16, (3,))
  tensors = {f"model.tfm_3.{k}": v for k, v in reference.state_dict().items()}
  stacks: dict[str, list[np.ndarray]] = {}
  for name, tensor in {**tensors, "model.query_3": query}.items():
    match = tables.match(name, rows)
    assert match, name
    stacks.setdefault(match.path, []).append(match.layout.to_jax(tensor.detach().numpy()))
  tree: dict[str, Any] = {}
  for path, arrays in stacks.items():
    *groups, leaf = path.split("/")[2:]
    place = tree
    for group in groups:
      place = place.setdefault(group, {})
    place[leaf] = np.stack(arrays) if "/layers/" in path else arrays[0]
  view = np.random.default_rng(10).normal(size=(2, 3, 3, 16)).astype(np.float32)
  read = view if variant == "cropping_transformer" else view.transpose(0, 3, 1, 2)
  memory = torch.from_numpy(read.reshape(2, 9, 16).copy())
  with torch.no_grad():
    wanted = reference.eval()(memory, query.expand(2, 1, 16))[:, 0].numpy()

  class Host(nn.Module):
    """Calls the variant's extractor inside a module, as the projector does."""

    @nn.compact
    def __call__(self, view: jax.Array) -> jax.Array:
      return EXTRACTORS[VARIANTS[variant].extractor].build(view, 8, jnp.float32, "x")

  found = jax.jit(Host().apply)({"params": {"x": tree}}, view)
  np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_dropout_acts_only_with_a_key() -> None:
  view = np.random.default_rng(11).normal(size=(1, 2, 2, 8)).astype(np.float32)
  module = Transformer(jnp.float32)
  apply = jax.jit(lambda p, rngs: module.apply({"params": p}, view, rngs=rngs))
  params = random_of(module, view)
  calm, shaken, other = (
    apply(params, None if seed is None else {"dropout": jax.random.key(seed)})
    for seed in (None, 1, 2)
  )
  assert np.abs(calm - shaken).max() > 1e-3
  assert np.abs(other - shaken).max() > 1e-3


def test_a_width_that_the_heads_do_not_divide_is_an_error() -> None:
  with pytest.raises(ValueError, match="the tower's width 12 must be a multiple of 8"):
    Transformer(jnp.float32).init(jax.random.key(0), np.zeros((1, 2, 2, 12), np.float32))


def test_newline_is_a_parameter_and_no_token() -> None:
  grid = np.random.default_rng(12).normal(size=(1, 6, 6, 3)).astype(np.float32)
  p = random_params("pooling", grid, newline=True)
  assert p["image_newline"].shape == (5,)
  plain = {k: v for k, v in p.items() if k != "image_newline"}
  found = tokens_of("pooling", grid, p, newline=True)
  np.testing.assert_array_equal(found, tokens_of("pooling", grid, plain))
