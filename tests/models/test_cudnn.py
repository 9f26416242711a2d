"""What cuDNN is asked for, computed by twins: cuDNN itself runs on GPUs only."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.models import cudnn, layers

B, T, N, H = 3, 21, 2, 8
# Segment ids of each row, by runs; 0 is padding. Ids need not increase.
ROWS = ([(4, 9), (8, 5), (12, 4), (0, 3)], [(8, 21)], [(0, 21)])


def segments() -> np.ndarray:
  return np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)


def values() -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(4))


def mask() -> jax.Array:
  index, ids = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.asarray(segments())
  return layers.causal_mask(index, ids, index, ids)


def results(attend: Any) -> list[np.ndarray]:
  """Output at tokens, and the gradients of q, k and v of a loss over tokens."""
  q, k, v, weights = values()
  there = jnp.asarray(segments() > 0)[..., None, None]

  def scalar(*args: jax.Array) -> Any:
    out = attend(*args)
    return (jnp.where(there, out, 0) * weights).sum(), jnp.where(there, out, 0)

  (_, out), gradients = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  return [np.asarray(x) for x in (out, *gradients)]


def test_runs_cover_every_position_once() -> None:
  starts, lengths = (np.asarray(x) for x in cudnn.runs(jnp.asarray(segments()), 4))
  assert starts.tolist() == [[0, 9, 14, 18, -1], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
  assert lengths.tolist() == [[9, 5, 4, 3], [21, -1, -1, -1], [21, -1, -1, -1]]


def twin(q: Any, k: Any, v: Any, **about: Any) -> jax.Array:
  """One sample after another, as cuDNN's packed layout is described; all else stays unwritten."""
  assert about["mask_type"] == cudnn.fused_attention().MaskType.PADDING_CAUSAL
  out = jnp.full(q.shape, jnp.nan)
  for row in range(B):
    for start, size in zip(about["q_offsets"][row][:-1], about["q_seqlen"][row], strict=True):
      if start < 0:
        continue
      here = slice(int(start), int(start + size))
      scores = jnp.einsum("tnh,snh->nts", q[row, here], k[row, here]) * about["scale"]
      below = np.tril(np.ones((int(size), int(size)), bool))
      weights = jax.nn.softmax(jnp.where(below, scores, -jnp.inf), axis=-1)
      out = out.at[row, here].set(jnp.einsum("nts,snh->tnh", weights, v[row, here]))
  assert about["kv_offsets"] is about["q_offsets"]
  assert about["kv_seqlen"] is about["q_seqlen"]
  return out


@pytest.mark.guard
def test_packed_rows_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
  """Output and gradients; no position is left unwritten, not even of padding."""
  reference = results(lambda q, k, v: layers.attend(q, k, v, mask()))
  monkeypatch.setattr(cudnn.fused_attention(), "dot_product_attention", twin)

  def ours(*args: jax.Array) -> jax.Array:
    return cudnn.packed(*args, jnp.asarray(segments()), samples=3)

  assert bool(jnp.isfinite(ours(*values()[:3])).all())
  for mine, theirs in zip(results(ours), reference, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_an_odd_row_is_made_even(monkeypatch: pytest.MonkeyPatch) -> None:
  """cuDNN has gradients of a bias for even lengths only; the position that is added is not seen."""
  seen: list[int] = []
  original = jax.nn.dot_product_attention

  def watch(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Any, implementation: str) -> Any:
    seen.append(q.shape[1])
    assert mask.shape == (B, 1, T + 1, T + 1)
    assert implementation == "cudnn"
    return original(q, k, v, mask=mask)

  reference = results(lambda q, k, v: layers.attend(q, k, v, mask()))
  monkeypatch.setattr(jax.nn, "dot_product_attention", watch)
  for mine, theirs in zip(results(lambda *x: cudnn.masked(*x, mask())), reference, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
  assert set(seen) == {T + 1}


def test_a_jax_without_the_module_packs_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "jax._src.cudnn", None)
  assert "has moved it" in cudnn.lacks_packed()
