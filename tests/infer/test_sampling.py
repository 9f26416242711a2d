"""Filters against transformers' own, and drawn tokens against their distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.sampling import Sampler, first_largest, margin

LOGITS = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.5, 12, 0.8)]
)
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
  torch = pytest.importorskip("torch")
  from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

  theirs = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(LOGITS.copy()))
  if top_k:
    theirs = TopKLogitsWarper(top_k)(None, theirs)
  if top_p < 1:
    theirs = TopPLogitsWarper(top_p)(None, theirs)
  ours = Sampler(temperature, top_k, top_p).filtered(jnp.asarray(LOGITS))
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_draws_have_the_filtered_distribution() -> None:
  sampler, count = Sampler(1.2, 8, 0.9), 20000
  rows = jnp.broadcast_to(LOGITS[0], (count, LOGITS.shape[1]))
  drawn = sampler.pick(rows, jax.random.key(3), jnp.arange(count), jnp.zeros(count, jnp.int32))
  found = np.bincount(np.asarray(drawn), minlength=LOGITS.shape[1]) / count
  wanted = np.asarray(jax.nn.softmax(sampler.filtered(jnp.asarray(LOGITS[:1]))))[0]
  assert 1 < (wanted > 0).sum() <= 8
  np.testing.assert_array_equal(found > 0, wanted > 0)
  np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / count))


def test_the_first_of_equal_tokens_wins_and_margins_count() -> None:
  logits = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [5.0, 1.0, 2.0, 2.0]])
  assert first_largest(logits).tolist() == [1, 0]
  assert margin(logits, first_largest(logits)).tolist() == [0, 3]


@pytest.mark.parametrize(
  ("values", "message"),
  [({"top_p": 0.0}, "top_p: expected above 0"), ({"stop": ("",)}, "stop: expected texts"),
   ({"num_beams": 2, "temperature": 1.0}, "num_beams: expected 1 where temperature > 0")],
)  # fmt: skip
def test_impossible_settings_are_refused(values: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    Generation(**values)


def test_samples_are_drawn_by_request_step_and_key() -> None:
  """The rule written out: the run's key, folded with the request's number, then with the step."""
  sampler, key = Sampler(0.8, 12, 0.9), jax.random.key(5)
  numbers, steps = jnp.asarray([3, 0, 7, 3, 3, 9]), jnp.asarray([0, 0, 2, 1, 0, 5])
  found = sampler.pick(jnp.asarray(LOGITS), key, numbers, steps)
  filtered = sampler.filtered(jnp.asarray(LOGITS))
  for row in range(len(LOGITS)):
    own = jax.random.fold_in(jax.random.fold_in(key, int(numbers[row])), int(steps[row]))
    assert int(found[row]) == int(jax.random.categorical(own, filtered[row]))
  assert len({int(x) for x in found}) > 1
  assert Sampler.of(Generation(temperature=0.5, top_k=3, top_p=0.7)) == Sampler(0.5, 3, 0.7)
