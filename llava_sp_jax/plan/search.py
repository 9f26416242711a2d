"""Searches for the fastest plan that fits: mesh, base placement, recomputation, micro-batches.

Every candidate is compiled, so a budget limits their number. The search starts at the config
itself. While it does not fit, the search sets one axis after another to the value with the least
memory. Then it climbs greedily, changing one axis or two at a time, and skips candidates that need
at least as much memory on every axis as one that did not fit.
"""

from __future__ import annotations

import dataclasses
import math
import pprint
from collections.abc import Callable, Iterator
from typing import Any

from llava_sp_jax import config as config_lib

Values = tuple[dict[str, Any], ...]  # alternatives, each {key below config: value}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Holds the result of compiling a candidate."""

  fits: bool
  seconds: float  # of a step; nan if they are not predicted
  hbm: int  # bytes on a device; 0 if it could not be compiled for a reason other than memory


@dataclasses.dataclass(frozen=True)
class Tried:
  """Holds a candidate that was compiled, and its difference from the one before."""

  config: config_lib.Config
  change: str
  outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Axis:
  """Holds the alternatives of one setting, from the least memory to the most."""

  name: str
  values: Values


def axes(config: config_lib.Config, devices: int, slices: int = 1) -> tuple[Axis, ...]:
  """Returns the axes of the search for so many devices, in the order in which they save memory.

  `slices` is the number of slices that the devices are in, which divides the data axis of a mesh.
  """
  from llava_sp_jax.distributed import sharding  # imports jax, so not at the top
  from llava_sp_jax.models import remat

  rows = config.train.batch_size
  return (
    Axis(
      "micro-batches", tuple({"train.accumulate": a} for a in range(rows, 0, -1) if rows % a == 0)
    ),
    Axis("recomputation", tuple({"model.remat": name} for name in remat.POLICIES)),
    Axis("base", tuple({"mesh.base": name} for name in sharding.PRESETS)),
    Axis("mesh", _with_own(tuple(_meshes(devices, slices)), config, devices, slices)),
  )


def _with_own(meshes: Values, config: config_lib.Config, devices: int, slices: int) -> Values:
  """Returns `meshes`, and among them that of the config, before the first with a smaller tensor."""
  sizes = config.mesh
  fsdp = devices // (sizes.data * sizes.tensor) if sizes.fsdp == -1 else sizes.fsdp
  own = {"mesh.data": sizes.data, "mesh.fsdp": fsdp, "mesh.tensor": sizes.tensor}
  possible = sizes.data * fsdp * sizes.tensor == devices and sizes.data % slices == 0
  if own in meshes or not possible:
    return meshes
  before = [mesh for mesh in meshes if mesh["mesh.tensor"] >= sizes.tensor]
  return (*before, own, *meshes[len(before) :])


def _meshes(devices: int, slices: int) -> Iterator[dict[str, Any]]:
  each = devices // slices
  for tensor in (8, 4, 2):
    if each % tensor == 0:
      yield {"mesh.data": slices, "mesh.fsdp": each // tensor, "mesh.tensor": tensor}
  fsdp = each
  while fsdp >= 1:
    yield {"mesh.data": devices // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": 1}
    if fsdp % 4:
      break
    fsdp //= 4


def search(
  config: config_lib.Config,
  devices: int,
  budget: int,
  evaluate: Callable[[config_lib.Config], Outcome],
  slices: int = 1,
) -> list[Tried]:
  """Returns all candidates that were compiled, at most `budget`, in order.

  Args:
    config: the config to start from.
    devices: the number of devices.
    budget: the most candidates.
    evaluate: compiles a candidate, and says whether it fits and how fast it is.
    slices: the number of slices that the devices are in.
  """
  walk = _Walk(config, axes(config, devices, slices), budget, evaluate)
  current = walk.start()
  for axis in range(len(walk.axes)):
    if walk.fits(current) or walk.spent:
      break
    current = walk.leanest(current, axis)
  if not walk.fits(current):
    return walk.tried
  improved = True
  while improved and not walk.spent:
    improved = False
    for neighbor in walk.neighbors(current):
      if walk.spent:
        break
      if walk.better(neighbor, current):
        current, improved = neighbor, True
        break
  return walk.tried


def best(tried: list[Tried]) -> Tried | None:
  """Returns the candidate with the shortest step among those that fit; None if none does."""
  fitting = [t for t in tried if t.outcome.fits]
  return min(fitting, key=lambda t: t.outcome.seconds, default=None)


Point = tuple[int, ...]  # for each axis an index of its values


class _Walk:
  """Holds the candidates of a search that were compiled, and proposes new ones."""

  def __init__(
    self,
    config: config_lib.Config,
    axes: tuple[Axis, ...],
    budget: int,
    evaluate: Callable[[config_lib.Config], Outcome],
  ):
    self.axes, self.tried = axes, list[Tried]()
    self._config, self._budget, self._evaluate = config, budget, evaluate
    self._known: dict[Point, Outcome] = {}
    rows, sizes = config.train.batch_size, _flat(config)
    devices = max(math.prod(v.values()) for v in axes[3].values)
    if sizes["mesh.fsdp"] == -1:
      sizes["mesh.fsdp"] = devices // (sizes["mesh.data"] * sizes["mesh.tensor"])
    self._rows, self._from = rows, sizes

  @property
  def spent(self) -> bool:
    """Returns whether the budget is used up."""
    return len(self.tried) >= self._budget

  def start(self) -> Point:
    """Compiles the config's own point; a value that an axis lacks becomes that of least memory."""
    point = tuple(
      next((i for i, v in enumerate(axis.values) if v.items() <= self._from.items()), 0)
      for axis in self.axes
    )
    point = point if self._divides(point) else self._fewest(point)
    self.outcome(point, "as it is")
    return point

  def fits(self, point: Point) -> bool:
    """Returns whether a point was compiled and fits."""
    return point in self._known and self._known[point].fits

  def leanest(self, point: Point, axis: int) -> Point:
    """Moves an axis to its value of least memory at which the rows divide, and compiles the point.

    Returns `point` itself if there is no such value up to its own.
    """
    for index in range(point[axis] + 1):
      moved = (*point[:axis], index, *point[axis + 1 :])
      if self._divides(moved):
        self.outcome(moved, f"least {self.axes[axis].name}")
        return moved
    return point

  def neighbors(self, point: Point) -> Iterator[Point]:
    """Yields the neighbors of a point in the order in which they are tried.

    These are single steps along an axis, to more memory first; then a step up on one axis and down
    on another; then two steps up, over a value that is neither small nor fast.

    Leaves out points that were compiled, at which the rows do not divide, or that cannot fit.
    """
    count = range(len(self.axes))
    steps = [((axis, step),) for step in (1, -1) for axis in count]
    trades = [((up, 1), (down, -1)) for up in count for down in count if up != down]
    jumps = [((axis, 2),) for axis in count]
    for moves in (*steps, *trades, *jumps):
      moved: Point | None = point
      for axis, step in moves:
        moved = self._step(moved, axis, step) if moved else None
      if moved and moved not in self._known and not self._hopeless(moved):
        yield moved

  def _step(self, point: Point, axis: int, step: int) -> Point | None:
    """Returns the next point along an axis at which the rows divide; None at the axis' end."""
    index = point[axis] + step
    while 0 <= index < len(self.axes[axis].values):
      moved = (*point[:axis], index, *point[axis + 1 :])
      if self._divides(moved):
        return moved
      index += step
    return None

  def better(self, point: Point, than: Point) -> bool:
    """Compiles a point, and returns whether it fits and is faster than the point `than`."""
    names = [a.name for a, i, j in zip(self.axes, point, than, strict=True) if i != j]
    outcome = self.outcome(point, ", ".join(names))
    return outcome.fits and outcome.seconds < self._known[than].seconds

  def outcome(self, point: Point, change: str) -> Outcome:
    """Returns the outcome of a point; compiles it if that was not done yet."""
    if point not in self._known:
      config = self._at(point)
      self._known[point] = self._evaluate(config)
      self.tried.append(Tried(config, change, self._known[point]))
    return self._known[point]

  def _hopeless(self, point: Point) -> bool:
    """Returns whether a point needs at least as much memory on all axes as one that did not fit."""
    return any(
      not outcome.fits and outcome.hbm and all(a >= b for a, b in zip(point, other, strict=True))
      for other, outcome in self._known.items()
    )

  def _values(self, point: Point) -> dict[str, Any]:
    merged = dict(self._from)
    for axis, index in zip(self.axes, point, strict=True):
      merged |= axis.values[index]
    return merged

  def _divides(self, point: Point) -> bool:
    values = self._values(point)
    parts = values["mesh.data"] * values["mesh.fsdp"] * values["train.accumulate"]
    result: bool = self._rows % parts == 0
    return result

  def _fewest(self, point: Point) -> Point:
    """Returns a point with the most micro-batches at which the rows divide, or the point itself."""
    choices = [(i, *point[1:]) for i in range(len(self.axes[0].values))]
    return next((p for p in choices if self._divides(p)), point)

  def _at(self, point: Point) -> config_lib.Config:
    texts = {f"config.{key}": str(value) for key, value in self._values(point).items()}
    return config_lib.override(self._config, texts)


def _flat(config: config_lib.Config) -> dict[str, Any]:
  """Returns the keys that the axes vary, with their values in a config."""
  mesh = config.mesh
  return {
    "train.accumulate": config.train.accumulate,
    "model.remat": config.model.remat,
    "mesh.base": mesh.base,
    "mesh.data": mesh.data,
    "mesh.fsdp": mesh.fsdp,
    "mesh.tensor": mesh.tensor,
  }


def recipe(config: config_lib.Config, origin: str) -> str:
  """Returns the text of a recipe with all values of a config, for `llava-sp train --config`.

  `origin` becomes its docstring.
  """
  values = pprint.pformat(config_lib.to_dict(config), indent=1, width=98, sort_dicts=False)
  return (
    f'"""{origin}"""\n\nfrom ml_collections import ConfigDict\n\n\n'
    f"def get_config() -> ConfigDict:\n  return ConfigDict({values})  # fmt: skip\n"
  )
