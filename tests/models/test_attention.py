"""Attention: every implementation against the XLA reference, and the rule that chooses one."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import attention, build, cudnn, flash, layers
from llava_sp_jax.models.attention import (
  IMPLEMENTATIONS,
  PLATFORMS,
  AttentionChoice,
  Case,
  attend,
  choose,
)
from llava_sp_jax.models.layers import causal_mask, window_mask
from tests.conftest import ConfigMaker

B, T, N, K, H = 4, 256, 4, 2, 16
NAMES = ("q", "k", "v", "kept")
SAMPLES = (100, 70, 61)  # tokens of each sample in a row; the rest of the row is padding


def row() -> tuple[np.ndarray, np.ndarray]:
  """Segments and positions of a packed row. [T] x2."""
  segments, positions = np.zeros(T, np.int32), np.zeros(T, np.int32)
  start = 0
  for number, size in enumerate(SAMPLES):
    segments[start : start + size] = (number + 1) * BRANCHES
    positions[start : start + size] = np.arange(size)
    start += size
  return segments, positions


def inputs(window: int) -> tuple[jax.Array, ...]:
  """q, k, v, mask, segments, and weights that leave padding out."""
  rng = np.random.default_rng(0)
  q, k, v, out = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K, N))
  segments, positions = (jnp.broadcast_to(x, (B, T)) for x in row())
  index = jnp.broadcast_to(jnp.arange(T), (B, T))
  mask = causal_mask(index, segments, index, segments)
  if window:
    mask &= window_mask(positions, positions, window)
  return q, k, v, mask, segments, out * (segments > 0)[..., None, None]


def results(spec: AttentionChoice, window: int = 0) -> tuple[jax.Array, ...]:
  """Output at tokens and the gradients of q, k, v."""
  q, k, v, mask, segments, weights = inputs(window)

  def scalar(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = attend(spec, q, k, v, mask, segments)
    return (out * weights).sum(), out * (segments > 0)[..., None, None]

  def run(*args: jax.Array) -> Any:
    with nn.logical_axis_rules(sharding.activation_rules()):
      return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(*args)

  (_, out), gradients = jax.jit(run)(q, k, v)
  return out, *gradients


@pytest.mark.parametrize("name", ["splash", "flash"])
@pytest.mark.parametrize(("window", "block"), [(0, 512), (0, 128), (40, 128)])
def test_kernels_for_tpus_equal_the_reference(
  name: str, window: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Packed samples, grouped heads, padding; the kernel is interpreted, in one tile and several."""
  for module in (attention, flash):
    monkeypatch.setattr(module, "BLOCK", block)
  spec = AttentionChoice(name, branches=False, window=window)
  for ours, reference in zip(
    results(spec, window), results(AttentionChoice("xla"), window), strict=True
  ):
    np.testing.assert_allclose(ours, reference, atol=2e-5)  # float32, sums of 256 in tiles
  if window:  # the window must matter, or equality says nothing
    assert (
      np.abs(results(AttentionChoice("xla"), window)[0] - results(AttentionChoice("xla"))[0]).max()
      > 0.1
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 3)])
def test_gradients_of_key_heads_are_summed(heads: tuple[int, int]) -> None:
  """One, two or four query heads a key head, and a number of heads that is not even."""
  count, shared = heads[0], heads[0] // heads[1]
  rng = np.random.default_rng(0)
  sizes = (count, heads[1], heads[1], count)
  q, k, v, weights = (jnp.asarray(rng.normal(size=(2, T, n, H)), jnp.float32) for n in sizes)
  segments = jnp.stack([jnp.asarray(row()[0]), jnp.full(T, BRANCHES)])
  kernel = flash.Kernel(T, H, count, shared, 128, 0.25, NAMES, interpret=True)
  index = jnp.broadcast_to(jnp.arange(T), (2, T))
  mask = causal_mask(index, segments, index, segments)
  weights = weights * (segments > 0)[:, :, None, None]

  def ours(q: Any, k: Any, v: Any) -> jax.Array:
    made: jax.Array = flash.attend(q, k, v, flash.first_keys(segments), kernel)
    return (made * weights).sum()

  def reference(q: Any, k: Any, v: Any) -> jax.Array:
    return (layers.attend(q, k, v, mask) * weights).sum()

  for mine, theirs in zip(
    *(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, reference)), strict=True
  ):
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1)])
def test_the_kernel_rotates_queries_and_keys(heads: tuple[int, int]) -> None:
  """Heads of a whole vector register; positions of each sample begin at 0, as in packed rows."""
  width, rng = 128, np.random.default_rng(0)
  sizes = (heads[0], heads[1], heads[1], heads[0])
  q, k, v, weights = (jnp.asarray(rng.normal(size=(2, T, n, width)), jnp.float32) for n in sizes)
  segments, positions = (jnp.broadcast_to(x, (2, T)) for x in row())
  index = jnp.broadcast_to(jnp.arange(T), (2, T))
  mask = causal_mask(index, segments, index, segments)
  angles = layers.Rope(100.0).angles(width, positions, segments)
  weights = weights * (segments > 0)[:, :, None, None]

  def run(name: str, turned: Any) -> Any:
    spec = AttentionChoice(name, branches=False)

    def loss(q: Any, k: Any, v: Any) -> jax.Array:
      return (attend(spec, q, k, v, mask, segments, turned) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

  for turned in (angles, None):  # None: what comes from a cache has been rotated
    made = (jax.tree.leaves(run(name, turned)) for name in ("flash", "xla"))
    for mine, theirs in zip(*made, strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
  assert abs(run("flash", angles)[0] - run("flash", None)[0]) > 1, "the rotation matters"


def test_tiles_that_no_query_sees_are_not_read() -> None:
  """What is not a number in the keys of another sample changes nothing."""
  segments = jnp.repeat(jnp.array([[1, 2, 2, 0]]) * BRANCHES, T // 4, axis=1)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 2, H)), jnp.float32)
  kernel = flash.Kernel(T, H, 2, 1, T // 4, 0.25, NAMES, interpret=True)
  first = flash.first_keys(segments)

  def run(keys: jax.Array) -> tuple[jax.Array, ...]:
    out, back = jax.vjp(lambda q, k, v: flash.attend(q, k, v, first, kernel), x, keys, keys)
    return out, *back(jnp.ones_like(out))

  mine = slice(T // 4, 3 * T // 4)
  others = x.at[:, : T // 4].set(jnp.nan).at[:, 3 * T // 4 :].set(jnp.nan)
  for plain, spoiled in zip(jax.jit(run)(x), jax.jit(run)(others), strict=True):
    np.testing.assert_array_equal(plain[:, mine], spoiled[:, mine])


@pytest.mark.parametrize("window", [0, 3])
def test_the_first_key_of_a_query(window: int) -> None:
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0, 0], [0, 7, 7, 7, 0, 8, 9, 9, 9]]) * BRANCHES
  index = np.broadcast_to(np.arange(9), (2, 9))
  seen = np.asarray(causal_mask(*(jnp.asarray(x) for x in (index, segments, index, segments))))
  if window:
    seen = seen & (index[:, :, None] - index[:, None, :] < window)
  wanted = np.where(segments == 0, index, seen.argmax(axis=2))
  np.testing.assert_array_equal(flash.first_keys(jnp.asarray(segments), window), wanted)


@pytest.mark.parametrize("name", ["splash", "flash"])
def test_on_a_mesh_they_equal_the_reference(name: str) -> None:
  """Rows over data and fsdp, heads over tensor; nothing is gathered."""
  mesh = mesh_lib.create(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))
  reference = results(AttentionChoice("xla"))
  with jax.set_mesh(mesh):
    for ours, theirs in zip(results(AttentionChoice(name, branches=False)), reference, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=2e-5)
      spec = [s if isinstance(s, tuple) else (s,) for s in ours.sharding.spec if s]
      assert spec[0] == ("data", "fsdp"), "rows are divided"
      assert ("tensor",) in spec[1:], "heads are divided"


def test_on_a_mesh_each_device_rotates_its_own_rows() -> None:
  """Each row has positions of its own, so those of another row would give another result."""
  width, rng = 128, np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, 2, width)), jnp.float32) for _ in range(3))
  segments = jnp.full((B, T), BRANCHES)
  index = jnp.broadcast_to(jnp.arange(T), (B, T))
  mask = causal_mask(index, segments, index, segments)
  angles = layers.Rope(100.0).angles(width, index * (1 + jnp.arange(B)[:, None]), segments)

  def run(name: str) -> Any:
    with nn.logical_axis_rules(sharding.activation_rules()):
      spec = AttentionChoice(name, branches=False)
      return jax.jit(lambda *x: attend(spec, *x, mask, segments, angles))(q, k, v)

  reference = run("xla")
  with jax.set_mesh(mesh_lib.create(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))):
    np.testing.assert_allclose(run("flash"), reference, rtol=1e-4, atol=1e-4)


CASE = Case(
  AttentionChoice("auto", "tpu", branches=False),
  2048,
  128,
  jnp.dtype(jnp.bfloat16),
  False,
  (1, 32, 32),
)


def with_spec(**changes: Any) -> Case:
  return dataclasses.replace(CASE, spec=dataclasses.replace(CASE.spec, **changes))


CHOICES = {
  "tpu, packed chains": (CASE, "flash"),
  "tpu, window of all layers": (with_spec(window=512), "flash"),
  "tpu, long rows": (dataclasses.replace(CASE, length=4096), "splash"),
  "tpu, long rows of narrow heads": (
    dataclasses.replace(CASE, length=4096, head_dim=64), "splash",
  ),
  "tpu, window of some layers": (with_spec(window=512, mixed_layers=True), "xla"),
  "tpu, branches": (with_spec(branches=True), "xla"),
  "tpu, cache": (dataclasses.replace(CASE, cached=True), "xla"),
  "tpu, odd length": (dataclasses.replace(CASE, length=2000), "xla"),
  "tpu, heads that do not divide": (dataclasses.replace(CASE, split=(1, 8, 0)), "xla"),
  "gpu": (with_spec(platform="gpu"), "cudnn"),
  "gpu as topologies call it": (with_spec(platform="cuda"), "cudnn"),
  "gpu, few samples in a row": (with_spec(platform="gpu", samples=16), "cudnn_packed"),
  "gpu, packed rows with a window": (with_spec(platform="gpu", samples=16, window=512), "cudnn"),
  "gpu, packed rows of grouped heads": (
    dataclasses.replace(with_spec(platform="gpu", samples=16), split=(1, 32, 8)), "cudnn",
  ),
  "gpu, packed rows with branches": (with_spec(platform="gpu", samples=16, branches=True), "cudnn"),
  "gpu, odd length": (dataclasses.replace(with_spec(platform="gpu"), length=2047), "cudnn"),
  "gpu, branches": (with_spec(platform="gpu", branches=True), "cudnn"),
  "gpu, float32": (
    dataclasses.replace(with_spec(platform="gpu"), dtype=jnp.dtype(jnp.float32)), "xla",
  ),
  "gpu, wide heads": (dataclasses.replace(with_spec(platform="gpu"), head_dim=192), "xla"),
  "gpu, cache": (dataclasses.replace(with_spec(platform="gpu"), cached=True), "xla"),
  "cpu": (with_spec(platform="cpu"), "xla"),
  "where jax runs": (with_spec(platform=""), "xla"),
  "a platform we do not know": (with_spec(platform="abacus"), "xla"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(cudnn, "lacks_packed", lambda: "")
  case, expected = CHOICES[name]
  assert choose(case) == expected
  if expected not in ("xla",):  # asked for by name, it is the same; what is refused is an error
    assert choose(dataclasses.replace(case, spec=dataclasses.replace(case.spec, name=expected)))


@pytest.mark.parametrize(
  ("name", "changes", "reason"),
  [
    ("splash", {"branches": True}, "samples may have branches"),
    ("splash", {"mixed_layers": True}, "only some layers have a sliding window"),
    ("splash", {"platform": "gpu"}, "platform gpu has no Pallas kernels"),
    ("flash", {"platform": "gpu"}, "platform gpu has no Pallas kernels"),
    ("cudnn", {}, "platform tpu has no cuDNN"),
    ("cudnn_packed", {"platform": "gpu"}, "any number of samples may share a row"),
    ("cudnn_packed", {"platform": "gpu", "samples": 4}, "the GPU is older than Hopper"),
  ],
)
def test_an_implementation_asked_for_by_name_refuses_what_it_cannot_do(
  name: str, changes: dict[str, Any], reason: str
) -> None:
  with pytest.raises(ValueError, match=f"model.attention '{name}' cannot .*{reason}.*use 'auto'"):
    choose(with_spec(name=name, **changes))


def test_every_platform_ends_with_one_that_never_objects() -> None:
  for order in PLATFORMS.values():
    assert set(order) <= set(IMPLEMENTATIONS)
    assert order[-1] == "xla"
  assert not IMPLEMENTATIONS["xla"].objections(with_spec(branches=True, mixed_layers=True))


def test_cudnn_is_what_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
  """jax lowers cuDNN on GPUs only, so the call is what is seen here."""
  seen: list[Any] = []

  def watch(q: jax.Array, *_: Any, mask: Any, implementation: str) -> jax.Array:
    seen.append((implementation, mask.shape))
    return q

  q, k, v, mask, segments, _ = inputs(0)
  monkeypatch.setattr(jax.nn, "dot_product_attention", watch)
  attend(AttentionChoice("auto", "gpu"), q.astype("bfloat16"), k, v, mask, segments)
  assert seen == [("cudnn", (B, 1, T, T))]


def test_the_decoder_hands_its_windows_on(tiny_config: ConfigMaker) -> None:
  """A model with a kernel, packed rows and a window gives the hidden states of one with XLA."""
  size = {"sliding_window": 40}
  outputs = []
  for name in ("splash", "flash", "xla"):
    config = tiny_config(model={"language_model": size, "attention": name}).model
    module = build.compiled_for(build.model(config), "cpu", branches=False).language_model
    segments, positions = (jnp.asarray(x)[None] for x in row())
    embeds = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 32)), jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), embeds, positions, segments)
    hidden, _ = jax.jit(module.apply)(params, embeds, positions, segments)
    outputs.append(np.asarray(hidden[segments > 0]))
  np.testing.assert_allclose(outputs[0], outputs[2], atol=2e-5)
  np.testing.assert_allclose(outputs[1], outputs[2], atol=2e-5)
