"""Looks through a data set, without a model, for all that training would leave out or cut off.

Every sample is laid out as the pipeline does it; files are only looked for, and as many pictures as
asked for are decoded. Folders are those of the images' names, e.g. `coco/train2017`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import lookup
from llava_sp_jax.data import anyres, conversation, example, reading, sources
from llava_sp_jax.data.conversation import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer

# What can be wrong with a sample; True: it is lost to training, so a check does not pass with it.
KINDS = {
  "missing image": True,
  "unreadable image": True,
  "cannot be used": True,  # turns that do not alternate, <image> marks that do not fit, no room
  "nothing to learn": True,  # no reply, or all of it beyond the row
  "cut off": False,  # text beyond the row, as in the original
}
AHEAD = 256  # samples that are handed to the threads at a time


@dataclasses.dataclass(frozen=True)
class Problem:
  kind: str  # one of KINDS
  text: str
  folder: str = ""  # of the image, where there is one


@dataclasses.dataclass
class Report:
  """Counts over the samples that were checked; examples are the first of their kind."""

  total: int
  checked: int = 0
  decoded: int = 0  # pictures
  tokens: int = 0  # of text and images, before anything is cut off
  longest: int = 0  # tokens of a sample
  kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  examples: dict[str, str] = dataclasses.field(default_factory=dict)
  images: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  @property
  def passed(self) -> bool:
    return not any(count and KINDS[kind] for kind, count in self.kinds.items())

  def add(self, index: int, found: Found) -> None:
    """Counts one sample, and each kind of problem once in it."""
    self.checked += 1
    self.decoded += found.decoded
    self.tokens += found.tokens
    self.longest = max(self.longest, found.tokens)
    self.images.update(found.folders)
    self.missing.update(p.folder for p in found.problems if p.kind == "missing image")
    for problem in found.problems:
      self.examples.setdefault(problem.kind, f"sample {index}: {problem.text}")
    self.kinds.update({problem.kind for problem in found.problems})


@dataclasses.dataclass(frozen=True)
class Found:
  """What one sample is: its length, the folders of its images, and what is wrong with it."""

  tokens: int
  folders: tuple[str, ...]
  problems: tuple[Problem, ...]
  decoded: int = 0


class Checker:
  """Checks samples one by one; safe to call from several threads."""

  def __init__(self, data: config_lib.Data, tokenizer: Tokenizer, tile: anyres.Tile):
    """Raises: ConfigError, FileNotFoundError for data that cannot be opened at all."""
    self._data, self._tokenizer = data, tokenizer
    self._reader = anyres.Reader(data, tile)
    self._template = lookup("data.template", data.template, conversation.TEMPLATES)
    lookup("data.turns", data.turns, conversation.TURNS)
    make_source = lookup("data.source", data.source, sources.SOURCES)
    self._folder = Path(data.image_folder)
    self.source = make_source(data.path, data.image_folder, self._reader)

  def __call__(self, index: int, decode: bool) -> Found:
    """Checks one sample; its pictures are decoded when `decode` is set."""
    sample = self.source[index]
    try:
      if not isinstance(sample, dict):
        raise SampleError(f"expected a dictionary, found {sample!r:.60}")
      names, inside = images_of(sample)
    except SampleError as error:
      return Found(0, (), (Problem("cannot be used", str(error)),))
    folders = tuple(folder_of(name) for name in names)
    gone = [name for name in names if not (self._folder / name).is_file()]
    if gone:
      problems = tuple(Problem("missing image", name, folder_of(name)) for name in gone)
      return Found(0, folders, problems)
    count = len(names) + inside
    plans, decoded = [self._plan_of_one_tile] * count, 0
    if count and (decode or self._reader.max_tiles > 1):
      try:
        plans = [picture.plan for picture in self.source.images(sample)]
      except SampleError as error:
        return Found(0, folders, (Problem("unreadable image", str(error)),))
      decoded = count
    tokens, problems = self._lay_out(sample, plans)
    return Found(tokens, folders, problems, decoded)

  @property
  def _plan_of_one_tile(self) -> example.Plan:
    side = self._reader.tile.size
    return anyres.plan(self._reader.tile, (side, side), None, self._data.patch_merge)

  def _lay_out(
    self, sample: dict[str, Any], plans: list[example.Plan]
  ) -> tuple[int, tuple[Problem, ...]]:
    """Length of a sample's row before it is cut off, and what is wrong with the row."""
    try:
      turns = conversation.turns_of(sample)
      runs = reading.dialogue(turns, self._template, self._data.turns, self._tokenizer)
      row = example.layout(runs, plans, self._data.row_length, self._data.images_per_row)
    except SampleError as error:
      return 0, (Problem("cannot be used", str(error)),)
    text = sum(len(run.ids) for run in runs) - len(plans)
    length, limit = text + sum(len(plan.slots) for plan in plans), self._data.row_length
    if not row.weights.any():
      cut = f" in the first {limit} of its {length} tokens" if length > limit else ""
      return length, (Problem("nothing to learn", f"no reply{cut}"),)
    if length > limit and not self._data.turns_per_row:
      return length, (Problem("cut off", f"{length} tokens, data.row_length is {limit}"),)
    return length, ()


def images_of(sample: dict[str, Any]) -> tuple[list[str], int]:
  """The file names of a sample's images, and how many images are in the sample itself (bytes).

  Raises: SampleError when `image` is something else.
  """
  value = sample.get("image", [])
  if isinstance(value, bytes):
    return [], 1
  names = [value] if isinstance(value, str) else value
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise SampleError(f"`image` must be a file name or a list of them, found {names!r:.60}")
  return names, 0


def folder_of(name: str) -> str:
  return str(PurePath(name).parent)


def check(
  data: config_lib.Data, tokenizer: Tokenizer, tile: anyres.Tile, images: int | None = 1000,
  samples: int | None = None, progress: Callable[[Report], None] = lambda report: None,
) -> Report:  # fmt: skip
  """Checks a data set.

  Args:
    images: how many samples have their pictures decoded, drawn at random; None: all. With
      `data.image_aspect="anyres"` all are, as an image's tokens depend on its size.
    samples: how many samples are checked, drawn at random; None: all.
    progress: called with the report after every few samples.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened at all.
  """
  checker = Checker(data, tokenizer, tile)
  total, draw = len(checker.source), random.Random(0)
  chosen = range(total) if samples is None or samples >= total else sorted(
    draw.sample(range(total), samples)
  )  # fmt: skip
  every = images is None or images >= len(chosen)
  decoded = set(chosen if every else draw.sample(chosen, images or 0))
  report = Report(total)
  with concurrent.futures.ThreadPoolExecutor(max(1, data.threads)) as pool:
    for group in _groups(chosen, AHEAD):
      found = pool.map(lambda i: checker(i, i in decoded), group)
      for index, one in zip(group, found, strict=True):
        report.add(index, one)
      progress(report)
  return report


def _groups(items: Iterable[int], size: int) -> Iterator[list[int]]:
  iterator = iter(items)
  while group := list(itertools.islice(iterator, size)):
    yield group
