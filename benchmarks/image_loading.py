"""Measures images per second, from files to pixels, against Hugging Face's processor in a
DataLoader.

Usage: python benchmarks/image_loading.py [--images 192] [--workers 1 2] [--out docs/results/image_loading]

JPEG files of 1024x768 are decoded, padded to a square, resized to 336 pixels and normalized. One
side is the threads that read ahead for the engine and for training. The other is the original's
way: `CLIPImageProcessor` (its PIL form) in as many worker processes of torch's DataLoader. Both are
timed in turns from the first file to the last, without the start of the workers. The pixels must be
equal to the last bit. Needs torch (the extra `test`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance
from llava_sp_jax.data import anyres, decode

SIZE, PATCH = 336, 14


def write_pictures(folder: Path, count: int) -> list[Path]:
  """Makes coarse colors with fine grain, which compress about as photographs do."""
  rng = np.random.default_rng(0)
  paths = []
  for i in range(count):
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (768, 1024, 1))
    pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
    paths.append(folder / f"{i}.jpg")
    Image.fromarray(pixels).save(paths[-1], quality=90)
  return paths


def ours(paths: list[Path], workers: int) -> Iterator[np.ndarray]:
  """Yields [336, 336, 3] float32 for each file, read ahead by threads."""
  data = config_lib.DataConfig(image_aspect="pad")
  reader = anyres.Reader(data, anyres.Tile(SIZE, SIZE // PATCH, 0, False))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for picture in pool.map(lambda path: reader(decode.read(path)), paths):
      yield picture.tiles[0]


class Files:
  """A torch data set: `process_images` of the original with the aspect "pad"."""

  def __init__(self, paths: list[Path]):
    from transformers import CLIPImageProcessorPil

    square = {"height": SIZE, "width": SIZE}
    self._paths = paths
    self._process = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)
    self._color = tuple(int(m * 255) for m in self._process.image_mean)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Any:
    picture = Image.open(self._paths[index]).convert("RGB")
    side = max(picture.size)
    square = Image.new("RGB", (side, side), self._color)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return self._process(square, return_tensors="pt")["pixel_values"][0]


def theirs(paths: list[Path], workers: int) -> Iterator[np.ndarray]:
  import torch

  torch.set_num_threads(1)
  data: Any = Files(paths)
  loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)
  for pixels in loader:
    yield pixels.numpy().transpose(1, 2, 0)


WAYS: dict[str, Callable[[list[Path], int], Iterator[np.ndarray]]] = {"ours": ours, "torch": theirs}


def rate(way: str, paths: list[Path], workers: int) -> float:
  """Measures images per second after the first `workers`, which wait for the workers to start."""
  pictures = WAYS[way](paths, workers)
  for _ in range(workers):
    next(pictures)
  started = time.perf_counter()
  count = sum(1 for _ in pictures)
  return count / (time.perf_counter() - started)


def check_equal(paths: list[Path]) -> None:
  for path, a, b in zip(paths, ours(paths, 1), theirs(paths, 1), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=str(path))


def markdown(records: list[dict[str, Any]]) -> str:
  lines = [
    "# Pictures a second, from files to pixels",
    "",
    "JPEG files of 1024x768 to 336x336 float32, equal to the last bit; medians of turns. Made by "
    "`python benchmarks/image_loading.py`.",
    "",
    "| workers | ours (threads) | DataLoader (processes) | ratio |",
    "|---|---|---|---|",
    *[
      f"| {r['workers']} | {r['ours']:.1f}/s | {r['torch']:.1f}/s | {r['ratio']:.2f} |"
      for r in records
    ],
    "",
    f"Machine: {records[0]['machine']}.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=int, default=192)
  parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", default="docs/results/image_loading", help="OUT.md and OUT.json")
  options = parser.parse_args()
  records = []
  with tempfile.TemporaryDirectory() as folder:
    paths = write_pictures(Path(folder), options.images)
    check_equal(paths[:8])
    for workers in options.workers:
      turns = [{way: rate(way, paths, workers) for way in WAYS} for _ in range(options.repeats)]
      medians = {way: statistics.median(turn[way] for turn in turns) for way in WAYS}
      records.append(
        {
          "workers": workers,
          **medians,
          "ratio": medians["ours"] / medians["torch"],
          "machine": f"{os.cpu_count()} cores {platform.machine()}, CPU, "
          f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}",
        }
      )
      print(markdown(records).splitlines()[-3], flush=True)
  out = Path(options.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  provenance.write(out, records)
  provenance.named(out, "md").write_text(markdown(records))


if __name__ == "__main__":
  main()
