"""Keeps the rows that decode together: admits requests into free ones, and runs their steps.

Shape letters:  B rows . G rows of a group . S capacity of a row
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool

from llava_sp_jax.infer import row_settings
from llava_sp_jax.infer.caches import PrefixCache
from llava_sp_jax.infer.decode import DecodeReport, State, StopRule
from llava_sp_jax.infer.detokenizer import Logged
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.layout import EngineLayout, bucket
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.requests import Prompt
from llava_sp_jax.infer.schedule import Ready

FILLED = 0.75  # of the places of a group


class Rows:
  """Holds the B rows of the decode state; a row that is done is free for another request.

  `prefixes` is the cache of what prompts share; who owns the rows sets it anew to empty it.
  """

  def __init__(
    self,
    programs: Programs,
    rule: StopRule,
    generation: Generation,
    layout: EngineLayout,
    prefixes: PrefixCache,
    batch_size: int,
  ):
    """Makes free rows.

    Args:
      programs: the compiled programs.
      rule: constants of these programs.
      generation: the settings of requests without their own.
      layout: what sizes are rounded up to.
      prefixes: the cache of prefixes.
      batch_size: B, rounded up to a multiple of the data-parallel groups.
    """
    self._programs, self._rule, self._default, self._layout = programs, rule, generation, layout
    self.prefixes = prefixes
    parts = programs.parts
    self.count = bucket(batch_size, parts)
    sizes = [parts]
    while sizes[-1] * layout.groups < self.count:
      sizes.append(sizes[-1] * layout.groups)
    self.groups = sorted({*sizes, self.count})
    self._state: State | None = None
    self._widest = 0  # S of the widest state so far

  def generation(self, ready: Ready) -> Generation:
    """Returns the settings of a request: its own, or those of the engine."""
    return ready.request.generation or self._default

  def unfit(self, generation: Generation) -> str:
    """Returns why a request with these settings cannot be answered; "" if it can."""
    rule = self._rule
    ids = [*generation.stop_ids, *(token for token, _ in generation.logit_bias)]
    logged = -1 if generation.log_probabilities is None else generation.log_probabilities
    most = -1 if rule.log_probabilities is None else rule.log_probabilities
    alike = rule.beams == 1 or generation == self._default
    checks = (
      (
        generation.num_beams == rule.beams and alike,
        f"num_beams: {generation.num_beams}; this engine answers all requests with {rule.beams} and, "
        "above 1, with its own settings",
      ),
      (
        generation.max_new_tokens <= rule.max_new_tokens,
        f"max_new_tokens: {generation.max_new_tokens}; at most {rule.max_new_tokens} here",
      ),
      (
        max(ids, default=0) < rule.logits,
        f"stop_ids or logit_bias: no token has the id {max(ids, default=0)}; the model has "
        f"{rule.logits}",
      ),
      (
        logged <= most,
        f"log_probabilities: {logged}; " + (f"at most {most} here" if most >= 0 else "none here"),
      ),
    )
    return next((why for holds, why in checks if not holds), "")

  def refused(self, ready: Ready) -> str:
    """Returns why a request whose prompt is made cannot be answered; "" if it can."""
    if ready.prompt is None:
      return ""
    generation = self.generation(ready)
    length, new, most = ready.prompt.length, generation.max_new_tokens, self._layout.positions
    if (why := self.unfit(generation)) or length + new <= most:
      return why
    return (
      f"the prompt has {length} positions, which with {new} new tokens are more than the limit of "
      f"{most}"
    )

  @property
  def logs(self) -> bool:
    """Returns whether log-probabilities are kept."""
    return self._rule.log_probabilities is not None and self._rule.beams == 1

  @property
  def whole(self) -> bool:
    """Returns whether the state has all of its buffers: a failed program may have taken them."""
    return self._state is None or not any(x.is_deleted() for x in jax.tree.leaves(self._state))

  def clear(self) -> None:
    """Frees the state of the rows."""
    self._state = None

  def shape(self, ready: Ready) -> tuple[int, int]:
    """Returns what the prompts of a group have in common: P before the last piece, tiles in it."""
    assert ready.prompt is not None
    *before, last = ready.prompt.pieces
    return self.prefixes.capacity(before), len(last.tiles)

  def suffix(self, prompts: Sequence[Prompt]) -> int:
    """Returns the length that the last pieces of a group are padded to."""
    longest = max(len(p.pieces[-1].tokens) for p in prompts)
    return self._layout.rounded(longest, self._layout.suffix)

  def capacity(self, ready: Ready, length: int) -> int:
    """Returns the capacity S that a request needs when its last piece is padded to `length`."""
    prompt = ready.prompt
    assert prompt is not None
    last = prompt.pieces[-1]
    shared = self.prefixes.capacity(prompt.pieces[:-1])
    needed = max(shared, last.start + max(length, len(last.tokens)))
    needed = max(needed, prompt.length + self.generation(ready).max_new_tokens)
    return self._layout.rounded(needed, self._layout.capacity)

  def reserve(self, capacity: int) -> None:
    """Makes every row at least `capacity` positions long, and no shorter than any row before."""
    if self._state is None:
      self._state = self._programs.state(self.count, max(capacity, self._widest))
    elif self._state.cache.capacity < capacity:
      self._state = self._programs.widen(self._state, capacity)
    self._widest = max(self._widest, capacity)

  def deal(self, free: Sequence[int], wait: bool = False) -> list[int]:
    """Returns which of the free rows the next group fills; every beginning of the list is a group.

    A prompt is prefilled by the devices that have its row, so its new keys and values stay there. Each
    part of the devices takes as many prompts as the others, so one with fewer free rows has padding.
    The group is the largest one that the part with the most free rows fills, and of which at least
    FILLED is no padding. If there is none, it is the largest one without regard to FILLED, because
    what costs time is the places of a part; or none with `wait`, as long as fewer than half of all
    rows are free.
    """
    counts: collections.Counter[int] = collections.Counter()
    dealt = []
    for row in sorted(free):
      part = self._part(row)
      dealt.append((counts[part], part, row))
      counts[part] += 1
    parts, most = self._programs.parts, max(counts.values(), default=0)
    fitting = [places for g in self.groups if (places := g // parts) <= most]

    def filled(places: int) -> float:
      taken = sum(min(count, places) for count in counts.values())
      return taken / float(places * parts)

    full = [places for places in fitting if filled(places) >= FILLED]
    few = wait and 2 * len(free) < self.count
    chosen = max(full or ([] if few else fitting), default=0)
    return [row for turn, _, row in sorted(dealt) if turn < chosen]

  def _part(self, row: int) -> int:
    """Returns which part of the devices has a row."""
    result: int = row // (self.count // self._programs.parts)
    return result

  def _placed(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the prompts of a group in the order of the devices that have their `rows`.

    Returns: for each of the G places, the index of its prompt, and its row; padding repeats prompt
      0, and its row is past the end.
    """
    parts: list[list[int]] = [[] for _ in range(self._programs.parts)]
    for index, row in enumerate(rows):
      parts[self._part(row)].append(index)
    most = max(map(len, parts))
    places = next(g for g in self.groups if g >= most * len(parts)) // len(parts)
    order, target = [], []
    for part in parts:
      padding = places - len(part)
      order += part + [0] * padding
      target += [rows[index] for index in part] + [self.count] * padding
    return order, target

  def admit(self, group: Sequence[Ready], rows: Sequence[int]) -> None:
    """Prefills the prompts of a group into `rows`, the first ones that `deal` returned.

    Also chooses the first token of each.

    Raises: LostImageError for an image that can no longer be read; then nothing has changed.
    """
    prompts = [ready.prompt for ready in group if ready.prompt]
    requests = [ready.request for ready in group]
    order, target = self._placed(rows)
    before = self.prefixes.of([(r, p.pieces[:-1]) for r, p in zip(requests, prompts, strict=True)])
    length = self.suffix(prompts)
    packed = self.prefixes.group(
      [requests[i] for i in order],
      [prompts[i].pieces[-1] for i in order],
      [before[i] for i in order],
      length,
    )
    self.reserve(max(self.capacity(ready, length) for ready in group))
    assert self._state is not None
    self._state = self._programs.admit(
      self._state,
      packed,
      np.asarray(target, np.int32),
      row_settings.of(
        [self.generation(group[i]) for i in order],
        [group[i].drawn_by for i in order],
        [prompts[i] for i in order],
        self._rule.stop_ids,
        self._rule.logits,
      ),
    )

  def decode(self, ended: Bool[np.ndarray, " B"], steps: int, until: int) -> DecodeReport:
    """Runs at most `steps` decode steps, until `until` rows are done; see `Programs.decode`."""
    assert self._state is not None
    self._state, report = self._programs.decode(self._state, ended, steps, min(until, self.count))
    return report

  def logged(self, row: int, made: int) -> Logged:
    """Returns the log-probabilities of the `made` tokens of a row's answer."""
    assert self._state is not None
    log = self._programs.logged(self._state, row)
    return Logged(*(x[:made] for x in log))
