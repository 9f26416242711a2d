"""Traces the programs with which the engine answers, for absent devices, from shapes alone.

The engine's own code admits a full batch of prompts, each with images of its own, and decodes. Only
what would touch a device is replaced: arguments and results of programs are shapes. So what is
planned has the sizes, groups and roundings of what runs, and is run as often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed.memory import device_bytes
from llava_sp_jax.infer import decode, row_settings
from llava_sp_jax.infer.caches import FeatureCache, PictureCache, PrefixCache
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.layout import EngineLayout
from llava_sp_jax.infer.prefill import Group, Prefix
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.requests import Prompt, PromptPiece, Request
from llava_sp_jax.infer.rows import Rows
from llava_sp_jax.infer.schedule import Ready
from llava_sp_jax.models import build
from llava_sp_jax.models.quantize import NONE, is_quantized

SYSTEM = 36  # positions of text before the first image, about those of the template v1
STOP_IDS = (2,)
# What else is in memory beside the arguments of a program; all of it while prompts are admitted.
BESIDE = {
  "encode": ("state", "prefixes", "features"),
  "grow": ("state", "prefixes", "features"),
  "admit": ("features",),
  "decode": ("kept prefixes", "features"),
}


def folded(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """Returns the config of a model as the engine has it: adapters are in the weights.

  Those of a quantized base stay adapters, as in `infer.pretrained.from_run`.
  """
  plain = config_lib.LoraConfig(rank=0)
  return dataclasses.replace(config, lora=plain) if config.quantize == NONE else config


class AbsentPrograms(Programs):
  """Traces programs instead of running them, and counts how often each would run."""

  def __init__(self, config: config_lib.Config, strategy: decode.Strategy, mesh: Mesh):
    """Makes the shapes of the parameters, placed as the engine places them."""
    super().__init__(config, {}, strategy, mesh, Counts())
    self._config = config.model
    self._runs: dict[tuple[str | int, ...], int] = {}
    self.last: dict[str, tuple[str | int, ...]] = {}  # name -> the key of the last program
    self.traced: dict[str, Any] = {}  # name -> the last program of that name
    self.arguments: dict[str, tuple[Any, ...]] = {}  # and its arguments
    dtype = jnp.dtype(config.model.dtype)
    stored = flatten_dict(build.abstract(config.model), sep="/")
    cast = {
      path: leaf if is_quantized(path) else jax.ShapeDtypeStruct(leaf.shape, dtype)
      for path, leaf in stored.items()
    }
    params = unflatten_dict(cast, sep="/")
    self._params = placed(jax.eval_shape(build.unstack, params), self._places(params))

  def _run(
    self,
    key: tuple[str | int, ...],
    run: Callable[..., Any],
    arguments: tuple[Any, ...],
    donate: tuple[int, ...] = (),
    out: Any = None,
  ) -> Any:
    """Returns the shapes of a program's results."""
    name = str(key[0])
    self._runs[key], self.last[name] = self._runs.get(key, 0) + 1, key
    if key not in self._table:
      with jax.set_mesh(self.mesh):
        traced = self._jit(name, run, donate, out).trace(*arguments)
      self.traced[name], self.arguments[name] = traced, arguments
      self._table[key] = placed(traced.out_info, out)
    return self._table[key]

  def runs(self, name: str) -> int:
    """Returns how often the last program of a name would have run."""
    return self._runs[self.last[name]]

  @property
  def rule(self) -> decode.StopRule:
    """The constants of the programs."""
    return self._strategy.rule

  def runs_by_key(self) -> dict[tuple[str | int, ...], int]:
    """Returns how often each program would have run."""
    return dict(self._runs)

  def _put(self, array: Any) -> Any:
    rows = len(array) % self.parts == 0
    return placed(_shape(array), self._rows if rows else self._whole)

  def _same(self, *values: Any) -> tuple[Any, ...]:
    return tuple(placed(_shape(value), self._whole) for value in values)

  def at(self, key: tuple[str | int, ...]) -> None:
    """Traces the program of a key of `Programs` with its sizes: one of ENTRIES."""
    ENTRIES[str(key[0])](self, *map(int, key[1:]))

  def group(self, rows: int, length: int, before: int, tiles: int) -> Group:
    """Returns the shapes of `rows` prompts: `length` new positions that follow prefixes of
    `before` positions, and show so many tiles.
    """
    text = self._module.language_model
    sizes = (text.layers, text.kv_heads)
    rests = ((text.head_dim, before), (before, text.head_dim))
    shapes: list[Any] = [
      jax.ShapeDtypeStruct((*sizes, *rest), text.dtype, sharding=place)
      for rest, place in zip(rests, self._prefix_places, strict=True)
    ]
    side = self._config.tower.image_size
    encoded = self.encode(np.zeros((self.parts, side, side, 3), np.float32)) if tiles else []
    return Group(
      np.zeros((rows, length), np.int32),
      np.full((rows, length), -1, np.int32),
      np.full(rows, length, np.int32),
      np.zeros(rows, np.int32),
      (Prefix(*shapes),) * (rows if before else 0),
      ((encoded[0],) * tiles,) * rows if tiles else (),
    )


def _encode(programs: AbsentPrograms, tiles: int) -> None:
  side = programs._config.tower.image_size
  programs.encode(np.zeros((tiles, side, side, 3), np.float32))


def _grow(
  programs: AbsentPrograms, capacity: int, rows: int, length: int, before: int, tiles: int
) -> None:
  programs.grow(programs.group(rows, length, before, tiles), capacity)


def _admit(
  programs: AbsentPrograms,
  rows: int,
  capacity: int,
  some: int,
  length: int,
  before: int,
  tiles: int,
) -> None:
  rule = programs.rule
  settings = row_settings.of(
    [Generation()] * some, range(some), [None] * some, rule.stop_ids, rule.logits
  )
  state, group = programs.state(rows, capacity), programs.group(some, length, before, tiles)
  programs.admit(state, group, np.arange(some, dtype=np.int32), settings)


def _decode(programs: AbsentPrograms, rows: int, capacity: int) -> None:
  programs.decode(programs.state(rows, capacity), np.zeros(rows, bool), 1, rows + 1)


# Name of a program -> traces it for the sizes that follow the name in its key.
ENTRIES: dict[str, Callable[..., None]] = {
  "encode": _encode,
  "grow": _grow,
  "admit": _admit,
  "decode": _decode,
}


class Blank(PictureCache):
  """Stands for the pictures of requests: each is one tile of zeros."""

  def tiles(self, key: str, picture: Any) -> np.ndarray:
    """Returns the pixels of a picture."""
    side = self._reader.tile.size
    return np.zeros((1, side, side, 3), np.float32)


def alone(config: config_lib.Config, mesh: Mesh) -> AbsentPrograms:
  """Returns the programs of a model with the default settings of generation; none is traced yet."""
  config = dataclasses.replace(config, model=folded(config.model))
  text = config.model.language_model
  rule = decode.StopRule(STOP_IDS, Generation().max_new_tokens, text.vocab_size)
  return AbsentPrograms(config, decode.Sampling(rule), mesh)


def admitted(config: config_lib.Config, mesh: Mesh) -> tuple[AbsentPrograms, Rows, dict[str, int]]:
  """Admits prompts of `data.row_length` positions into all rows, and decodes.

  `train.batch_size` is the number of rows; each prompt shows `data.images_per_row` images of one
  tile, which no other prompt shows, and has room for an answer of `Generation.max_new_tokens`.

  Returns: the traced programs, the rows, and the bytes of a device that each kind of what they hold
    takes: state, prefixes (of one batch), kept prefixes and features (the bounds of the caches).

  Raises: ConfigError when the images leave no room for a question.
  """
  programs, generation, layout = alone(config, mesh), Generation(), EngineLayout()
  config, rule = dataclasses.replace(config, model=folded(config.model)), programs.rule
  tiles, pictures = layout.tiles * programs.parts, Blank.of(config)
  features = FeatureCache(programs, pictures, Counts(), layout.feature_bytes, tiles)
  prefixes = PrefixCache(programs, features, Counts(), layout)
  rows = Rows(programs, rule, generation, layout, prefixes, config.train.batch_size)
  ready = [_ready(config, number) for number in range(rows.count)]
  rows.admit(ready, range(rows.count))
  rows.decode(np.zeros(rows.count, bool), 1, rows.count + 1)
  state, group = programs.arguments["admit"][1], programs.arguments["admit"][2]
  held = {
    "state": device_bytes(state),
    "prefixes": device_bytes(group.prefixes),
    "kept prefixes": layout.prefix_bytes,
    "features": layout.feature_bytes,
  }
  return programs, rows, held


def _ready(config: config_lib.Config, number: int) -> Ready:
  """Returns a request, cut into pieces as `infer.prompts` cuts prompts: text, images, question."""
  images, each = config.data.images_per_row, build.image_token_count(config.model)
  length, shown = config.data.row_length, images * each
  if length <= SYSTEM + shown:
    raise config_lib.ConfigError(
      f"data.row_length: {length} positions of a prompt, but {images} images of {each} tokens and "
      f"{SYSTEM} tokens of text leave no room for a question; give more than {SYSTEM + shown}"
    )
  names = tuple(f"image {number}.{i}" for i in range(images))
  request = Request("", names)
  keys = tuple((f"file {name}", 0) for name in names)
  system = PromptPiece(np.zeros(SYSTEM, np.int32), np.full(SYSTEM, -1, np.int32), (), "system", 0)
  seen = PromptPiece(
    np.zeros(shown, np.int32), np.arange(shown, dtype=np.int32), keys, f"images {number}", SYSTEM
  )
  rest = length - SYSTEM - shown
  asked = PromptPiece(
    np.zeros(rest, np.int32), np.full(rest, -1, np.int32), (), f"question {number}", SYSTEM + shown
  )
  pieces = (system, seen, asked) if images else (system, asked)
  return Ready(number, request, Prompt(pieces), "")


def _shape(array: Any) -> jax.ShapeDtypeStruct:
  found = np.asarray(array)
  return jax.ShapeDtypeStruct(found.shape, jax.dtypes.canonicalize_dtype(found.dtype))


def placed(shapes: Any, places: Any) -> Any:
  """Returns a tree of shapes with shardings, as `jit(...).lower` takes them.

  `places` is a tree of shardings, or of its upper part: a sharding holds for all below it.
  """

  def below(place: Any, shapes: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)

  return jax.tree.map(below, places, shapes, is_leaf=lambda x: isinstance(x, NamedSharding))
