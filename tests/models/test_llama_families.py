"""Decoder families against transformers: rope kinds, windows, biases, tied heads, with caches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import tables
from llava_sp_jax.models import build, cache
from llava_sp_jax.models.layers import BRANCHES, ROPES, Rope, window_mask
from llava_sp_jax.models.llama import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 64, 32, 2, 4, 2, 8, 48
TRAINED, WINDOW = 16, 7  # both are passed by the longer of the sequences below
SHORT, LONG = 6, 40
TOLERANCE = 2e-5  # of the largest logit: float32 sums in another order


@dataclasses.dataclass(frozen=True)
class Family:
  """What transformers' config and ours say to the same effect."""

  model_type: str
  theirs: dict[str, Any]
  ours: dict[str, Any]


def rope(kind: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Family:
  values = {"rope_type": kind, "rope_theta": 1e4, **theirs}
  scaling = config_lib.RopeScaling(kind=kind, **ours)
  return Family("llama", {"rope_parameters": values}, {"rope_scaling": scaling})


ORIGINAL = {"original_max_position_embeddings": TRAINED}
FAMILIES = {
  "llama": rope("default", {}, {}),
  "llama_tied": Family("llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
  "llama_linear": rope("linear", {"factor": 4.0}, {"factor": 4.0}),
  "llama_dynamic": rope(
    "dynamic", {"factor": 3.0}, {"factor": 3.0, "original_length": TRAINED}
  ),
  "llama_llama3": rope(
    "llama3",
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    {"factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_length": TRAINED},
  ),
  "llama_yarn": rope(
    "yarn",
    {"factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.1, **ORIGINAL},
    {"factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.1, "original_length": TRAINED},
  ),
  "llama_yarn_attention_factor": rope(
    "yarn",
    {"factor": 4.0, "attention_factor": 0.8, **ORIGINAL},
    {"factor": 4.0, "attention_factor": 0.8, "original_length": TRAINED},
  ),
  "mistral": Family("mistral", {"sliding_window": WINDOW}, {"sliding_window": WINDOW}),
  "qwen2": Family("qwen2", {}, {"attention_bias": True}),
  "qwen2_window": Family(
    "qwen2",
    {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    {"attention_bias": True, "sliding_window": WINDOW, "window_from_layer": 1},
  ),
}  # fmt: skip


@functools.cache
def reference(name: str) -> Any:
  """A random model of transformers with every weight far from its default."""
  family = FAMILIES[name]
  config = transformers.CONFIG_MAPPING[family.model_type](
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    intermediate_size=MLP,
    max_position_embeddings=TRAINED,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
    **family.theirs,
  )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for tensor in model.parameters():
      tensor += 0.3 * torch.randn(tensor.shape) / max(1, tensor.ndim)
  return model


class Ours:
  """The same model as a Decoder, its weights through the table of names."""

  def __init__(self, name: str):
    config = config_lib.ModelConfig(
      tower=config_lib.TowerConfig(
        image_size=8, patch_size=4, width=8, layers=2, heads=2, mlp_width=8
      ),
      language_model=config_lib.LanguageModelConfig(
        vocab_size=VOCAB,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mlp_width=MLP,
        **FAMILIES[name].ours,
      ),
      projector=config_lib.ProjectorConfig(variant="none"),
      dtype="float32",
      remat="none",
    )
    self.decoder: Decoder = build.model(config).language_model
    self.params = self._params(reference(name).state_dict())
    self.run = jax.jit(self._run)

  def _params(self, tensors: dict[str, Any]) -> dict[str, Any]:
    layers: dict[str, dict[int, np.ndarray]] = {}
    tree: dict[str, Any] = {}
    for torch_name, tensor in tensors.items():
      if torch_name == "lm_head.weight" and self.decoder.tie_embeddings:
        continue
      match = tables.match(torch_name, tables.LLAMA)
      assert match, torch_name
      array = match.layout.to_jax(tensor.numpy())
      layers.setdefault(match.path, {})[match.layer or 0] = array
    for path, parts in layers.items():
      *groups, leaf = path.split("/")[1:]
      place = functools.reduce(lambda node, key: node.setdefault(key, {}), groups, tree)
      stacked = np.stack([parts[i] for i in range(len(parts))])
      place[leaf] = stacked if groups[0] == "layers" else stacked[0]
    return tree

  def _run(self, tokens: Any, positions: Any, segments: Any, kv: Any) -> Any:
    def call(module: Decoder) -> Any:
      hidden, new = module(module.embed(tokens), positions, segments, kv)
      return module.logits(hidden), new

    return self.decoder.apply({"params": self.params}, method=call)

  def logits(self, tokens: Any, positions: Any, segments: Any) -> np.ndarray:
    """Uncached, padded to LONG, so that every call has one shape. [T] x3 -> [T, V]."""
    fill = LONG - len(tokens)
    rows = [np.pad(np.asarray(x, np.int32), (0, fill))[None] for x in (tokens, positions, segments)]
    return np.asarray(self.run(*rows, None)[0])[0, : len(tokens)]

  def alone(self, tokens: Any) -> np.ndarray:
    return self.logits(tokens, np.arange(len(tokens)), [BRANCHES] * len(tokens))

  def run_on(self, tokens: Any, positions: Any, segments: Any, kv: cache.KVCache) -> Any:
    """`run`, and the cache with what is new in it."""
    logits, new = self.run(tokens, positions, segments, kv)
    return logits, cache.append(kv, new, np.full(1, tokens.shape[1]))

  def cache(self, capacity: int) -> cache.KVCache:
    return cache.allocate(LAYERS, 1, capacity, KV_HEADS, HEAD_DIM, jnp.float32)


ours = functools.cache(Ours)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, LONG)


def assert_close(mine: Any, theirs: Any) -> None:
  theirs = np.asarray(theirs)
  np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name: str, length: int) -> None:
  with torch.no_grad():
    wanted = reference(name)(torch.tensor(TOKENS[None, :length]), use_cache=False).logits[0]
  assert_close(ours(name).alone(TOKENS[:length]), wanted.numpy())


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decoding_equals_that_of_transformers(name: str) -> None:
  """A prompt within the trained length and the window, then tokens one by one beyond both."""
  model, past, kv = ours(name), None, ours(name).cache(LONG)
  for start, end in [(0, SHORT), *((i, i + 1) for i in range(SHORT, LONG - 8))]:
    ids = TOKENS[None, start:end].astype(np.int32)
    with torch.no_grad():
      out = reference(name)(torch.tensor(ids, dtype=torch.long), past_key_values=past)
    past = out.past_key_values
    mine, kv = model.run_on(ids, np.arange(start, end)[None], np.full_like(ids, BRANCHES), kv)
    assert_close(mine[0], out.logits[0].numpy())


@pytest.mark.parametrize("name", ["mistral", "qwen2_window"])
def test_the_window_matters(name: str) -> None:
  """Without it, logits within the window stay and later ones change."""
  model = ours(name)
  wide = model.decoder.clone(sliding_window=0)
  arrays = (TOKENS[None], np.arange(LONG)[None], np.full((1, LONG), BRANCHES))
  hidden, _ = wide.apply(
    {"params": model.params}, method=lambda m: m(m.embed(arrays[0]), *arrays[1:])
  )
  free = np.asarray(wide.apply({"params": model.params}, hidden, method="logits"))[0]
  bound = model.alone(TOKENS)
  assert_close(free[:WINDOW], bound[:WINDOW])
  assert np.abs(free[WINDOW:] - bound[WINDOW:]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("name", ["mistral", "qwen2_window", "llama_dynamic"])
def test_packed_samples_read_as_if_alone(name: str) -> None:
  """Windows and lengths count within a sample, wherever it stands in its row."""
  model, parts = ours(name), (TOKENS[:21], TOKENS[21:33])
  positions = np.concatenate([np.arange(len(p)) for p in parts])
  segments = np.repeat([BRANCHES, 2 * BRANCHES], [len(p) for p in parts])
  packed = model.logits(np.concatenate(parts), positions, segments)
  assert_close(packed[:21], model.alone(parts[0]))
  assert_close(packed[21:], model.alone(parts[1]))


def test_a_branch_has_the_window_that_it_has_alone() -> None:
  """Its trunk is near in positions even where another branch stands between them in the row."""
  model = ours("mistral")
  trunk, first, second = TOKENS[:12], TOKENS[12:21], TOKENS[21:27]
  positions = [*range(12), *range(12, 21), *range(12, 18)]
  segments = np.repeat([0, 1, 2], [12, 9, 6]) + BRANCHES
  together = model.logits(TOKENS[:27], positions, segments)
  for branch, at in ((first, slice(12, 21)), (second, slice(21, 27))):
    assert_close(together[at], model.alone(np.concatenate([trunk, branch]))[12:])
  own = np.full((1, 12), BRANCHES)
  _, kv = model.run_on(trunk[None], np.arange(12)[None], own, model.cache(LONG))
  cached, _ = model.run(second[None], np.arange(12, 18)[None], own[:, :6], kv)
  assert_close(cached[0], together[21:])


def test_window_written_out() -> None:
  mask = np.asarray(window_mask(np.asarray([[0, 1, 2, 3]]), np.asarray([[0, 1, 2, 3]]), 2))[0]
  lower = np.tril(mask).astype(int)  # what is later is the causal mask's affair
  assert lower.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("kind", ["dynamic", "llama3", "yarn"])
def test_a_kind_that_needs_the_trained_length_says_so(kind: str) -> None:
  position = np.zeros((1, 1), np.int32)
  with pytest.raises(ValueError, match=f"rope kind '{kind}' needs original_length >= 1, found 0"):
    Rope(1e4, kind).angles(8, position, position)


def test_every_kind_of_rope_is_compared() -> None:
  kinds = {f.ours["rope_scaling"].kind for f in FAMILIES.values() if "rope_scaling" in f.ours}
  assert kinds == set(ROPES)
