"""Measures memory and start-up of the data pipeline on as many samples as LLaVA's stage 2 has.

Writes a synthetic data set whose text lengths are those of `mixture`, all about one small picture,
and opens it in a process of its own for each case: cold, and again. Memory is the peak of the
process that trains, without its model: `ru_maxrss`. Measuring processes are not counted.

  python benchmarks/data_memory.py --samples 665000 --folder /tmp/data_memory
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mixture import IMAGE, draw
from PIL import Image

SPLIT = 40  # tokens of a turn, about
WORDS = ("what", "is", "shown", "here", "a", "small", "square", "of", "one", "color", "near", "it")
CASES = ("json", "json again", "packed", "packed again")


def sample(index: int, tokens: int, images: int, rng: np.random.Generator) -> dict[str, Any]:
  """Returns a dialogue of about so many tokens, a word each."""
  words = rng.integers(0, len(WORDS), max(4, tokens))
  turns = []
  for start in range(0, len(words), SPLIT):
    text = " ".join(WORDS[i] for i in words[start : start + SPLIT])
    half = len(text) // 2
    turns += [{"from": "human", "value": text[:half]}, {"from": "gpt", "value": text[half:]}]
  made: dict[str, Any] = {"id": f"{index:012d}", "conversations": turns}
  if images:
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    made["image"] = f"coco/train2017/{index % 1000:012d}.jpg"
  return made


def write(folder: Path, count: int) -> None:
  """Writes samples.json, and a thousand small pictures that they name."""
  images = folder / "coco" / "train2017"
  images.mkdir(parents=True)
  Image.new("RGB", (32, 24)).save(images / "x.jpg")
  for i in range(1000):
    shutil.copy(images / "x.jpg", images / f"{i:012d}.jpg")
  sizes, rng = draw(count), np.random.default_rng(0)
  with (folder / "samples.json").open("w") as file:
    for i, (length, tiles) in enumerate(zip(sizes.lengths, sizes.tiles, strict=True)):
      text = json.dumps(sample(i, int(length - IMAGE * tiles), int(tiles), rng))
      file.write(("[" if not i else ",\n") + text)
    file.write("]\n")


def open_and_read(path: str, folder: str, tokenizer: str, batches: int) -> dict[str, float]:
  """Opens the data as training does, and reads batches; returns seconds and MB."""
  from llava_sp_jax import config as config_lib
  from llava_sp_jax.data import anyres, pipeline
  from llava_sp_jax.data.tokenizer import Tokenizer

  started = time.monotonic()
  data = config_lib.DataConfig(
    path=path, image_folder=folder, tokenizer=tokenizer, packing="first_fit", images_per_row=6,
    row_length=4096, threads=2,
  )  # fmt: skip
  tile = anyres.Tile(336, 24, 6)
  source, _ = pipeline.open_source(data, tile, "train")
  source.fingerprint()
  opened = time.monotonic() - started
  found = pipeline.make(
    data, Tokenizer(tokenizer), tile, 8, 0, folder=Path(folder) / "run", say=say
  )
  for _ in range(batches):
    next(found)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return {"opened": opened, "first batches": time.monotonic() - started, "MB": peak}


def say(line: str) -> None:
  """Prints a line of progress."""
  print(line, file=sys.stderr, flush=True)


def main() -> None:
  """Measures every case, each in a process of its own, and prints a line of JSON for it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--samples", type=int, default=665_000)
  parser.add_argument("--folder", type=Path, required=True)
  parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
  parser.add_argument("--batches", type=int, default=4)
  parser.add_argument("--one", default="", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.one:
    found = open_and_read(options.one, str(options.folder), options.tokenizer, options.batches)
    print(json.dumps(found))
    return
  if not (options.folder / "samples.json").is_file():
    write(options.folder, options.samples)
  paths = {"json": options.folder / "samples.json", "packed": options.folder / "packed"}
  for case in CASES:
    path = paths[case.split()[0]]
    if case == "packed" and not path.exists():
      pack = [sys.executable, "-m", "llava_sp_jax", "data", "pack", str(paths["json"]), str(path)]
      subprocess.run([*pack, "--image-folder", str(options.folder)], check=True)
    again = [sys.executable, *sys.argv, "--one", str(path)]
    done = subprocess.run(again, capture_output=True, text=True, check=True)
    print(json.dumps({"case": case, "samples": options.samples, **json.loads(done.stdout)}))


if __name__ == "__main__":
  main()
