"""Measures memory and start-up of the data pipeline with as many samples as LLaVA's stage 2 has.

Writes a synthetic data set with the turns and text lengths of `mixture`, whose images are small
files, and packs it with `llava-sp data pack`. Each case opens the data in a process of its own, as
training does: the fingerprint, the plan of the first epoch, batches. Lengths are kept beside the
data as if an earlier run had measured them. Memory is `ru_maxrss`, of a process without a model
and, as where the package is installed, without torch; what torch adds is measured apart.

  python benchmarks/data_memory.py --folder /tmp/data_memory --out docs/results/data_memory
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mixture import IMAGE, draw
from PIL import Image

from llava_sp_jax import provenance

TURN = 40  # tokens of a turn and its reply, about
AROUND = 12  # tokens that the template adds to them
WORDS = ("picture", "someone", "standing", "beside", "a", "yellow", "building", "of", "stones",
         "which", "another", "shows")  # fmt: skip
PICTURES = 1000  # different ones
ROWS, TILES, LENGTH = 8, 6, 4096  # of a batch; of a row
CASES = {"JSON, first start": "samples.json", "JSON, later start": "samples.json",
         "packed, first start": "packed", "packed, later start": "packed"}  # fmt: skip


def samples(count: int) -> Iterator[dict[str, Any]]:
  """Yields dialogues with no more tokens than `draw` has drawn."""
  sizes, rng = draw(count, row_length=LENGTH), np.random.default_rng(0)
  for i, (length, tiles) in enumerate(zip(sizes.lengths, sizes.tiles, strict=True)):
    turns: list[dict[str, str]] = []
    for _ in range(max(1, int(length - IMAGE * tiles - 45) // (TURN + AROUND))):
      words = [WORDS[k] for k in rng.integers(0, len(WORDS), TURN)]
      turns += [
        {"from": "human", "value": " ".join(words[: TURN // 2])},
        {"from": "gpt", "value": " ".join(words[TURN // 2 :])},
      ]
    sample: dict[str, Any] = {"id": f"{i:012d}", "conversations": turns}
    if tiles:
      turns[0]["value"] = "<image>\n" + turns[0]["value"]
      sample["image"] = f"coco/train2017/{i % PICTURES:012d}.jpg"
    yield sample


def write(folder: Path, count: int) -> None:
  """Writes samples.json, the pictures that it names, and a tokenizer of its words."""
  from llava_sp_jax.data.conversation import TEMPLATES
  from llava_sp_jax.data.tokenizer import train_bpe

  images = folder / "coco" / "train2017"
  images.mkdir(parents=True)
  for i in range(PICTURES):
    Image.new("RGB", (640, 480)).save(images / f"{i:012d}.jpg", quality=50)
  v1 = TEMPLATES["v1"]
  train_bpe([" ".join(WORDS), v1.system, v1.before, v1.after] * 50, folder / "tokenizer", 2000)
  part = folder / "samples.json.part"
  with part.open("w") as file:
    for i, sample in enumerate(samples(count)):
      file.write((",\n" if i else "[") + json.dumps(sample))
    file.write("]\n")
  part.rename(folder / "samples.json")


def megabytes() -> float:
  """Returns the most memory that this process has had so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def settings(path: Path, folder: Path) -> tuple[Any, Any, Any]:
  """Returns the data settings, the tokenizer and the tile of a run on `path`."""
  from llava_sp_jax import config as config_lib
  from llava_sp_jax.data import anyres
  from llava_sp_jax.data.tokenizer import Tokenizer

  data = config_lib.DataConfig(
    path=str(path), image_folder=str(folder), tokenizer=str(folder / "tokenizer"),
    packing="first_fit", images_per_row=TILES, row_length=LENGTH, threads=2,
  )  # fmt: skip
  return data, Tokenizer(folder / "tokenizer"), anyres.Tile(336, 24, 6)


def imported(folder: Path, torch: bool) -> dict[str, float]:
  """Imports the libraries one after another, and returns the MB that each has added."""
  if not torch:
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
  found, before = {}, 0.0

  def add(name: str) -> None:
    nonlocal before
    found[name], before = megabytes() - before, megabytes()

  add("Python, numpy, Pillow")
  import grain  # noqa: F401

  add("grain, with jax")
  from llava_sp_jax.data.tokenizer import Tokenizer

  Tokenizer(folder / "tokenizer")
  add("transformers" + ", with torch" * torch)
  from llava_sp_jax.data import pipeline  # noqa: F401

  add("the rest")
  return found


def keep_lengths(path: Path, folder: Path) -> None:
  """Keeps the lengths that were drawn beside the data, and nothing else."""
  from llava_sp_jax.data import kept, lengths, measured, pipeline, quarantine

  data, tokenizer, tile = settings(path, folder)
  source = pipeline.open_parts(data, tile, "train")[0].source
  key = lengths.Lengths(source, tokenizer, data, tile, 0, quarantine.Quarantine()).key(0)
  sizes = draw(len(source), row_length=LENGTH)
  shutil.rmtree(kept.beside(path), ignore_errors=True)
  found = measured.Measured(sizes.lengths, sizes.lengths, sizes.tiles, {})
  found.save(kept.beside(path) / f"lengths-{key}.npz")


def opened(path: Path, folder: Path, batches: int) -> dict[str, Any]:
  """Opens the data as training does, and reads batches; returns seconds and MB behind each part."""
  from llava_sp_jax.data import pipeline, quarantine

  data, tokenizer, tile = settings(path, folder)
  found = {"MB, libraries": megabytes()}
  started, cpu, bad = time.monotonic(), time.process_time(), quarantine.Quarantine()
  source = pipeline.open_parts(data, tile, "train")[0].source
  source.fingerprint()
  found |= {"MB, opened": megabytes()}
  made = pipeline.make(data, tokenizer, tile, ROWS, 0, bad, folder=folder / "run")
  found["MB, planned"] = megabytes()
  next(made)
  found |= {
    "s, first batch": time.monotonic() - started,
    "CPU s, first batch": time.process_time() - cpu,
  }
  for _ in range(batches - 1):
    next(made)
  if bad.count:
    raise SystemExit(f"{bad.count} samples are longer than they were drawn")
  return {**found, "MB, batches": megabytes()}


def markdown(record: dict[str, Any]) -> str:
  """Returns the record as a page."""
  columns = list(next(iter(record["cases"].values())))
  lines = [
    "# Memory and start of the data pipeline",
    "",
    f"{record['samples']:,} synthetic samples in {record['bytes of samples.json'] / 1e9:.2f} GB of JSON, packed in "
    f"rows of {LENGTH} with {TILES} images; batches of {ROWS} rows. Memory is the peak of a process without a model, behind "
    "each part: libraries, the opened data, the planned first epoch, and batches with their images ahead "
    "(which do not depend on the number of samples). Lengths were known; the first start on JSON finds the samples, "
    "later ones do not. Made by `python benchmarks/data_memory.py`.",
    "",
    f"| | {' | '.join(columns)} |",
    "|---" * (len(columns) + 1) + "|",
    *[
      f"| {case} | {' | '.join(f'{found[c]:,.1f}' for c in columns)} |"
      for case, found in record["cases"].items()
    ],
    "",
    "What the libraries have of it, in MB, with the library that only tests need and without:",
    "",
    *[
      f"- {', '.join(f'{name} {value:,.0f}' for name, value in found.items())}"
      for found in record["imports"].values()
    ],
    "",
    f"Machine: {provenance.machine()}, shared with other work: seconds are upper bounds.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  """Measures every case in a process of its own, and writes a record if asked to."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", type=Path, required=True, help="for the data, about 2 GB")
  parser.add_argument("--samples", type=int, default=665_000)
  parser.add_argument("--batches", type=int, default=8)
  parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
  parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--imports", choices=["torch", "none"], help=argparse.SUPPRESS)
  options = parser.parse_args()
  folder = options.folder
  if options.keep:
    keep_lengths(options.keep, folder)
    return
  if options.imports:
    print(json.dumps(imported(folder, options.imports == "torch")))
    return
  if options.one:
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    print(json.dumps(opened(options.one, folder, options.batches)))
    return
  if not (folder / "samples.json").is_file():
    write(folder, options.samples)
  cases: dict[str, Any] = {}
  for case, name in CASES.items():
    if name == "packed" and not (folder / name).exists():
      pack = ["data", "pack", str(folder / "samples.json"), str(folder / name)]
      subprocess.run([sys.executable, "-m", "llava_sp_jax", *pack], check=True)
    again = [sys.executable, *sys.argv, "--one", str(folder / name)]
    if "first" in case:
      subprocess.run([*again[:-2], "--keep", str(folder / name)], check=True)
    done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
    cases[case] = {key: round(value, 2) for key, value in json.loads(done.stdout).items()}
    print(case, json.dumps(cases[case]), flush=True)
  imports = {}
  for kind in ("none", "torch"):
    again = [sys.executable, *sys.argv, "--imports", kind]
    done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
    imports[kind] = {key: round(value, 1) for key, value in json.loads(done.stdout).items()}
    print(kind, json.dumps(imports[kind]), flush=True)
  if options.out:
    size = (folder / "samples.json").stat().st_size
    record = {
      "samples": options.samples,
      "bytes of samples.json": size,
      "cases": cases,
      "imports": imports,
    }
    provenance.write(options.out, record)
    provenance.named(options.out, "md").write_text(markdown(record))


if __name__ == "__main__":
  main()
