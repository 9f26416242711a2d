"""Predicts how long the questions of benchmarks take on chips that are absent, and where time goes.

`plan.questions` counts how often each program runs. The sizes that have most of the work are
compiled for the chips; the time of another size is that of the nearest one times their work.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import explain, report, traffic
from llava_sp_jax.plan.questions import Counted, Key
from llava_sp_jax.plan.topologies import Topology

COVERED = 0.95  # of the work of each program, whose sizes are compiled
MOST = 4  # sizes of each program that are compiled


@dataclasses.dataclass(frozen=True)
class Predicted:
  """Holds the seconds of a benchmark on the devices, by program."""

  counted: Counted
  programs: dict[str, float]

  @property
  def seconds(self) -> float:
    """Returns the seconds of all programs together."""
    return sum(self.programs.values())


def predict(
  config: config_lib.Config,
  topology: Topology,
  counted: Mapping[str, Counted],
  told: Callable[[str], None] = print,
) -> tuple[dict[str, Predicted], dict[Key, float]]:
  """Predicts the seconds of benchmarks, all by one process on the chips of `topology`.

  Args:
    config: the model, with the mesh of a process.
    topology: the chips of a process.
    counted: name of a benchmark -> what an engine would run (`questions.counted`).
    told: called with a line for each size that is compiled.

  Returns: the prediction of each benchmark, and the seconds of each size that was compiled.
  Raises: PlanError when a program cannot be compiled or does not fit, or the rates of the chips are
    unknown.
  """
  if not topology.chip.speed:
    raise compile_lib.PlanError(f"--topology {topology.name}: no speed is known of these chips")
  work = Work(config)
  seconds: dict[Key, float] = {}
  for key in chosen([c.runs for c in counted.values()], work):
    found = compile_lib.compile_key(config, topology, key)
    made = report.make(config, topology, compile_lib.EVAL, {str(key[0]): found})
    if not made.fits:
      raise explain.refusal(made)
    one = made.programs[str(key[0])]
    seconds[key] = one.turn if key[0] == report.LOOP else one.seconds
    told(f"{' '.join(map(str, key))}: {seconds[key]:.6f} s, {found.seconds:.0f} s to compile")
  results = {}
  for name, one_task in counted.items():
    parts: dict[str, float] = collections.defaultdict(float)
    for key, count in one_task.runs.items():
      parts[str(key[0])] += count * _seconds(key, seconds, work)
    results[name] = Predicted(one_task, dict(parts))
  return results, seconds


class Work:
  """Measures the work of a program by its key, in units that only sizes of one program share."""

  def __init__(self, config: config_lib.Config):
    self._traffic = traffic.of(config.model)
    self._rows: dict[str, Callable[..., float]] = {
      "encode": lambda tiles: tiles,
      "grow": lambda capacity, rows, length, before, tiles: rows * length,
      "admit": lambda all_rows, capacity, rows, length, before, tiles: rows * length,
      "decode": self._traffic.step,
    }

  def __call__(self, key: Key) -> float:
    """Returns positions that are computed; of decode, the bytes that a step reads."""
    return float(self._rows[str(key[0])](*key[1:]))


def chosen(runs: list[dict[Key, int]], work: Callable[[Key], float]) -> list[Key]:
  """Returns the sizes to compile: of each program those with COVERED of its work, at most MOST."""
  total: collections.Counter[Key] = collections.Counter()
  for one in runs:
    total.update(one)
  by_name: dict[str, list[Key]] = collections.defaultdict(list)
  for key in sorted(total, key=lambda k: -total[k] * work(k)):
    by_name[str(key[0])].append(key)
  result = []
  for keys in by_name.values():
    whole, so_far = sum(total[k] * work(k) for k in keys), 0.0
    for key in keys[:MOST]:
      if so_far and so_far >= COVERED * whole:
        break
      result.append(key)
      so_far += total[key] * work(key)
  return result


def _seconds(key: Key, known: Mapping[Key, float], work: Callable[[Key], float]) -> float:
  """Returns the seconds of a size, from those of the nearest one of the same program."""
  if key in known:
    return known[key]
  alike = [k for k in known if k[0] == key[0]]
  nearest = min(alike, key=lambda k: abs(work(k) - work(key)))
  return known[nearest] * work(key) / work(nearest)
