"""Answers requests by continuous batching over few compiled shapes.

The rows of one static batch decode together. A row that is done takes the next request of the
queue. Each image is encoded once, and what prompts share (system text and images) is prefilled
once.

Shape letters:  B rows . G rows of a group . S capacity of a row
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from llava_sp_jax.infer import decode
from llava_sp_jax.infer.beam import BeamSearch
from llava_sp_jax.infer.broadcast import broadcast_requests
from llava_sp_jax.infer.caches import FeatureCache, PictureCache, PrefixCache, Shared, bucket
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.detokenizer import Detokenizer
from llava_sp_jax.infer.generation import DEFAULT, Generation
from llava_sp_jax.infer.layout import ROUNDED, EngineLayout
from llava_sp_jax.infer.pretrained import Pretrained, padded_from
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.infer.requests import Answer, ImageFile, LostImageError, Prompt, Request, keys_of
from llava_sp_jax.infer.sampling import Sampler
from llava_sp_jax.infer.schedule import Ready, Schedule

__all__ = ["Answer", "Engine", "EngineLayout", "Generation", "ImageFile", "Request"]

STREAMED = 4  # tokens between two reports of the device, when text is streamed
CHECKED = 8  # tokens between two reports, when there are stop strings
UNCHECKED = 32  # tokens between two reports otherwise


_Row = tuple[int, Detokenizer]  # the index of its request, and the text so far


class Engine:
  """Answers questions with one model.

  `mesh` has the axes of `mesh.AXES`: rows are divided over data and fsdp, kernels as `sharding`
  says. The default is the first device of this process. Processes that share a mesh must call the
  same methods in the same order; all of them answer the requests of process 0. Processes without a
  common mesh have one engine each, for a part of the requests.
  """

  def __init__(
    self,
    pretrained: Pretrained,
    batch_size: int = 16,
    generation: Generation = DEFAULT,
    mesh: Mesh | None = None,
    layout: EngineLayout = ROUNDED,
  ):
    """Places the parameters. Raises: ValueError for a `batch_size` below 1.

    `batch_size` is how many answers are decoded together, rounded up to a multiple of data * fsdp.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    config = pretrained.config
    self.counts = Counts()
    self.pretrained, self._generation, self._layout = pretrained, generation, layout
    self._tokenizer, self._threads = pretrained.tokenizer, max(1, config.data.threads)
    # Dynamic rotary positions depend on the length of the whole prompt.
    share = layout.share and config.model.language_model.rope_scaling.kind != "dynamic"
    self._prompts = Prompts(config, pretrained.tokenizer, PictureCache.of(config), share)
    self._longest = config.model.language_model.max_positions
    rule = decode.StopRule(
      self._prompts.stop_ids,
      generation.max_new_tokens,
      Sampler.of(generation),
      generation.num_beams,
      padded_from(pretrained),
    )
    strategy: decode.Strategy = BeamSearch(rule) if rule.beams > 1 else decode.Sampling(rule)
    seed = generation.seed
    self._programs = Programs(config, pretrained.params, strategy, seed, mesh, self.counts)
    parts = self._programs.parts
    self._rows = bucket(batch_size, parts)
    sizes = [parts]
    while sizes[-1] * layout.groups < self._rows:
      sizes.append(sizes[-1] * layout.groups)
    self._groups = sorted({*sizes, self._rows})
    self.forget()
    self._state: decode.State | None = None
    self._widest = 0  # S of the widest state so far
    self._busy = False

  # ---- what callers use ----

  @property
  def generation(self) -> Generation:
    """The settings of all answers, with which the engine was made."""
    return self._generation

  @property
  def programs(self) -> Programs:
    """The compiled programs, which also score answers and encode images."""
    return self._programs

  def load(self, pretrained: Pretrained) -> None:
    """Replaces the parameters by others of the same model, without compiling again."""
    self.pretrained = pretrained
    self._programs.load(pretrained.params)
    self.forget()

  def forget(self) -> None:
    """Empties the caches of pixels, image features, and keys and values of prefixes."""
    layout, programs, pictures = self._layout, self._programs, self._prompts.pictures
    pictures.forget()
    at_once = layout.tiles * programs.parts
    self._features = FeatureCache(programs, pictures, self.counts, layout.feature_bytes, at_once)
    self._prefixes = PrefixCache(
      programs, self._features, self.counts, layout.prefix_bytes, layout.prefix
    )

  def warm_up(self, requests: Iterable[Request]) -> None:
    """Compiles the programs for requests as long as these, in groups of every size; answers none.

    Afterwards, answering such requests in any order and number compiles nothing.
    """
    kinds: dict[tuple[int, ...], Ready] = {}  # by what admitting them is compiled for
    shared: dict[tuple[int, ...], Shared] = {}  # and growing their prefixes
    starts: dict[tuple[int, int], int] = collections.defaultdict(int)  # the longest of a group
    lengths: dict[tuple[int, int], int] = collections.defaultdict(int)
    capacity = 0
    with self._running(requests) as schedule:
      while (ready := schedule.take()) is not None:
        if ready.prompt is None or self._too_long(ready.prompt):
          continue
        *before, last = ready.prompt.pieces
        group, length = _shape(self, ready), bucket(len(last.tokens), self._layout.suffix)
        kinds.setdefault((*group, length), ready)
        for count in range(1, len(before) + 1):
          pieces = tuple(before[:count])
          shared.setdefault(self._prefixes.shape(pieces), (ready.request, pieces))
        starts[group] = max(starts[group], last.start)
        lengths[group] = max(lengths[group], length)
        capacity = max(capacity, self._capacity(ready.prompt, length))
      if not kinds:
        return
      # The prompt with the longest prefix may stand beside the one with the longest question.
      reach = max(starts[group] + lengths[group] for group in starts)
      self._reserve(max(capacity, bucket(reach, self._layout.capacity)))
      with contextlib.suppress(LostImageError):  # answering says so
        self._prefixes.of(list(shared.values()))
      admitted = self.counts.admitted
      for ready in kinds.values():
        for size in self._groups:
          with contextlib.suppress(LostImageError):
            self._admit([ready] * size, list(range(size)))
      self.counts.admitted = admitted
      assert self._state is not None
      self._programs.decode(self._state, np.zeros(self._rows, bool), 1, self._rows + 1)

  def answer(self, requests: Iterable[Request]) -> Generator[Answer, None, None]:
    """Yields answers in the order of the requests. If there is none, its `error` says why.

    Raises: RuntimeError while another iterator of this engine is open, here and below.
    """
    early: dict[int, Answer] = {}
    following = 0
    with contextlib.closing(self.as_ready(requests)) as ready:
      for index, answer in ready:
        early[index] = answer
        while following in early:
          yield early.pop(following)
          following += 1

  def as_ready(self, requests: Iterable[Request]) -> Generator[tuple[int, Answer], None, None]:
    """Yields (index of a request, answer) once it is done; takes requests when there is room."""
    every = CHECKED if self._generation.stop else UNCHECKED
    with self._running(requests) as schedule:
      for index, text in self._run(schedule, every):
        if text.finished:
          yield index, text.answer()

  def stream(self, request: Request) -> Iterator[str]:
    """Yields one answer in parts while it is decoded. Raises: ValueError if there is no answer."""
    said = ""
    with self._running([request]) as schedule:
      for _, text in self._run(schedule, STREAMED):
        if text.finished and text.error:
          raise ValueError(text.error)
        settled = text.settled()
        if settled[len(said) :]:
          yield settled[len(said) :]
          said = settled

  # ---- continuous batching ----

  @contextlib.contextmanager
  def _running(self, requests: Iterable[Request]) -> Iterator[Schedule]:
    """Reserves the rows for one run. Raises: RuntimeError while another run has them."""
    if self._busy:
      raise RuntimeError(
        "this engine is answering already: end or close that iterator first, or make a second engine"
      )
    self._busy = True
    requests = broadcast_requests(requests) if self._programs.several else requests
    schedule = Schedule(requests, self._prompts, self._threads, self._layout.window, 2 * self._rows)
    try:
      yield schedule
    finally:
      schedule.close()
      self._state, self._busy = None, False

  def _run(self, schedule: Schedule, every: int) -> Iterator[tuple[int, Detokenizer]]:
    """Yields every row with its text so far, after every report of the device."""
    rows: dict[int, _Row] = {}
    ended = np.zeros(self._rows, bool)
    while True:
      yield from self._refill(schedule, rows, ended)
      if not rows:
        return
      free = self._rows - len(rows)
      wanted = self._rows if not schedule.more else free + max(1, self._rows // 4)
      assert self._state is not None
      self._state, report = self._programs.decode(
        self._state, ended, every, min(wanted, self._rows)
      )
      _, made, done, ids, margin = report
      self.counts.decode_steps += int(report.steps)
      for number, (index, text) in list(rows.items()):
        text.extend(ids[number, : made[number]], bool(done[number]), float(margin[number]))
        if text.finished:
          del rows[number]
          ended[number] = True
          self.counts.requests += 1
          self.counts.new_tokens += len(text.ids)
        yield index, text

  def _refill(
    self, schedule: Schedule, rows: dict[int, _Row], ended: Bool[np.ndarray, " B"]
  ) -> Iterator[tuple[int, Detokenizer]]:
    """Admits waiting requests into free rows, in groups of equal shape; yields those with errors."""
    while len(rows) < self._rows:
      free = [i for i in range(self._rows) if i not in rows]
      group: list[Ready] = []
      room = max((g for g in self._groups if g <= len(free)), default=len(free))
      while len(group) < room and (front := schedule.peek()) is not None:
        error = front.error or self._too_long(front.prompt)
        if not error and group and _shape(self, front) != _shape(self, group[0]):
          break
        schedule.take()
        self.counts.images_asked += len(front.request.images)
        if error:
          yield front.number, self._failed(error)
        else:
          group.append(front)
      if not group:
        return
      admitted, lost = self._admit_readable(group, free)
      for number, ready in zip(free, admitted, strict=False):
        rows[number] = ready.number, self._text()
        ended[number] = False
      for ready, error in lost:
        yield ready.number, self._failed(error)

  def _admit_readable(
    self, group: list[Ready], rows: list[int]
  ) -> tuple[list[Ready], list[tuple[Ready, str]]]:
    """Admits a group into the first of `rows`, except requests whose image can no longer be read.

    Returns: the admitted requests, and the others with the reason.
    """
    lost: list[tuple[Ready, str]] = []
    while group:
      try:
        self._admit(group, rows[: len(group)])
        break
      except LostImageError as error:
        asking = [error.key in keys_of(ready.request) for ready in group]
        lost += [(r, str(error)) for r, asks in zip(group, asking, strict=True) if asks]
        group = [r for r, asks in zip(group, asking, strict=True) if not asks]
    return group, lost

  def _failed(self, error: str) -> Detokenizer:
    self.counts.requests += 1
    self.counts.errors += 1
    return self._text(error)

  def _text(self, error: str = "") -> Detokenizer:
    return Detokenizer(self._tokenizer, self._generation.stop, error)

  def _too_long(self, prompt: Prompt | None) -> str:
    if prompt is None:
      return ""
    length, new = prompt.length, self._generation.max_new_tokens
    if length + new <= self._longest:
      return ""
    return (
      f"the prompt has {length} positions, which with {new} new tokens are more than the "
      f"model's {self._longest}"
    )

  def _admit(self, group: list[Ready], rows: list[int]) -> None:
    prompts = [ready.prompt for ready in group if ready.prompt]
    requests = [ready.request for ready in group]
    size = next(g for g in self._groups if g >= len(group))
    order = [*range(len(group)), *itertools.repeat(0, size - len(group))]
    before = self._prefixes.of([(r, p.pieces[:-1]) for r, p in zip(requests, prompts, strict=True)])
    length = bucket(max(len(p.pieces[-1].tokens) for p in prompts), self._layout.suffix)
    packed = self._prefixes.group(
      [requests[i] for i in order],
      [prompts[i].pieces[-1] for i in order],
      [before[i] for i in order],
      length,
    )
    self._reserve(max(self._capacity(p, length) for p in prompts))
    assert self._state is not None
    self._state = self._programs.admit(
      self._state,
      packed,
      np.asarray([rows[i] for i in order], np.int32),
      np.asarray([group[i].drawn_by for i in order], np.int32),
    )
    self.counts.admitted += len(group)

  def _capacity(self, prompt: Prompt, length: int) -> int:
    """Returns the capacity S that a prompt needs when its last piece is padded to `length`."""
    shared = self._prefixes.capacity(prompt.pieces[:-1])
    last = prompt.pieces[-1]
    needed = max(shared, last.start + max(length, len(last.tokens)))
    return bucket(
      max(needed, prompt.length + self._generation.max_new_tokens), self._layout.capacity
    )

  def _reserve(self, capacity: int) -> None:
    if self._state is None:
      self._state = self._programs.state(self._rows, max(capacity, self._widest))
    elif self._state.cache.capacity < capacity:
      self._state = self._programs.widen(self._state, capacity)
    self._widest = max(self._widest, capacity)


def _shape(engine: Engine, ready: Ready) -> tuple[int, int]:
  """Returns what the prompts of a group have in common: P before the last piece, tiles in it."""
  assert ready.prompt is not None
  *before, last = ready.prompt.pieces
  return engine._prefixes.capacity(before), len(last.tiles)
