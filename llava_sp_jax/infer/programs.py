"""Compiles the engine's programs, each once for its shapes, and counts them.

Shape letters:  B rows . G rows of a group . T new positions . P capacity of a prefix . M tiles
                S capacity of a row . E tiles at a time
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, Shaped

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import processes, sharding
from llava_sp_jax.infer import decode as decode_lib
from llava_sp_jax.infer import log_probabilities, prefill
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.decode import State
from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.models import build
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.parameters import Params

T = TypeVar("T")
NAMED = "infer_{}"  # names of programs in traces and in dumps of the compiler


class Programs:
  """Runs programs on the devices of one mesh. Each is compiled at its first call for its shapes."""

  def __init__(
    self,
    config: config_lib.Config,
    params: Params,
    strategy: decode_lib.Strategy,
    mesh: Mesh | None,
    counts: Counts,
  ):
    self.mesh = mesh or mesh_lib.create(config_lib.MeshConfig(), devices=jax.local_devices()[:1])
    self.several = mesh_lib.spans_processes(self.mesh)
    self.parts = math.prod(self.mesh.shape[name] for name in mesh_lib.BATCH[0])
    self._counts, self._strategy = counts, strategy
    self._table: dict[tuple[str | int, ...], Any] = {}
    platform = self.mesh.devices.flat[0].platform
    module = build.compiled_for(build.model(config.model), platform, branches=False)
    # How attention is computed in training says nothing about prompts of many lengths.
    text = module.language_model
    auto = dataclasses.replace(text.attention, name="auto")
    self._module = build.unstacked(module.clone(language_model=text.clone(attention=auto)))
    self._whole = NamedSharding(self.mesh, PartitionSpec())
    self._rows = NamedSharding(self.mesh, mesh_lib.BATCH)
    self._params = self._place(params)

  def load(self, params: Params) -> None:
    """Replaces the values of the parameters, not their shapes; compiled programs stay."""
    self._params = self._place(params)

  def _place(self, params: Params) -> Any:
    """Unstacks the layers of the parameters, and places them as `sharding` says."""
    if not params:
      return params
    places = self._places(params)
    if _on(params, self.mesh):
      return self._run(("unstack",), build.unstack, (params,), out=places)
    host = jax.tree.map(np.asarray, params)
    return jax.tree.map(mesh_lib.put, build.unstack(host), places)

  def _places(self, params: Params) -> dict[str, Any]:
    """Returns the shardings of the parameters with unstacked layers."""
    whole = sharding.shardings(params, self.mesh)
    places: dict[str, Any] = {}
    for part, tree in jax.eval_shape(build.unstack, params).items():
      one = jax.tree.map(self._of_layer, whole[part].get("layers", {}))
      places[part] = {name: whole[part].get(name, one) for name in tree}
    return places

  def _of_layer(self, place: NamedSharding) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*place.spec[1:]))

  # ---- the programs ----

  def state(self, rows: int, capacity: int) -> State:
    """Returns a state of `rows` free rows, with a cache of `capacity` positions each."""
    text = self._module.language_model

    def make() -> State:
      cache = cache_lib.allocate(
        text.layers,
        rows * self._strategy.rule.beams,
        capacity,
        text.kv_heads,
        text.head_dim,
        text.dtype,
        stacked=False,
        form=text.cache_format,
      )
      return State(cache, self._strategy.empty(rows))

    return self._run(("state", rows, capacity), make, (), out=self._state_places(rows))

  def widen(self, state: State, capacity: int) -> State:
    """Returns the state with a cache of `capacity` positions in each row, no fewer than before."""
    rows = len(state.rows.done)
    result: State = self._run(
      ("widen", rows, state.cache.capacity, capacity),
      lambda s: s._replace(cache=cache_lib.widen(s.cache, capacity)),
      (state,),
      out=self._state_places(rows),
    )
    return result

  def encode(self, tiles: Float[np.ndarray, "E H W 3"]) -> list[Float[Array, "N D"]]:
    """Encodes tiles into image tokens, one array for each tile."""

    def run(params: Any, tiles: Float[Array, "E H W 3"]) -> list[Float[Array, "N D"]]:
      found: Any = self._module.apply({"params": params}, tiles, method="encode_tiles")
      return [found[i] for i in range(len(tiles))]

    return self._run(("encode", len(tiles)), run, (self._params, self._put(tiles)), out=self._whole)

  def encode_image(self, tiles: Float[np.ndarray, "M H W 3"]) -> Float[Array, "MN D"]:
    """Encodes the tiles of one image into the tokens that its slots index, M*N (+1).

    The last one is the newline token, if the model has one.
    """

    def run(params: Any, tiles: Float[Array, "M H W 3"]) -> Any:
      return self._module.apply({"params": params}, tiles[None], method="encode_image")[0]

    arguments = (self._params, *self._same(tiles))
    result: jax.Array = self._run(("encode_image", len(tiles)), run, arguments, out=self._whole)
    return result

  def score(
    self, batch: dict[str, Shaped[np.ndarray, "B ..."]], at: Int[np.ndarray, "B K"]
  ) -> tuple[Float32[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """Scores given tokens on the device (`log_probabilities.score`).

    Args:
      batch: tokens, positions, segments, slots, targets [B, T] and images [B, M, H, W, 3].
      at: [B, K] int32, the positions that precede the scored tokens.

    Returns: their log-probabilities [B, K] float32 and whether each is the most likely one [B, K]
      bool, both on the host.
    """
    run = functools.partial(log_probabilities.score, self._module, rule=self._strategy.rule)
    key = ("score", *batch["tokens"].shape, batch["images"].shape[1], at.shape[1])
    arguments = (self._params, {k: self._put(v) for k, v in batch.items()}, self._put(at))
    result: tuple[np.ndarray, np.ndarray] = jax.device_get(
      self._run(key, run, arguments, out=self._whole)
    )
    return result

  def grow(self, group: prefill.Group, capacity: int) -> tuple[prefill.Prefix, ...]:
    """Prefills new positions of G prompts, and returns a prefix of each, with room for `capacity`.

    The keys and values of earlier positions come from `group.prefixes`.
    """
    run = functools.partial(prefill.grow, self._module, capacity=capacity)
    key = ("grow", capacity, *_shapes(group))
    out = (self._prefix_places,) * len(group.tokens)
    return self._run(key, run, (self._params, self._group(group)), out=out)

  def admit(
    self,
    state: State,
    group: prefill.Group,
    rows: Int[np.ndarray, " G"],
    settings: RowSettings,
  ) -> State:
    """Prefills G prompts into rows of the state, and chooses the first token of each.

    Args:
      state: the decode state; its buffers are donated.
      group: the last piece of each prompt, with the prefix before it.
      rows: [G] int32, the row of each prompt, on the devices that prefill it; of padding, one past
        the end (`Rows.admit`).
      settings: those of each prompt, arrays [G, ...] on the host.
    """
    run = functools.partial(prefill.admit, self._module, strategy=self._strategy)
    key = ("admit", len(state.rows.done), state.cache.capacity, *_shapes(group))
    own = RowSettings(*self._same(*settings))
    arguments = (self._params, state, self._group(group), *self._same(rows), own)
    return self._run(key, run, arguments, (1,), self._state_places(len(state.rows.done)))

  def decode(
    self, state: State, ended: Bool[np.ndarray, " B"], steps: int, until: int
  ) -> tuple[State, decode_lib.DecodeReport]:
    """Runs decoding steps until `until` rows are done, but at most `steps`.

    `ended` [B] bool marks rows that the host has ended. The buffers of `state` are donated. Returns
    the new state, and a report on the host.
    """
    run = functools.partial(decode_lib.decode, self._module, strategy=self._strategy)
    bounds = self._same(ended, np.int32(steps), np.int32(until))
    arguments = (self._params, state, *bounds)
    key = ("decode", len(state.rows.done), state.cache.capacity)
    out = (self._state_places(len(ended)), self._whole)
    state, report = self._run(key, run, arguments, (1,), out)
    return state, jax.device_get(report)

  def logged(self, state: State, row: int) -> tuple[Shaped[np.ndarray, "N ..."], ...]:
    """Returns the log-probabilities of one row, on the host (`sampling.LogProbabilities`)."""
    log = state.rows.log

    def run(log: Any, row: Int[Array, ""]) -> Any:
      return tuple(jax.lax.dynamic_index_in_dim(x, row, keepdims=False) for x in log)

    arguments = (log, *self._same(np.int32(row)))
    key = ("logged", *log.top.shape)
    result: tuple[np.ndarray, ...] = jax.device_get(self._run(key, run, arguments, out=self._whole))
    return result

  # ---- building and placing ----

  def _run(
    self,
    key: tuple[str | int, ...],
    run: Callable[..., T],
    arguments: tuple[Any, ...],
    donate: tuple[int, ...] = (),
    out: Any = None,
  ) -> T:
    """Runs the program of a name and shapes, which is compiled at the first call."""
    compiled = self._table.get(key)
    if compiled is None:
      with jax.set_mesh(self.mesh):
        jitted = self._jit(str(key[0]), run, donate, out)
        compiled = self._table[key] = jitted.lower(*arguments).compile()
      self._counts.compiles += 1
      if self.several:  # none runs before all have compiled
        processes.barrier(f"program {self._counts.compiles} is compiled")
    result: T = compiled(*arguments)
    return result

  def _jit(self, name: str, run: Callable[..., T], donate: tuple[int, ...], out: Any) -> Any:
    """Returns a program that is traced under the rules of activations. `NAMED` makes its name."""

    def traced(*values: Any) -> Any:
      with nn.logical_axis_rules(sharding.activation_rules()):
        return run(*values)

    traced.__name__ = traced.__qualname__ = NAMED.format(name)
    return jax.jit(traced, donate_argnums=donate, out_shardings=out)

  def _group(self, group: prefill.Group) -> prefill.Group:
    tokens, slots, length, start = (self._put(np.asarray(x)) for x in group[:4])
    return prefill.Group(tokens, slots, length, start, group.prefixes, group.tiles)

  def _put(self, array: Shaped[np.ndarray, "B ..."]) -> Shaped[Array, "B ..."]:
    return mesh_lib.put(array, self._rows if len(array) % self.parts == 0 else self._whole)

  def _same(self, *values: Any) -> tuple[Any, ...]:
    """Replicates values over all devices; a single process leaves that to the program."""
    return tuple(mesh_lib.put(x, self._whole) for x in values) if self.several else values

  def _heads(self) -> str | None:
    """Returns the axis of the mesh that divides the key-value heads; None if none does."""
    heads = self._module.language_model.kv_heads
    return "tensor" if heads % self.mesh.shape["tensor"] == 0 else None

  @property
  def _prefix_places(self) -> prefill.Prefix:
    """The shardings of the keys [L, K, H, P] and the values [L, K, P, H] of a prefix.

    A prefix belongs to no row, so all devices share its head width: copies in every data-parallel
    group would need memory for the prefixes of all rows.
    """
    width = self._module.language_model.head_dim
    parts = mesh_lib.BATCH[0] if width % self.parts == 0 else None
    keys: Any = NamedSharding(self.mesh, PartitionSpec(None, self._heads(), parts))
    values: Any = NamedSharding(self.mesh, PartitionSpec(None, self._heads(), None, parts))
    return prefill.Prefix(keys, values)

  def _state_places(self, rows: int) -> Any:
    text = self._module.language_model
    row = mesh_lib.BATCH[0] if rows % self.parts == 0 else None
    kept = NamedSharding(self.mesh, PartitionSpec(row, self._heads()))
    each = NamedSharding(self.mesh, PartitionSpec(row))
    layers = (kept,) * text.layers
    cache: Any = cache_lib.KVCache(layers, layers, each)  # type: ignore[arg-type]
    answers = jax.eval_shape(lambda: self._strategy.empty(rows))
    return State(cache, jax.tree.map(lambda _: each, answers))


def _on(params: Any, mesh: Mesh) -> bool:
  """Returns whether all parameters are on the mesh's devices already, as in training."""
  devices = set(mesh.devices.flat)
  return all(
    isinstance(x, jax.Array) and x.sharding.device_set == devices for x in jax.tree.leaves(params)
  )


def _shapes(group: prefill.Group) -> tuple[str | int, ...]:
  """Returns the shape of a group: G, T, P, M."""
  capacity = group.prefixes[0].values.shape[2] if group.prefixes else 0
  return (*group.tokens.shape, capacity, len(group.tiles[0]) if group.tiles else 0)
