"""Log-likelihoods against generation, against chances that add up to one, and against padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_sp_jax.data import conversation, reading
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.models import build

CONTINUATIONS = ["blue, yes", "red", "a green circle and a yellow one", ""]


@pytest.fixture(scope="module")
def loaded(model: pretrained.Pretrained) -> pretrained.Pretrained:
  """A model that is surer of some words than of others."""
  return model


@pytest.fixture
def requests(tiny_data: Path) -> list[Request]:
  picture = tiny_data / "images" / "3.png"
  with Image.open(picture) as opened:
    decoded = opened.convert("RGB")
  return [
    Request("what colour is it, blue?", (picture,)),
    Request("is it red?"),
    Request("is it red?", (decoded,)),
    Request("is it?", (picture.read_bytes(),)),
  ]


def naive(loaded: pretrained.Pretrained, question: str, continuation: str) -> tuple[float, bool]:
  """Token by token without an image, without padding, in float64 from the logits on."""
  template = conversation.TEMPLATES[loaded.config.data.template]
  prompt = conversation.prompt(question, template)
  pieces = [*prompt, conversation.TextPiece(f" {continuation}", True, 0)]
  runs = reading.tokenize(pieces, loaded.tokenizer)
  ids = [i for run in runs for i in run.ids]
  first = len(ids) - sum(sum(run.supervised) for run in runs)
  module = build.model(loaded.config.model)

  @jax.jit
  def last_logits(params: Any, tokens: jax.Array) -> jax.Array:
    positions, segments = jnp.arange(tokens.shape[1])[None], jnp.full_like(tokens, 1 << 12)
    hidden: Any = module.apply(
      {"params": params},
      tokens,
      positions,
      segments,
      jnp.zeros((1, 0, 1)),
      None,
      None,
      method="extend",
    )[0]
    return module.apply({"params": params}, hidden[:, -1], method="logits")

  total, greedy = 0.0, True
  for at in range(first, len(ids)):
    logits = last_logits(loaded.params, jnp.asarray([ids[:at]], jnp.int32))
    row = np.asarray(logits, np.float64)[0]
    total += row[ids[at]] - math.log(np.exp(row - row.max()).sum()) - row.max()
    greedy &= int(row.argmax()) == ids[at]
  return total, greedy


def test_equals_a_slow_one(loaded: pretrained.Pretrained) -> None:
  question = "is it red?"
  found = list(Likelihood(loaded, 3)((Request(question), text) for text in CONTINUATIONS))
  for text, (total, greedy) in zip(CONTINUATIONS[:2], found, strict=False):
    expected = naive(loaded, question, text)
    assert total == pytest.approx(expected[0], abs=1e-4)
    assert greedy == expected[1]


def test_does_not_depend_on_what_is_asked_beside_it(
  loaded: pretrained.Pretrained, requests: list[Request]
) -> None:
  asked = [(r, text) for r in requests for text in CONTINUATIONS[:3]]
  together = list(Likelihood(loaded, 5)(asked))
  one = Likelihood(loaded, 1)
  alone = [next(one([pair])) for pair in asked[::4]]
  for (a, greedy), (b, greedy_alone) in zip(together[::4], alone, strict=True):
    assert a == pytest.approx(b, abs=1e-4)
    assert greedy == greedy_alone
  assert all(total < 0 for total, _ in together)
  assert len({round(total, 3) for total, _ in together}) == len(asked), "images and questions count"


def test_chances_of_all_single_tokens_add_up_to_one(loaded: pretrained.Pretrained) -> None:
  """The log-probabilities are normalised over the vocabulary."""
  vocabulary = loaded.config.model.language_model.vocab_size
  likelihood = Likelihood(loaded, vocabulary)
  batch, ((at, *_),) = likelihood._batch([likelihood._read(Request("is it red?"), "red")])
  batch["targets"][:, at] = np.arange(vocabulary)
  found, _ = likelihood._programs.score(batch, np.full((vocabulary, 1), at, np.int32))
  assert float(np.exp(np.asarray(found, np.float64)).sum()) == pytest.approx(1.0, abs=1e-4)


def test_nothing_is_certain(loaded: pretrained.Pretrained) -> None:
  assert next(Likelihood(loaded, 1)([(Request("is it red?"), "")])) == (0.0, True)
