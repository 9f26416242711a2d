"""Measures images per second of packed data on a disk, and in a bucket whose requests take 50 ms.

The bucket is `tests.object_store`, a server on this machine that waits before each answer. Both
sides read the same samples through the same pipeline, in turns within one run, on one core; the
server has another one. The first batches, for which readers fill up, are not timed. Batches of both
are compared to the bit.

  python benchmarks/bucket_reading.py --out docs/results/bucket_reading
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance, storage
from llava_sp_jax.data import anyres, pack, pipeline, sources
from llava_sp_jax.data.conversation import TEMPLATES
from llava_sp_jax.data.tokenizer import Tokenizer, train_bpe
from tests import object_store

TILE = anyres.Tile(336, 24, 6)
WORDS = ("picture", "house", "beside", "some", "trees", "and", "people", "who", "walk", "along")
ROWS = {"one sample a row": ("none", 1, 768, 16), "packed rows": ("first_fit", 6, 4096, 4)}


def write(folder: Path, count: int) -> None:
  """Writes samples of one JPEG of 640x480 each, and packs them."""
  rng = np.random.default_rng(0)
  samples: list[dict[str, Any]] = []
  for i in range(count):
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
    pixels = np.clip(smooth + rng.normal(0, 6, (480, 640, 1)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    reply = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), int(rng.integers(20, 80))))
    turns = [
      {"from": "human", "value": "<image>\nwhat is it?"},
      {"from": "gpt", "value": reply},
    ]
    samples.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
  (folder / "samples.json").write_text(json.dumps(samples))
  v1 = TEMPLATES["v1"]
  train_bpe([" ".join(WORDS), v1.system, v1.before, v1.after] * 20, folder / "tokenizer", 600)
  source = sources.open_path(str(folder / "samples.json"), str(folder), lambda image: image)
  pack.write(source, folder / "packed", "samples.json", shard_bytes=16 << 20)


def batches(path: str, folder: Path, rows: str, threads: int) -> pipeline.Batches:
  """Opens the packed samples at a path."""
  packing, images, length, size = ROWS[rows]
  data = config_lib.DataConfig(
    path=path, packing=packing, images_per_row=images, row_length=length, threads=threads
  )
  return pipeline.make(data, Tokenizer(folder / "tokenizer"), TILE, size, 0, folder=folder / rows)


def images_of(batch: dict[str, Any]) -> int:
  """Returns how many images a batch holds."""
  return sum(len(row) for row in batch[pipeline.SAMPLES])


def rate(made: pipeline.Batches, warm: int, count: int) -> tuple[float, float]:
  """Returns images per second, and per CPU second, of `count` batches behind the first `warm`."""
  for _ in range(warm):
    next(made)
  started, cpu, images = time.perf_counter(), time.process_time(), 0
  for _ in range(count):
    images += images_of(next(made))
  return images / (time.perf_counter() - started), images / (time.process_time() - cpu)


def same(a: pipeline.Batches, b: pipeline.Batches, count: int) -> None:
  """Compares batches to the bit."""
  for _ in range(count):
    ours, theirs = next(a), next(b)
    assert ours.pop(pipeline.SAMPLES) == theirs.pop(pipeline.SAMPLES)
    for key in ours:
      np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


class Requests:
  """Counts the reads of ranges."""

  def __init__(self, ranges: Any):
    self.count, self._begin = 0, ranges.begin
    ranges.begin = self

  def __call__(self, *args: Any, **more: Any) -> Any:
    self.count += 1
    return self._begin(*args, **more)


def cases(options: argparse.Namespace, folder: Path, address: str) -> Iterator[dict[str, Any]]:
  requests = Requests(storage.SCHEMES["gs"][0]._ranges)  # type: ignore[attr-defined]
  for rows in ROWS:
    places = {"disk": str(folder / "packed"), "bucket": address}
    same(*(batches(path, folder, rows, options.threads) for path in places.values()), 2)
    turns = []
    for _ in range(options.repeats):
      turn = {}
      for side, path in places.items():
        made = batches(path, folder, rows, options.threads)
        turn[side], turn[f"{side}, CPU"] = rate(made, options.warm, options.batches)
        made.close()
      turns.append(turn)
      print(rows, json.dumps(turn), f"load {os.getloadavg()[0]:.1f}", flush=True)
    found = {side: statistics.median(turn[side] for turn in turns) for side in turns[0]}
    for of in ("", ", CPU"):
      ratios = [turn[f"bucket{of}"] / turn[f"disk{of}"] for turn in turns]
      found |= {f"ratio{of}": statistics.median(ratios), f"ratios{of}": ratios}
    made, before = batches(address, folder, rows, options.threads), requests.count
    images = sum(images_of(next(made)) for _ in range(options.batches))
    assert made._far
    ahead = max(made._ahead, made._far.threads) * ROWS[rows][1]  # images that may be loaded already
    yield {"rows": rows, **found, "reads": (requests.count - before) / (images + ahead)}


def markdown(record: dict[str, Any]) -> str:
  """Returns the record as a page."""
  lines = [
    "# Images a second from a bucket",
    "",
    f"Packed samples of one JPEG of 640x480 each, decoded to 336x336 by {record['threads']} thread(s) on one core: "
    f"from a local disk, and from a bucket whose every request takes {record['latency'] * 1000:.0f} ms longer. The bucket is a "
    "server on another core of this machine. Batches are equal to the bit. Medians of "
    f"{record['repeats']} turns of both sides in one run; the ratio is the median of those of each turn. The "
    "core was always busy, so a second is a CPU second. Made by "
    "`python benchmarks/bucket_reading.py`.",
    "",
    "| images per | rows | disk | bucket | ratio | of each turn |",
    "|---|---|---|---|---|---|",
    *[
      f"| {name} | {r['rows']} | {r['disk' + of]:.1f} | {r['bucket' + of]:.1f} | {r['ratio' + of]:.3f} | "
      f"{', '.join(f'{ratio:.2f}' for ratio in r['ratios' + of])} |"
      for name, of in (("second", ""), ("CPU second", ", CPU"))
      for r in record["cases"]
    ],
    "",
    f"Machine: {record['machine']}; load {record['load']:.1f} at the start, {record['load, end']:.1f} at the end.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  """Measures both sides in turns, and writes a record if asked to."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=int, default=1500)
  parser.add_argument("--latency", type=float, default=0.05, help="seconds of each request")
  parser.add_argument("--threads", type=int, default=1, help="that decode")
  parser.add_argument("--warm", type=int, default=12, help="batches that are not timed")
  parser.add_argument("--batches", type=int, default=24)
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
  options = parser.parse_args()
  load, cores = os.getloadavg()[0], sorted(os.sched_getaffinity(0))
  machine = provenance.machine()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write(folder, options.images)
    os.sched_setaffinity(0, cores[-1:])  # of the server, which inherits it
    with object_store.running(options.latency):
      os.sched_setaffinity(0, cores[:1])
      place = storage.place(f"gs://{object_store.BUCKET}/packed")
      storage.of(place).upload(folder / "packed", place)
      found = list(cases(options, folder, str(place)))
  record = {
    "latency": options.latency,
    "threads": options.threads,
    "repeats": options.repeats,
    "cases": found,
    "machine": machine,
    "load": load,
    "load, end": os.getloadavg()[0],
  }
  print(markdown(record))
  if options.out:
    provenance.write(options.out, record)
    provenance.named(options.out, "md").write_text(markdown(record))


if __name__ == "__main__":
  main()
