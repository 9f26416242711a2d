"""The whole model: branches, cached decoding and masks against their slow and obvious twins."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.data import conversation, example, reading
from llava_sp_jax.data.conversation import TEMPLATES
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.generate import generate
from llava_sp_jax.models import build
from llava_sp_jax.models.layers import causal_mask
from llava_sp_jax.models.llava import merge
from llava_sp_jax.models.remat import POLICIES
from tests.conftest import ConfigMaker

TURNS = [("<image>\nwhat is it?", "red"), ("is it blue?", "no"), ("sure?", "yes, it is")]
V1 = TEMPLATES["v1"]


class Model:
  """A random tiny model with adapters that do something."""

  def __init__(self, config: config_lib.Config):
    self.config = config.model
    self.tokenizer = Tokenizer(config.data.tokenizer)
    self.module = build.model(self.config)
    self.image_tokens = build.image_token_count(self.config)
    params = jax.jit(lambda r: build.initialize(self.config, r))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    self.params = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    side = self.config.tower.image_size
    self._run = jax.jit(self._logits)
    self.pixels = np.random.default_rng(0).normal(size=(1, 1, side, side, 3)).astype(np.float32)

  def row(self, pieces: list, length: int) -> dict[str, np.ndarray]:
    runs = reading.tokenize(pieces, self.tokenizer)
    arrays = example.layout(runs, [example.one_tile(self.image_tokens)], length).arrays()
    return {**{k: v[None] for k, v in arrays.items()}, "images": self.pixels}

  def _logits(self, params: Any, row: dict[str, jax.Array]) -> Any:
    names = ("tokens", "positions", "segments", "images", "slots")
    hidden = self.module.apply({"params": params}, *(row[name] for name in names))
    return self.module.apply({"params": params}, hidden, method="logits")

  def logits(self, row: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(self._run(self.params, row))[0]


@pytest.fixture(scope="module")
def model(tiny_config: ConfigMaker) -> Model:
  return Model(tiny_config("finetune", "cropping"))


def test_branches_equal_separate_samples(model: Model) -> None:
  """Each turn of a branched row has the logits that it has alone with the image."""
  together = model.row(conversation.branch(TURNS, V1), 192)
  logits = model.logits(together)
  ids = (together["segments"] - BRANCHES)[0]
  for number, (question, reply) in enumerate(TURNS):
    asked = question if number == 0 else f"<image>\n{question}"
    pieces = conversation.branch([(asked, reply)], V1)
    alone = model.row(pieces, 192)
    mine = np.flatnonzero(ids == number + 1)
    theirs = np.flatnonzero((alone["segments"] - BRANCHES)[0] == 1)
    np.testing.assert_array_equal(together["tokens"][0, mine], alone["tokens"][0, theirs])
    np.testing.assert_array_equal(together["positions"][0, mine], alone["positions"][0, theirs])
    np.testing.assert_allclose(logits[mine], model.logits(alone)[theirs], atol=1e-5)
    # The last target of a branch is the next branch's first token; it carries no weight.
    np.testing.assert_array_equal(together["weights"][0, mine], alone["weights"][0, theirs])


def test_a_branch_does_not_see_another(model: Model) -> None:
  before = model.logits(model.row(conversation.branch(TURNS, V1), 192))
  turns = [TURNS[0], ("is it teal?", "no"), TURNS[2]]
  row = model.row(conversation.branch(turns, V1), 192)
  after = model.logits(row)
  segments = (row["segments"] - BRANCHES)[0]
  others = np.isin(segments, [0, 1])  # the trunk and the first branch stand before the change
  np.testing.assert_allclose(before[others], after[others], atol=1e-6)
  assert np.abs(before[segments == 2] - after[segments == 2]).max() > 1e-3


def test_cached_decoding_equals_the_full_forward_pass(model: Model) -> None:
  """Greedy tokens of `generate` against running the whole sequence anew for each token."""
  prompts = ["<image>\nwhat is it?", "<image>\nis it blue, teal or green?"]
  length, new = 128, 6
  rows = [model.row(conversation.prompt(p, V1), length) for p in prompts]
  batch = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
  ids, counts = generate(model.module, model.params, batch, stop_ids=(), max_new_tokens=new)
  assert counts.tolist() == [new, new]
  for number, row in enumerate(rows):
    current = {k: v.copy() for k, v in row.items()}
    wanted = []
    for _ in range(new):
      at = int((current["segments"][0] > 0).sum())
      token = int(model.logits(current)[at - 1].argmax())
      wanted.append(token)
      current["tokens"][0, at], current["positions"][0, at] = token, at
      current["segments"][0, at] = BRANCHES
    assert ids[number].tolist() == wanted
  assert ids[0].tolist() != ids[1].tolist()


def test_generation_stops_at_the_stop_id(model: Model) -> None:
  batch = model.row(conversation.prompt("<image>\nwhat is it?", V1), 128)

  def run(stop: tuple[int, ...]) -> tuple[list[int], int]:
    ids, counts = generate(model.module, model.params, batch, stop_ids=stop, max_new_tokens=6)
    return ids[0].tolist(), int(counts[0])

  free, _ = run(())
  ids, count = run((free[2],))
  assert count == free.index(free[2])
  assert ids[:count] == free[:count]


def test_the_image_matters_and_padding_does_not(model: Model) -> None:
  row = model.row(conversation.prompt("<image>\nwhat is it?", V1), 128)
  longer = model.row(conversation.prompt("<image>\nwhat is it?", V1), 160)
  used = int((row["segments"] > 0).sum())
  logits = model.logits(row)
  np.testing.assert_allclose(logits[:used], model.logits(longer)[:used], atol=1e-5)
  other = model.logits({**row, "images": -row["images"]})
  assert np.abs(logits[used - 1] - other[used - 1]).max() > 1e-3


def test_merge_places_tokens_where_slots_point() -> None:
  text, image = jnp.zeros((2, 4, 1)), jnp.arange(1.0, 7.0).reshape(2, 3, 1)
  slots = jnp.asarray([[-1, 2, 0, -1], [1, -1, -1, 1]])
  assert merge(text, image, slots)[..., 0].tolist() == [[0, 3, 1, 0], [5, 0, 0, 5]]


def test_newline_is_the_last_image_token(tiny_config: ConfigMaker) -> None:
  """One more row after the tokens of all images, the same whatever they show."""
  plain = Model(tiny_config("finetune", "pooling"))
  ended = Model(tiny_config("finetune", "pooling", model={"image_newline": True}))
  params = {**plain.params, "projector": {**plain.params["projector"]}}
  newline = np.arange(32, dtype=np.float32)
  params["projector"]["image_newline"] = newline
  images = np.concatenate([plain.pixels, -plain.pixels], axis=1)

  def encode(model: Model, params: Any) -> np.ndarray:
    return np.asarray(model.module.apply({"params": params}, images, method="encode_image"))

  tokens, more = encode(plain, plain.params), encode(ended, params)
  assert build.image_token_count(ended.config) == plain.image_tokens
  assert more.shape[1] == 2 * plain.image_tokens + 1
  np.testing.assert_array_equal(more[:, :-1], tokens)
  np.testing.assert_array_equal(more[0, -1], newline)


def test_mask_written_out() -> None:
  """Trunk, two branches, padding: who sees whom, by the rule in words."""
  segments = np.asarray([0, 0, 1, 1, 2]) + BRANCHES
  segments = np.asarray([[*segments, 2 * BRANCHES, 0]])
  index = np.arange(7)[None]
  mask = np.asarray(causal_mask(index, segments, index, segments))[0].astype(int)
  assert mask.tolist() == [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0],
  ]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    pytest.param("scan_unroll", 2, marks=pytest.mark.guard),
    *[pytest.param("remat", p, marks=[pytest.mark.slow] * (p != "full")) for p in POLICIES],
  ],
)
def test_how_layers_are_run_changes_nothing(
  tiny_config: ConfigMaker, field: str, value: Any
) -> None:
  changes = {field: value}
  plain, other = Model(tiny_config("finetune")), Model(tiny_config("finetune", model=changes))
  row = plain.row(conversation.chain(TURNS, V1), 192)
  np.testing.assert_allclose(plain.logits(row), other.logits(row), atol=1e-5)


@pytest.mark.guard
def test_unrolled_layers_have_the_same_initial_values(tiny_config: ConfigMaker) -> None:
  """`initialize` does not unroll; a frozen base that was made before it did so is the same."""

  def unrolled(config: config_lib.ModelConfig, rng: jax.Array) -> Any:
    inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), build.example_inputs(config))
    return build.model(config).init(rng, *inputs, method=build._touch)["params"]

  config = tiny_config(model={"scan_unroll": 2, "remat": "full"}).model
  made, wanted = (
    jax.jit(functools.partial(make, config))(jax.random.key(0))
    for make in (build.initialize, unrolled)
  )
  assert jax.tree.structure(made) == jax.tree.structure(wanted)
  for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
