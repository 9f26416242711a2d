"""Answers requests by continuous batching over few compiled shapes.

The rows of one static batch decode together. A row that is done takes the next request of the
queue. Each image is encoded once, and what prompts share (system text and images) is prefilled
once.

Shape letters:  B rows
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import traceback
from collections.abc import Collection, Generator, Iterable, Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from llava_sp_jax import config as config_lib
from llava_sp_jax.infer import decode
from llava_sp_jax.infer.beam import BeamSearch
from llava_sp_jax.infer.broadcast import broadcast_requests
from llava_sp_jax.infer.caches import FeatureCache, PictureCache, PrefixCache
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.detokenizer import Detokenizer
from llava_sp_jax.infer.generation import DEFAULT, Generation
from llava_sp_jax.infer.layout import ROUNDED, EngineLayout
from llava_sp_jax.infer.pretrained import Pretrained, padded_from
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.infer.requests import Answer, ImageFile, LostImageError, Prompt, Request, keys_of
from llava_sp_jax.infer.rows import Rows
from llava_sp_jax.infer.schedule import Ready, Schedule, Source
from llava_sp_jax.infer.warm_up import warm_up

__all__ = ["Answer", "Engine", "EngineLayout", "Generation", "ImageFile", "Request"]

EVERY = 1  # tokens between two reports of the device, when requests come and go at any time
STREAMED = 4  # tokens between two reports, when a text is streamed
CHECKED = 8  # tokens between two reports at most, when there are stop strings
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
    config, self.counts = pretrained.config, Counts()
    text = config.model.language_model
    most = min(layout.positions or text.max_positions, text.max_positions)
    layout = dataclasses.replace(layout, positions=most)
    self.pretrained, self._generation, self._layout = pretrained, generation, layout
    self._tokenizer, self._threads = pretrained.tokenizer, max(1, config.data.threads)
    # Dynamic rotary positions depend on the length of the whole prompt.
    share = layout.share and text.rope_scaling.kind != "dynamic"
    pictures = self._make_pictures(config, layout.pictures)
    self._prompts = Prompts(config, pretrained.tokenizer, pictures, share)
    logged = (layout.log_probabilities, generation.log_probabilities)
    self._rule = decode.StopRule(
      self._prompts.stop_ids,
      max(layout.new_tokens, generation.max_new_tokens),
      text.vocab_size,
      generation.num_beams,
      padded_from(pretrained),
      max((count for count in logged if count is not None), default=None),
    )
    beams = self._rule.beams > 1
    strategy: decode.Strategy = BeamSearch(self._rule) if beams else decode.Sampling(self._rule)
    self._programs = self._make_programs(strategy, mesh)
    self._rows = Rows(
      self._programs, self._rule, generation, layout, self._empty_caches(), batch_size
    )
    self._busy = False

  # What a plan replaces, which answers nothing (`plan.questions`).

  def _make_pictures(self, config: config_lib.Config, most: int) -> PictureCache:
    return PictureCache.of(config, most)

  def _make_programs(self, strategy: decode.Strategy, mesh: Mesh | None) -> Programs:
    model = self.pretrained
    return Programs(model.config, model.params, strategy, mesh, self.counts)

  # ---- what callers use ----

  @property
  def generation(self) -> Generation:
    """The settings of all answers, with which the engine was made."""
    return self._generation

  @property
  def programs(self) -> Programs:
    """The compiled programs, which also score answers and encode images."""
    return self._programs

  @property
  def positions(self) -> int:
    """The most positions of a prompt and its answer together."""
    return self._layout.positions

  @property
  def threads(self) -> int:
    """The number of threads that make prompts."""
    return self._threads

  def load(self, pretrained: Pretrained) -> None:
    """Replaces the parameters by others of the same model, without compiling again."""
    self.pretrained = pretrained
    self._programs.load(pretrained.params)
    self.forget()

  def forget(self) -> None:
    """Empties the caches of pixels, image features, and keys and values of prefixes."""
    self._rows.prefixes = self._empty_caches()

  def _empty_caches(self) -> PrefixCache:
    layout, programs, pictures = self._layout, self._programs, self._prompts.pictures
    pictures.forget()
    tiles = layout.tiles * programs.parts
    features = FeatureCache(programs, pictures, self.counts, layout.feature_bytes, tiles)
    return PrefixCache(programs, features, self.counts, layout)

  def prompt(self, request: Request) -> Prompt:
    """Makes the prompt of a request, as answering does; any thread may call it.

    Raises: SampleError for an image that cannot be read, or a text that the tokenizer refuses.
    """
    return self._prompts(request)

  def warm_up(self, requests: Iterable[Request]) -> None:
    """Compiles the programs for requests as long as these, in groups of every size; answers none.

    Afterwards, answering such requests in any order and number, with any settings, compiles
    nothing.
    """
    with self._scheduled(requests) as schedule:
      admitted = self.counts.admitted
      asked = iter(schedule.take, None)
      warm_up(
        self._rows, (r for r in asked if r.prompt and not self._rows.refused(r)), self._layout
      )
      self.counts.admitted = admitted

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
    with self._scheduled(requests) as schedule:
      for index, text in self._run(schedule, UNCHECKED):
        if text.finished:
          yield index, text.answer()

  def stream(self, request: Request) -> Iterator[str]:
    """Yields one answer in parts while it is decoded. Raises: ValueError if there is no answer."""
    said = ""
    with self._scheduled([request]) as schedule:
      for _, text in self._run(schedule, STREAMED):
        if text.finished and text.error:
          raise ValueError(text.error)
        settled = text.settled()
        if settled[len(said) :]:
          yield settled[len(said) :]
          said = settled

  def serve(self, source: Source) -> Generator[tuple[int, Detokenizer], None, None]:
    """Answers requests that arrive at any time, until `source` ends.

    Yields (number of a request, its text so far) after every decode step. Between two steps, it
    frees the rows of cancelled requests, and admits at most one group of others.
    """
    with self._owned():
      yield from self._run(source, EVERY, groups=1)

  # ---- continuous batching ----

  @contextlib.contextmanager
  def _owned(self) -> Iterator[None]:
    """Reserves the rows for one run. Raises: RuntimeError while another run has them."""
    if self._busy:
      raise RuntimeError(
        "this engine is answering already: end or close that iterator first, or make a second engine"
      )
    self._busy = True
    try:
      yield
    finally:
      self._rows.clear()
      self._busy = False

  @contextlib.contextmanager
  def _scheduled(self, requests: Iterable[Request]) -> Iterator[Schedule]:
    """Reserves the rows for requests that are known."""
    with self._owned():
      requests = broadcast_requests(requests) if self._programs.several else requests
      ahead = 2 * self._rows.count
      schedule = Schedule(requests, self._prompts, self._threads, self._layout.window, ahead)
      try:
        yield schedule
      finally:
        schedule.close()

  def _run(
    self, source: Source, every: int, groups: int | None = None
  ) -> Iterator[tuple[int, Detokenizer]]:
    """Yields every row with its text so far, after every report of the device.

    `every` is the number of steps between two reports, `groups` how many are admitted between them
    (None: all that fit).
    """
    rows: dict[int, _Row] = {}
    count = self._rows.count
    ended = np.zeros(count, bool)
    while True:
      self._free(source.cancelled(), rows, ended)
      yield from self._refill(source, rows, ended, groups)
      if not rows:
        if not source.wait():
          return
        continue
      free = count - len(rows)
      wanted = count if not source.more else free + max(1, count // 4)
      checked = any(text.generation.stop for _, text in rows.values())
      report = self._rows.decode(ended, min(every, CHECKED) if checked else every, wanted)
      _, made, done, ids, margin = report
      self.counts.decode_steps += int(report.steps)
      for number, (index, text) in list(rows.items()):
        length = int(made[number])
        logged = self._rows.logged(number, length) if text.logs else None
        text.extend(ids[number, :length], bool(done[number]), float(margin[number]), logged)
        if text.finished:
          del rows[number]
          ended[number] = True
          self.counts.requests += 1
          self.counts.new_tokens += len(text.ids)
        yield index, text

  def _free(
    self, cancelled: Collection[int], rows: dict[int, _Row], ended: Bool[np.ndarray, " B"]
  ) -> None:
    """Ends the rows of cancelled requests."""
    for number, (index, _) in list(rows.items()):
      if index in cancelled:
        del rows[number]
        ended[number] = True

  def _refill(
    self,
    source: Source,
    rows: dict[int, _Row],
    ended: Bool[np.ndarray, " B"],
    groups: int | None,
  ) -> Iterator[tuple[int, Detokenizer]]:
    """Admits waiting requests into free rows, in groups of equal shape; yields those with errors."""
    admissions = itertools.count() if groups is None else range(groups)
    for _ in admissions:
      empty = [i for i in range(self._rows.count) if i not in rows]
      # A few rows may stay free until others are done, but none that a client waits for.
      free = self._rows.deal(empty, wait=groups is None and bool(rows))
      group: list[Ready] = []
      while len(group) < len(free) and (front := source.peek()) is not None:
        error = front.error or self._rows.refused(front)
        if not error and group and self._rows.shape(front) != self._rows.shape(group[0]):
          break
        source.take()
        self.counts.images_asked += len(front.request.images)
        if error:
          yield front.number, self._failed(error)
        else:
          group.append(front)
      if not group:
        return
      try:
        admitted, lost = self._admit_readable(group, free)
      except Exception as failure:
        if groups is None or not self._rows.whole:
          raise
        traceback.print_exc()  # those that are being answered are unharmed
        for ready in group:
          yield ready.number, self._failed(f"the engine failed: {type(failure).__name__}", True)
        continue
      self.counts.admitted += len(admitted)
      for number, ready in zip(free, admitted, strict=False):
        rows[number] = ready.number, self._text(ready)
        ended[number] = False
      for ready, why in lost:
        yield ready.number, self._failed(why)

  def _admit_readable(
    self, group: list[Ready], rows: list[int]
  ) -> tuple[list[Ready], list[tuple[Ready, str]]]:
    """Admits a group into the first of `rows`, except requests whose image can no longer be read.

    Returns: the admitted requests, and the others with the reason.
    """
    lost: list[tuple[Ready, str]] = []
    while group:
      try:
        self._rows.admit(group, rows[: len(group)])
        break
      except LostImageError as error:
        asking = [error.key in keys_of(ready.request) for ready in group]
        lost += [(r, str(error)) for r, asks in zip(group, asking, strict=True) if asks]
        group = [r for r, asks in zip(group, asking, strict=True) if not asks]
    return group, lost

  def _failed(self, error: str, failed: bool = False) -> Detokenizer:
    self.counts.requests += 1
    self.counts.errors += 1
    return Detokenizer(self._tokenizer, error=error, failed=failed)

  def _text(self, ready: Ready) -> Detokenizer:
    length = ready.prompt.length if ready.prompt else 0
    return Detokenizer(self._tokenizer, self._rows.generation(ready), "", length)

  def fits(self, generation: Generation) -> bool:
    """Returns whether requests may have these settings, so that they need no other engine."""
    return not self._rows.unfit(generation)
