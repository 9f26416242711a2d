"""The data pipeline: shuffled, seekable, resumable batches of static shape (grain).

Shape letters:  B rows . T row length . M tiles per row
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import grain
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import lookup
from llava_sp_jax.data import anyres, conversation, example, image, sources
from llava_sp_jax.data.conversation import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer

HOPELESS = 256  # so many bad samples and no good one: the settings are wrong, not the samples


class Quarantine:
  """Counts samples that could not be used and writes each to a file, once in the life of a run."""

  def __init__(self, path: Path | None = None):
    self._path, self._lock = path, threading.Lock()
    self._seen = _indices(path) if path and path.is_file() else set[int]()

  @property
  def count(self) -> int:
    return len(self._seen)

  def add(self, index: int, sample: Any, error: SampleError) -> None:
    with self._lock:
      if index in self._seen:
        return
      self._seen.add(index)
      name = sample.get("id", "no id") if isinstance(sample, dict) else "not a dictionary"
      line = {"index": index, "id": name, "error": str(error)}
      if self._path:
        with self._path.open("a") as file:
          file.write(json.dumps(line) + "\n")


def _indices(path: Path) -> set[int]:
  """Samples that an earlier call has written; a line cut off by a kill does not count."""
  found = set()
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      found.add(int(json.loads(line)["index"]))
  return found


class RowMaker:
  """Turns sample `index` into a row with its images; a bad sample is quarantined, and None."""

  def __init__(
    self, source: sources.Source, tokenizer: Tokenizer, data: config_lib.Data, side: int,
    quarantine: Quarantine,
  ):  # fmt: skip
    self._source, self._tokenizer, self._data = source, tokenizer, data
    self._template = lookup("data.template", data.template, conversation.TEMPLATES)
    self._turns = lookup("data.turns", data.turns, conversation.TURNS)
    self._augment = lookup("data.augment", data.augment, image.AUGMENTS)
    self._side, self._quarantine = side, quarantine
    self._any_good, self._bad = False, set[int]()

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    sample = self._source[index]
    try:
      row = self._make(sample, rng)
      self._any_good = True
      return row
    except SampleError as error:
      self._quarantine.add(index, sample, error)
      if not self._any_good:
        self._bad.add(index)
        if len(self._bad) >= min(len(self._source), HOPELESS):
          raise config_lib.ConfigError(
            f"data: none of the first {len(self._bad)} samples can be used; the last: {error}"
          ) from None
      return None

  def _make(self, sample: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if not isinstance(sample, dict):
      raise SampleError(f"expected a dictionary, found {sample!r:.60}")
    turns = conversation.turns_of(sample)
    limit = self._data.turns_per_row
    if limit and len(turns) > limit:
      turns = draw_turns(turns, limit, rng)
    pictures = self._source.images(sample)
    plans, room = [picture.plan for picture in pictures], self._data.images_per_row
    runs = example.tokenize(self._turns(turns, self._template), self._tokenizer)
    row = example.layout(runs, plans, self._data.row_length, room).arrays()
    row["images"] = np.zeros((room, self._side, self._side, 3), np.float32)
    for i, pixels in enumerate(tile for picture in pictures for tile in picture.tiles):
      row["images"][i] = self._augment(pixels, rng)
    return row


def draw_turns(turns: list, limit: int, rng: np.random.Generator) -> list:
  """A random subset of the turns, in their order; the image stays in the first of them."""
  image_count = turns[0][0].count(conversation.IMAGE)
  plain = [(q.replace(conversation.IMAGE, "").strip(), a) for q, a in turns]
  chosen = [plain[i] for i in sorted(rng.choice(len(turns), limit, replace=False))]
  first = (conversation.IMAGE + "\n") * image_count + chosen[0][0]
  return [(first, chosen[0][1]), *chosen[1:]]


def make(
  data: config_lib.Data, tokenizer: Tokenizer, tile: anyres.Tile, batch_size: int, seed: int,
  quarantine: Quarantine | None = None, shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:  # fmt: skip
  """An endless iterator of batches whose `get_state`/`set_state` resume it exactly.

  `batch_size` counts all rows; shard (i, n) yields the i-th of n equal parts of each batch.
  """
  make_source = lookup("data.source", data.source, sources.SOURCES)
  source = make_source(data.path, data.image_folder, anyres.Reader(data, tile))
  row_maker = RowMaker(source, tokenizer, data, tile.size, quarantine or Quarantine())
  host, hosts = shard
  rows = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(row_maker)[host::hosts]
    .to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=64))
  )
  return iter(rows.batch(batch_size // hosts, drop_remainder=True))
