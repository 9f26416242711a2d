"""Counts the programs that an engine would run to answer the questions of benchmarks.

The engine's own loop, schedule and caches run, on shapes. A row is done after as many tokens as its
answer is assumed to have. `eval.absent` does so for benchmarks.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import decode as picture_lib
from llava_sp_jax.data import example
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer import decode
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.decode import DecodeReport, State
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.layout import ROUNDED
from llava_sp_jax.infer.prefill import Group
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.requests import ImageFile, Request
from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.plan import answers

Key = tuple[str | int, ...]  # of a program, as in `infer.programs.Programs`


@dataclasses.dataclass(frozen=True)
class Counted:
  """Holds what an engine would do for some questions."""

  questions: int
  failed: int  # questions without an answer, e.g. because their prompt is too long
  images: int  # distinct ones
  tokens: int  # of all answers
  runs: dict[Key, int]  # how often each program runs; of decode, its steps


class CountedPrograms(answers.AbsentPrograms):
  """Counts programs; a row is done after `length(number of its request)` tokens."""

  def __init__(
    self,
    config: config_lib.Config,
    strategy: decode.Strategy,
    mesh: Mesh,
    length: Callable[[int], int],
  ):
    super().__init__(config, strategy, mesh)
    self._length = length
    self._made = self._wanted = np.zeros(0, np.int32)
    self.steps: collections.Counter[Key] = collections.Counter()

  def admit(self, state: State, group: Group, rows: np.ndarray, settings: RowSettings) -> State:
    """Counts a prefill, and notes how many tokens the answers will have."""
    count = len(state.rows.done)
    if len(self._made) != count:
      self._made, self._wanted = np.zeros(count, np.int32), np.zeros(count, np.int32)
    own = rows < count  # the others are padding
    self._made[rows[own]] = 1
    self._wanted[rows[own]] = [self._length(int(number)) for number in settings.number[own]]
    return super().admit(state, group, rows, settings)

  def decode(
    self, state: State, ended: Bool[np.ndarray, " B"], steps: int, until: int
  ) -> tuple[State, DecodeReport]:
    """Counts the steps until `until` rows are done, at most `steps`."""
    state, _ = super().decode(state, ended, steps, until)
    self._wanted[ended] = 0
    going = self._made < self._wanted
    taken = 0
    while taken < steps and np.sum(~going) < until:
      self._made[going] += 1
      taken += 1
      going = self._made < self._wanted
    self.steps[self.last["decode"]] += taken
    made = np.minimum(self._made, self._strategy.rule.max_new_tokens)
    ids = np.zeros((len(made), int(made.max(initial=0))), np.int32)
    return state, DecodeReport(taken, made, ~going, ids, np.zeros(len(made)))


class Unread(answers.Blank):
  """Stands for pictures of which only the size is read."""

  def plan(self, key: str, picture: ImageFile) -> example.TokenPlan:
    """Returns the tiles of a picture and the order of their tokens, from its size."""
    if not isinstance(picture, Path):
      return self._reader.plan((self._reader.tile.size,) * 2)
    return self._reader.plan(picture_lib.read_size(picture))


class CountedEngine(Engine):
  """Counts what answering would run; `length(number)` is the tokens of the answer to a request."""

  def __init__(
    self,
    config: config_lib.Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    batch_size: int,
    generation: Generation,
    length: Callable[[int], int],
  ):
    self._length = length
    layers = config.model.language_model.layers
    # One layer has the schedule of all of them, if prefixes take the same share of their cache.
    layout = dataclasses.replace(ROUNDED, prefix_bytes=ROUNDED.prefix_bytes // layers)
    super().__init__(Pretrained(_thin(config), {}, tokenizer), batch_size, generation, mesh, layout)

  def _make_programs(self, strategy: decode.Strategy, mesh: Mesh | None) -> CountedPrograms:
    assert mesh is not None
    return CountedPrograms(self.pretrained.config, strategy, mesh, self._length)

  def _make_pictures(self, config: config_lib.Config, most: int) -> PictureCache:
    return Unread.of(config, most)

  def counted(self, requests: Sequence[Request]) -> Counted:
    """Returns what answering `requests` would run."""
    failed = sum(bool(answer.error) for _, answer in self.as_ready(iter(requests)))
    programs = self._programs
    assert isinstance(programs, CountedPrograms)
    runs = {k: n for k, n in programs.runs_by_key().items() if k[0] in answers.ENTRIES}
    counts: Counts = self.counts
    return Counted(
      len(requests), failed, counts.distinct_images, counts.new_tokens, runs | dict(programs.steps)
    )


def _thin(config: config_lib.Config) -> config_lib.Config:
  model = answers.folded(config.model)
  text = dataclasses.replace(model.language_model, layers=1)
  return dataclasses.replace(config, model=dataclasses.replace(model, language_model=text))
