"""Filters against transformers' own, and drawn tokens against their distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.infer import row_settings
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.requests import Prompt, PromptPiece
from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.infer.sampling import (
  edit,
  filtered,
  first_largest,
  log,
  log_probabilities,
  margin,
  modes,
  pick,
)

WORDS = 40
LOGITS = np.random.default_rng(0).normal(size=(6, WORDS)).astype(np.float32) * 2


def settings_of(*generations: Generation, numbers: Sequence[int] = ()) -> RowSettings:
  return row_settings.of(
    generations, numbers or [0] * len(generations), [None] * len(generations), (), WORDS
  )


@pytest.mark.parametrize(
  "values",
  [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.5, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
  ],
)
def test_filters_are_those_of_transformers(values: dict[str, Any]) -> None:
  """One row at a time, and in one batch with rows of other settings."""
  torch = pytest.importorskip("torch")
  from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
  )

  warpers = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
  }
  theirs = torch.from_numpy(LOGITS.copy())
  for name, warper in warpers.items():
    if name in values:
      theirs = warper(values[name])(None, theirs)
  mine, other = Generation(**values), Generation(temperature=0.9, top_k=3)
  ours = filtered(jnp.asarray(LOGITS), settings_of(*[mine] * len(LOGITS)))
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
  mixed = filtered(jnp.asarray(LOGITS), settings_of(*[other, mine] * (len(LOGITS) // 2)))
  np.testing.assert_array_equal(mixed[1::2], ours[1::2])


def test_draws_have_the_filtered_distribution() -> None:
  generation, count = Generation(temperature=1.2, top_k=8, top_p=0.9, seed=3), 20000
  rows = jnp.broadcast_to(LOGITS[0], (count, WORDS))
  settings = settings_of(*[generation] * count, numbers=range(count))
  drawn = pick(rows, settings, jnp.zeros(count, jnp.int32), jnp.asarray(True))
  found = np.bincount(np.asarray(drawn), minlength=WORDS) / count
  wanted = np.asarray(jax.nn.softmax(filtered(jnp.asarray(LOGITS[:1]), settings_of(generation))))[0]
  assert 1 < (wanted > 0).sum() <= 8
  np.testing.assert_array_equal(found > 0, wanted > 0)
  np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / count))


def edited(generation: Generation, ids: Sequence[int], prompt: Sequence[int] = ()) -> np.ndarray:
  """The first row of LOGITS after an answer so far."""
  pieces = (PromptPiece(np.asarray(prompt, np.int32), np.full(len(prompt), -1), (), "", 0),)
  settings = row_settings.of([generation], [0], [Prompt(pieces)], (7,), WORDS)
  room = np.zeros((1, 8), np.int32)
  room[0, : len(ids)] = ids
  made = jnp.asarray([len(ids)])
  return np.asarray(edit(jnp.asarray(LOGITS[:1]), settings, jnp.asarray(room), made))[0]


def test_penalties_are_those_of_transformers_and_of_openai() -> None:
  torch = pytest.importorskip("torch")
  from transformers import RepetitionPenaltyLogitsProcessor

  answer, prompt = [3, 5, 3, 39], [0, 11, 12]
  theirs = RepetitionPenaltyLogitsProcessor(1.7)(
    torch.tensor([prompt + answer]), torch.from_numpy(LOGITS[:1].copy())
  )
  ours = edited(Generation(repetition_penalty=1.7), answer, prompt)
  np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-6)
  wanted = LOGITS[0].copy()
  for token, count in ((3, 2), (5, 1), (39, 1)):
    wanted[token] -= 0.5 + 0.25 * count
  found = edited(Generation(presence_penalty=0.5, frequency_penalty=0.25), answer, prompt)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_biases_and_the_least_number_of_tokens() -> None:
  wanted = LOGITS[0].copy()
  wanted[[2, 30]] += (1.5, -100)
  biased = Generation(logit_bias=((2, 1.5), (30, -100.0)), stop_ids=(9,), min_new_tokens=2)
  np.testing.assert_allclose(edited(biased, [1, 1]), wanted, rtol=1e-6)
  wanted[[7, 9]] = -np.inf  # the end of the template and the request's own
  np.testing.assert_allclose(edited(biased, [1]), wanted, rtol=1e-6)
  np.testing.assert_array_equal(edited(Generation(), [1, 2, 3]), LOGITS[0])


def test_the_first_of_equal_tokens_wins_and_margins_count() -> None:
  logits = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [5.0, 1.0, 2.0, 2.0]])
  assert first_largest(logits).tolist() == [1, 0]
  assert margin(logits, first_largest(logits)).tolist() == [0, 3]


@pytest.mark.parametrize(
  ("values", "message"),
  [({"top_p": 0.0}, "top_p: expected above 0"), ({"stop": ("",)}, "stop: expected texts"),
   ({"num_beams": 2, "temperature": 1.0}, "num_beams: expected 1 where temperature > 0"),
   ({"num_beams": 2, "stop_ids": (3,)}, "num_beams: expected 1 with other stop ids"),
   ({"seed": 1 << 63}, "seed: expected an integer of 64 bits"),
   ({"min_new_tokens": 129}, "min_new_tokens: expected 0 to max_new_tokens, found 129"),
   ({"log_probabilities": 21}, "log_probabilities: expected 0 to 20"),
   ({"repetition_penalty": 0.0}, "repetition_penalty: expected above 0"),
   ({"logit_bias": ((-1, 0.0),)}, "stop_ids or logit_bias: expected ids of tokens")],
)  # fmt: skip
def test_impossible_settings_are_refused(values: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    Generation(**values)


def test_samples_are_drawn_by_request_step_and_seed() -> None:
  """The rule written out: the seed's key, folded with the request's number, then with the step."""
  seeds, numbers, made = (5, -1, 1 << 40, 5, 5, 0), (3, 0, 7, 3, 3, 9), (0, 0, 2, 1, 0, 5)
  sampled = Generation(temperature=0.8, top_k=12, top_p=0.9)
  settings = settings_of(
    *(dataclasses.replace(sampled, seed=seed) for seed in seeds), numbers=numbers
  )
  found = pick(jnp.asarray(LOGITS), settings, jnp.asarray(made), jnp.asarray(True))
  shown = filtered(jnp.asarray(LOGITS), settings)
  for row, (seed, number, step) in enumerate(zip(seeds, numbers, made, strict=True)):
    data = np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.key(seed) if 0 <= seed < 1 << 32 else jax.random.wrap_key_data(data)
    own = jax.random.fold_in(jax.random.fold_in(key, number), step)
    assert int(found[row]) == int(jax.random.categorical(own, shown[row]))
  assert len({int(x) for x in found}) > 1
  assert pick(jnp.asarray(LOGITS), settings, jnp.asarray(made), jnp.asarray(False)).tolist() == (
    LOGITS.argmax(axis=1).tolist()
  )


def test_greedy_and_sampled_rows_share_a_batch() -> None:
  sampled = Generation(temperature=1.5, seed=1)
  mixed = settings_of(*[Generation(), sampled] * 3)
  none = jnp.zeros(len(LOGITS), jnp.int32)
  found = pick(jnp.asarray(LOGITS), mixed, none, modes(mixed, none == 0).sampled)
  alone = pick(jnp.asarray(LOGITS), settings_of(*[sampled] * 6), none, jnp.asarray(True))
  assert found[::2].tolist() == LOGITS[::2].argmax(axis=1).tolist()
  assert found[1::2].tolist() == alone[1::2].tolist()


def test_log_probabilities_are_those_of_the_model() -> None:
  held = log_probabilities(2, 3, 4)
  chosen, made = jnp.asarray([5, 6]), jnp.asarray([0, 2])
  found = log(held, jnp.asarray(LOGITS[:2]), chosen, made, jnp.asarray(True))
  wanted = np.asarray(jax.nn.log_softmax(LOGITS[:2], axis=-1))
  for row, (token, at) in enumerate(((5, 0), (6, 2))):
    assert float(found.chosen[row, at]) == pytest.approx(float(wanted[row, token]), abs=1e-6)
    best = np.argsort(-wanted[row])[:4]
    assert found.top_ids[row, at].tolist() == best.tolist()
    np.testing.assert_allclose(found.top[row, at], wanted[row, best], atol=1e-6)
  assert float(jnp.abs(found.chosen).sum()) == pytest.approx(
    float(-wanted[0, 5] - wanted[1, 6]), abs=1e-5
  )
  same = log(held, jnp.asarray(LOGITS[:2]), chosen, made, jnp.asarray(False))
  assert float(jnp.abs(same.chosen).sum()) == 0
