"""Writes the three programs of inference as StableHLO, with the weights outside, for any platform.

A process with jax, or another runtime of StableHLO, runs them without this package: `encode` (tiles
to image tokens), `prefill_T` (a prompt of up to T positions to logits and a cache) and `decode` (one
token more). `programs.json` says what each reads and returns, argument by argument.

Shape letters:  E tiles . N tokens of a tile . I image tokens of a prompt . T positions of a prompt
                S capacity of the cache . L layers . K key-value heads . H head width . V vocabulary
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.convert import torch_write
from llava_sp_jax.convert.leaves import Leaf
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.places import copy_tokenizer
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.data import anyres, conversation, packing
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.llava import LlavaSP

PLATFORMS = ("cpu", "tpu", "cuda")  # each program is lowered for all of them

Arrays = dict[str, Any]  # by path or name; in programs.json in the order of their names


@dataclasses.dataclass(frozen=True)
class Program:
  """Holds a function of parameters and inputs, and the shapes of its inputs, by name.

  `parts` are the parts of the model whose parameters it reads. `outputs` names what it returns.
  """

  run: Callable[[Arrays, Arrays], Arrays]
  inputs: Arrays
  parts: tuple[str, ...]


def refuse(model: Loaded) -> None:
  """Raises FormatError where jax cannot write programs, for lack of a package."""
  if importlib.util.find_spec("flatbuffers") is None:
    raise FormatError("--format stablehlo: jax writes programs with flatbuffers; pip install it")


def write(model: Loaded, out: Path) -> None:
  """Writes programs, weights, settings and tokenizer of a model without adapters to `out`.

  The row length of its config is the capacity S of the cache, for prompt and answer together.
  """
  config = model.config
  module = _module(config.model)
  shapes = flatten_dict(jax.eval_shape(build.unstack, build.abstract(config.model)), sep="/")
  leaves = {path: model.leaves[_stacked(path)[0]] for path in shapes}
  params = {
    path: jax.ShapeDtypeStruct(shapes[path].shape, leaf.dtype) for path, leaf in leaves.items()
  }
  said: dict[str, Any] = {}
  for name, program in programs(module, config).items():
    mine = {path: x for path, x in params.items() if path.split("/")[0] in program.parts}
    exported = jax.export.export(jax.jit(program.run), platforms=PLATFORMS)(mine, program.inputs)
    (out / f"{name}.jax").write_bytes(exported.serialize())
    (out / f"{name}.mlirbc").write_bytes(exported.mlir_module_serialized)
    said[name] = {
      "parameters": sorted(mine),
      "inputs": _described(program.inputs),
      "outputs": _described(jax.eval_shape(program.run, mine, program.inputs)),
    }
  torch_write.save_safetensors(_tensors(leaves), out)
  (out / "programs.json").write_text(json.dumps(_settings(model, said), indent=2) + "\n")
  (out / "config.json").write_text(config_lib.to_json(config))
  if model.tokenizer:
    copy_tokenizer(model.tokenizer, out)


def programs(module: LlavaSP, config: config_lib.Config) -> dict[str, Program]:
  """Returns the programs of a model, by name. Rows are one; E and I are free."""
  side, room = config.model.tower.image_size, config.data.row_length
  width, text = config.model.language_model.width, ("language_model",)
  tiles, tokens = (jax.export.symbolic_shape(letter)[0] for letter in ("E", "I"))
  empty = _cache(module, room)
  held = _named(cache_lib.KVCache(empty.keys, empty.values, empty.length))
  ids = np.dtype(np.int32)
  lengths = packing.Shape(room, config.data.images_per_row, 1, config.data.bucket_lengths)
  prompts = {
    f"prefill_{length}": Program(
      lambda params, given: prefill(module, params, given, room),
      {
        "image": jax.ShapeDtypeStruct((1, tokens, width), module.language_model.dtype),
        "length": jax.ShapeDtypeStruct((1,), ids),
        "slots": jax.ShapeDtypeStruct((1, length), ids),
        "tokens": jax.ShapeDtypeStruct((1, length), ids),
      },
      text,
    )
    for length in lengths.bucket_lengths
  }
  return {
    "encode": Program(
      lambda params, given: encode(module, params, given),
      {"tiles": jax.ShapeDtypeStruct((tiles, side, side, 3), np.dtype(np.float32))},
      ("vision_tower", "projector"),
    ),
    **prompts,
    "decode": Program(
      lambda params, given: decode(module, params, given),
      {**held, "token": jax.ShapeDtypeStruct((1,), ids)},
      text,
    ),
  }


def encode(module: LlavaSP, params: Arrays, given: Arrays) -> Arrays:
  """Encodes tiles [E, H, W, 3] into their image tokens [E, N, D]."""
  apply = _apply(module, params)

  def one(tile: Any) -> Any:  # the model takes its number of tiles for a number that is known
    return apply(tile[None], method="encode_tiles")[0]

  return {"image": jax.vmap(one)(given["tiles"])}


def prefill(module: LlavaSP, params: Arrays, given: Arrays, capacity: int) -> Arrays:
  """Reads a prompt: returns the logits [1, V] of the token behind it, and its cache.

  Its first `length` positions count. `slots` says which of the image tokens [1, I, D] a position
  is; -1 for text.
  """
  apply, length = _apply(module, params), given["length"]
  index = jnp.arange(given["tokens"].shape[1])[None]
  segments = jnp.where(index < length[:, None], BRANCHES, 0)
  past = _empty(module, 0)
  hidden, new = apply(
    given["tokens"], index, segments, given["image"], given["slots"], past, method="extend"
  )
  last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
  whole = cache_lib.append(_empty(module, capacity), new, length)
  return {"logits": apply(last, method="logits"), **_named(whole)}


def decode(module: LlavaSP, params: Arrays, given: Arrays) -> Arrays:
  """Reads one token [1] behind a cache: returns logits [1, V], and the cache with the token."""
  apply = _apply(module, params)
  layers = range(module.language_model.layers)
  keys, values = (tuple(given[f"{name}_{i:03}"] for i in layers) for name in ("keys", "values"))
  cache = cache_lib.KVCache(keys, values, given["length"])
  tokens, positions = given["token"][:, None], given["length"][:, None]
  segments = jnp.full_like(tokens, BRANCHES)
  hidden, new = apply(tokens, positions, segments, None, None, cache, method="extend")
  whole = cache_lib.append(cache, new, jnp.ones_like(given["length"]))
  return {"logits": apply(hidden[:, 0], method="logits"), **_named(whole)}


def _module(config: config_lib.ModelConfig) -> LlavaSP:
  """Returns the module with what every platform computes, and a parameter for each layer."""
  module = build.unstacked(build.compiled_for(build.model(config), "any", branches=False))
  text = module.language_model
  attention = dataclasses.replace(text.attention, name="xla")
  return module.clone(language_model=text.clone(attention=attention, remat="none"))


def _apply(module: LlavaSP, params: Arrays) -> Callable[..., Any]:
  tree = unflatten_dict(params, sep="/")
  return lambda *inputs, method: module.apply({"params": tree}, *inputs, method=method)


def _empty(module: LlavaSP, capacity: int) -> cache_lib.KVCache:
  text = module.language_model
  return cache_lib.allocate(
    text.layers, 1, capacity, text.kv_heads, text.head_dim, text.dtype, stacked=False
  )


def _cache(module: LlavaSP, capacity: int) -> cache_lib.KVCache:
  """Returns the shapes of a cache."""
  result: cache_lib.KVCache = jax.eval_shape(lambda: _empty(module, capacity))
  return result


def _named(cache: cache_lib.KVCache) -> Arrays:
  """Returns the arrays of a cache by name: those of each layer, and the length."""
  parts = {"keys": cache.keys, "values": cache.values}
  layers = {f"{name}_{i:03}": x for name, part in parts.items() for i, x in enumerate(part)}
  return {"length": cache.length, **layers}


def _described(arrays: Arrays) -> list[dict[str, Any]]:
  """Returns names, shapes and dtypes of arrays, in the order in which programs take them."""
  return [
    {
      "name": name,
      "shape": [_size(n) for n in arrays[name].shape],
      "dtype": str(arrays[name].dtype),
    }
    for name in sorted(arrays)
  ]


def _size(size: Any) -> int | str:
  return size if isinstance(size, int) else str(size)


def _stacked(path: str) -> tuple[str, int | None]:
  """Returns the path of a parameter whose layers are stacked, and the layer; None without one."""
  part, name, *rest = path.split("/")
  stem, _, number = name.rpartition("_")
  if stem != "layers" or part not in ("language_model", "vision_tower"):
    return path, None
  return "/".join((part, stem, *rest)), int(number)


def _tensors(leaves: dict[str, Leaf]) -> Iterator[Tensor]:
  for path, leaf in sorted(leaves.items()):
    layer = _stacked(path)[1]
    shape = leaf.shape if layer is None else leaf.shape[1:]

    def read(leaf: Leaf = leaf, layer: int | None = layer) -> np.ndarray:
      if layer is None:
        return leaf.read()
      rest = (slice(None),) * (len(leaf.shape) - 1)
      one: np.ndarray = leaf.read((slice(layer, layer + 1), *rest))[0]
      return one

    yield Tensor(path, leaf.path, shape, leaf.dtype, read)


def _settings(model: Loaded, said: dict[str, Any]) -> dict[str, Any]:
  """Returns what programs.json holds: the programs, and what surrounds them."""
  config = model.config
  tile = anyres.Tile(*build.tile_shape(config.model))
  template = conversation.TEMPLATES[config.data.template]
  tokenizer = Tokenizer(model.tokenizer) if model.tokenizer else None
  return {
    "platforms": PLATFORMS,
    "programs": said,
    "capacity": config.data.row_length,
    "tile_tokens": tile.tokens,
    "spatial_tokens": tile.spatial,
    "image_newline": tile.newline,
    "bos_token_id": tokenizer.bos_id if tokenizer else None,
    "eos_token_ids": tokenizer.stop_ids(template.end) if tokenizer else None,
  }
