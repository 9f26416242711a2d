"""Checks a data set, without a model, for samples that training would leave out or cut off.

Every sample passes through the functions of training: `forms.read`, `samples.SampleEncoder`,
`example.layout`. Image sizes are read from the headers of the files, and a given number of images
is decoded. Reports count images by folder: the folder part of their names, e.g. `coco/train2017`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.console import shortened
from llava_sp_jax.data import anyres, example, forms, sources, validation_split
from llava_sp_jax.data import samples as samples_lib
from llava_sp_jax.data.decode import MissingImageError
from llava_sp_jax.data.failure import REASON, SampleError, attempt, of_one_sample
from llava_sp_jax.data.pictures import Picture
from llava_sp_jax.data.tokenizer import Tokenizer

# Kind of problem -> whether training loses the sample, so that the check fails.
KINDS = {
  "missing image": True,
  "unreadable image": True,
  "cannot be used": True,  # e.g. turns do not alternate, <image> marks do not match the images
  "nothing to learn": True,  # no reply, or the whole reply lies beyond the end of the row
  "cut off": False,  # text beyond the end of the row, as in the original
}
AHEAD = 256  # samples submitted to the threads at a time


@dataclasses.dataclass(frozen=True)
class Problem:
  """Holds one problem of a sample: its kind, what was found, and the folder of the image."""

  kind: str  # one of KINDS
  text: str
  folder: str = ""  # of the image that has the problem, if any


@dataclasses.dataclass
class CheckReport:
  """Holds counts over the checked samples, and the first example of each kind of problem."""

  total: int  # samples of the data set
  checked: int = 0
  decoded: int = 0  # images
  tokens: int = 0  # of text and images, before anything is cut off
  longest: int = 0  # tokens of the longest sample
  kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  examples: dict[str, str] = dataclasses.field(default_factory=dict)
  images: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  @property
  def passed(self) -> bool:
    """Returns whether training would use every checked sample; cut-off texts do not count."""
    return not any(count and KINDS[kind] for kind, count in self.kinds.items())

  def add(self, index: int, found: Found) -> None:
    """Adds what was found about sample `index`; counts each kind of problem once for it."""
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
  """Holds the result for one sample: its length, the folders of its images, and its problems."""

  tokens: int
  folders: tuple[str, ...]
  problems: tuple[Problem, ...]
  decoded: int = 0


class Checker:
  """Checks samples one at a time; may be called from several threads."""

  def __init__(
    self,
    data: config_lib.DataConfig,
    tokenizer: Tokenizer,
    tile: anyres.Tile,
    seed: int = 0,
    split: str = validation_split.TRAIN,
  ):
    """Opens the data of a split.

    Args:
      data: the data settings of the run.
      tokenizer: the tokenizer of the run.
      tile: the tokens of one tile of the model.
      seed: the seed of the run; turns are drawn as in its first epoch.
      split: TRAIN or VALIDATION of `validation_split`.

    Raises: ConfigError, FileNotFoundError for data that cannot be opened at all.
    """
    self._data, self._seed = data, seed
    self._reader, self._writer = (
      anyres.Reader(data, tile),
      samples_lib.SampleEncoder(tokenizer, data),
    )
    self.source = sources.of(data, self._reader, split)

  def __call__(self, index: int, decode: bool) -> Found:
    """Checks sample `index`, and decodes its images if `decode` is true; returns what was found."""
    sample = attempt(lambda: self.source[index])
    images = attempt(lambda: forms.read(sample).images)
    if isinstance(images, SampleError):
      return Found(0, (), (Problem("cannot be used", str(images)),))
    folders = tuple(folder_of(name) for name in images if isinstance(name, str))
    found = zip(images, self.source.pictures(sample), strict=True)
    plans = [self._plan(image, picture) for image, picture in found]
    if bad := tuple(plan for plan in plans if isinstance(plan, Problem)):
      return Found(0, folders, bad)
    if decode and images:
      read = attempt(lambda: self.source.images(sample))
      if isinstance(read, SampleError):
        return Found(0, folders, (Problem("unreadable image", str(read)),))
    tokens, problems = self._lay_out(index, sample, plans)
    return Found(tokens, folders, problems, len(images) if decode else 0)

  def _plan(self, image: forms.Image, picture: Picture) -> example.TokenPlan | Problem:
    """Returns the token plan of an image, or the problem with its file."""
    folder = folder_of(image) if isinstance(image, str) else ""
    try:
      with of_one_sample():
        return self._reader.plan(picture.size())
    except MissingImageError:
      return Problem("missing image", shortened(str(image), REASON), folder)
    except SampleError as error:
      return Problem("unreadable image", str(error), folder)

  def _lay_out(self, index: int, sample: Any, plans: list[Any]) -> tuple[int, tuple[Problem, ...]]:
    """Returns the tokens of a sample before anything is cut off, and the problems of its row."""
    limit = self._data.row_length
    try:
      with of_one_sample():
        runs = self._writer.runs(sample, samples_lib.rng_of(self._seed, 0, index))
        size = self._writer.size(runs, plans)
        row = example.layout(runs, plans, limit, self._data.images_per_row)
    except SampleError as error:
      return 0, (Problem("cannot be used", str(error)),)
    cut = size.total > limit
    if not row.weights.any():
      where = f" in the first {limit} of its {size.total} tokens" if cut else ""
      return size.total, (Problem("nothing to learn", f"no reply{where}"),)
    if cut:
      return size.total, (Problem("cut off", f"{size.total} tokens, data.row_length is {limit}"),)
    return size.total, ()


def folder_of(name: str) -> str:
  """Returns the folder part of an image's name, such as `coco/train2017`; "." without one."""
  return str(PurePath(name).parent)


def check(
  data: config_lib.DataConfig,
  tokenizer: Tokenizer,
  tile: anyres.Tile,
  images: int | None = 1000,
  samples: int | None = None,
  progress: Callable[[CheckReport], None] = lambda report: None,
  seed: int = 0,
  split: str = validation_split.TRAIN,
) -> CheckReport:
  """Checks a data set and returns the counts.

  Args:
    data: the data settings of the run.
    tokenizer: the tokenizer of the run.
    tile: the tokens of one tile of the model.
    images: how many samples, drawn at random, have their images decoded (None: all). For the other
      samples only the headers of the image files are read.
    samples: how many samples, drawn at random, are checked (None: all).
    progress: called with the report so far after every AHEAD samples.
    seed: the seed of the run, with which turns are drawn.
    split: TRAIN or VALIDATION of `validation_split`; all samples of the split's file are checked.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened at all.
  """
  checker = Checker(data, tokenizer, tile, seed, split)
  total, draw = len(checker.source), random.Random(0)
  chosen = (
    range(total)
    if samples is None or samples >= total
    else sorted(draw.sample(range(total), samples))
  )
  every = images is None or images >= len(chosen)
  decoded = set(chosen if every else draw.sample(chosen, images or 0))
  report = CheckReport(total)
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
