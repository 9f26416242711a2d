"""Compares packed rows with padding and length buckets: fill of rows, and tokens per second.

Usage: python benchmarks/packing.py [--seconds 20] [--samples 32768] [--out docs/results/packing]

Lengths follow a model of LLaVA's 665K mixture (benchmarks/mixture.py). The fill is that of the
planner at full size, beside an upper bound of any packing (linear programming over whole rows). The
speed is that of the package's train step on a small model, with all lengths divided by SHRINK:
tokens per second without padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from pathlib import Path
from typing import Any

import mixture
import numpy as np
from scipy.optimize import linprog

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance
from llava_sp_jax.data import packing

SHRINK = 8
GRID = 8  # patches along a side of the small model's image
IMAGE = GRID * GRID + 6  # its tokens
WAYS = (  # name, packing, row length, tiles of a row, rows of the small model's batch
  ("plain padding", "none", 2048, 1, 12),
  ("length buckets", "buckets", 2048, 1, 12),
  ("packed, rows of 2048", "first_fit", 2048, 3, 12),
  ("balanced, 2 samples a row", "balanced", 2048, 3, 12),
  ("packed, rows of 4096", "first_fit", 4096, 6, 6),
)
SAMPLES = 2  # of a row, on average, where the packing keeps the number of samples of a batch
NEARLY_FULL = 0.95  # the bound takes a minute and is computed only below this fill
UNIT = 16  # tokens to which the bound rounds lengths down


def bound(sizes: packing.Sizes, length: int, tiles: int) -> float:
  """Computes a fill that no packing exceeds: Gilmore and Gomory's columns, Farley's bound, rounded
  sizes.
  """
  capacity = length // UNIT
  pairs = np.stack([np.maximum(sizes.lengths // UNIT, 1), sizes.tiles], 1)
  kinds, counts = np.unique(pairs, axis=0, return_counts=True)
  columns = [np.eye(len(kinds))[i] for i in range(len(kinds))]
  best = 0.0
  for _ in range(2000):
    solved = linprog(np.ones(len(columns)), A_ub=-np.array(columns).T, b_ub=-counts)
    value, column = fullest(-solved.ineqlin.marginals, kinds, capacity, tiles)
    best = max(best, solved.fun / max(1.0, value))
    if value <= 1 + 1e-6:
      break
    columns.append(column)
  return min(1.0, float(sizes.lengths.sum() / (best * length)))


def fullest(
  values: np.ndarray, kinds: np.ndarray, capacity: int, tiles: int
) -> tuple[float, np.ndarray]:
  """Finds the most valuable row, and how many of each kind it holds."""
  worth = np.zeros((capacity + 1, tiles + 1))
  choice = np.full((capacity + 1, tiles + 1), -1)
  for c in range(1, capacity + 1):
    for m in range(tiles + 1):
      worth[c, m] = worth[c - 1, m]
      fits = np.flatnonzero((kinds[:, 0] <= c) & (kinds[:, 1] <= m))
      if len(fits):
        with_one = values[fits] + worth[c - kinds[fits, 0], m - kinds[fits, 1]]
        if with_one.max() > worth[c, m] + 1e-12:
          worth[c, m], choice[c, m] = with_one.max(), fits[with_one.argmax()]
  column, c, m = np.zeros(len(kinds)), capacity, tiles
  while c > 0:
    kind = choice[c, m]
    if kind < 0:
      c -= 1
      continue
    column[kind] += 1
    c, m = c - kinds[kind, 0], m - kinds[kind, 1]
  return float(worth[capacity, tiles]), column


def shape_of(key: str, length: int, tiles: int, batch: int) -> packing.Shape:
  """Returns the room of a batch; a packing that counts samples gets SAMPLES of them a row."""
  counted = packing.PACKINGS[key].counted
  return packing.Shape(length, tiles, batch, samples=SAMPLES * batch if counted else 0)


def fills(count: int) -> list[dict[str, Any]]:
  """Measures the fill of the planner at full size."""
  sizes, records = mixture.draw(count), []
  few = mixture.draw(packing.WINDOW)
  for name, key, length, tiles, _ in WAYS:
    shape = shape_of(key, length, tiles, 128)
    started = time.process_time()
    rows = packing.plan(packing.PACKINGS[key], sizes, shape, 0, 0)
    spent, fill = time.process_time() - started, packing.fill(rows, sizes)
    asks = key == "first_fit" and fill < NEARLY_FULL
    records.append(
      {
        "way": name,
        "row_length": length,
        "images_per_row": tiles,
        "fill": fill,
        "rows": len(rows),
        "plan_cpu_seconds_per_100k": spent / count * 1e5,
        "bound": bound(few, length, tiles) if asks else None,
      }
    )
    print(records[-1], flush=True)
  return records


def small_config(length: int, tiles: int, batch: int) -> config_lib.Config:
  values = {
    "model": {
      "tower": {
        "image_size": GRID * 4,
        "patch_size": 4,
        "width": 64,
        "layers": 3,
        "heads": 2,
        "mlp_width": 256,
      },
      "language_model": {
        "vocab_size": 2048,
        "width": 128,
        "layers": 4,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 32,
        "mlp_width": 352,
      },
      "projector": {"variant": "pooling", "token_width": 32},
      "lora": {"rank": 8, "alpha": 16.0},
      "dtype": "float32",
      "frozen_dtype": "float32",
      "remat": "none",
      "scan_unroll": 4,
    },
    "data": {"row_length": length, "images_per_row": tiles},
    "train": {"batch_size": batch},
  }
  return config_lib.from_dict(values)


def row_of(
  row: packing.PackedRow, sizes: packing.Sizes, tiles: int, rng: Any
) -> dict[str, np.ndarray]:
  """Makes random words and images of the planned sizes."""
  from llava_sp_jax.data import example

  parts, first = [], 0
  for segment, i in enumerate(row.samples, 1):
    shown = int(sizes.tiles[i])
    words = int(sizes.lengths[i]) - shown * IMAGE
    ids = (1, *[example.IMAGE_ID] * shown, *rng.integers(3, 2000, words - 1).tolist())
    supervised = tuple(2 * place > len(ids) for place in range(len(ids)))
    plans = [example.one_tile(IMAGE)] * shown
    parts.append(
      example.layout([example.Run(ids, supervised)], plans, row.length, tiles, segment, first)
    )
    first += shown
  images = np.zeros((tiles, GRID * 4, GRID * 4, 3), np.float32)
  images[:first] = rng.standard_normal((first, *images.shape[1:]))
  return {**example.join(parts, row.length).arrays(), "images": images}


def speed(way: tuple[str, str, int, int, int], seconds: float) -> dict[str, Any]:
  """Runs steps of the small model for about so many seconds, after all its programs are compiled."""
  import jax

  from llava_sp_jax.distributed import mesh as mesh_lib
  from llava_sp_jax.models import build
  from llava_sp_jax.training import setup

  name, key, length, tiles, batch = way
  length //= SHRINK
  config = small_config(length, tiles, batch)
  sizes = mixture.draw(4096, seed=1, shrink=SHRINK)
  excess = mixture.IMAGE // SHRINK - IMAGE  # the small image is some tokens shorter
  sizes = dataclasses.replace(sizes, lengths=sizes.lengths - excess * sizes.tiles)
  shape = shape_of(key, length, tiles, batch)
  rows = list(packing.plan(packing.PACKINGS[key], sizes, shape, 0, 0))
  batches = [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
  rng = np.random.default_rng(0)
  mesh = mesh_lib.create(config.mesh, batch)

  def put(some: list[packing.PackedRow]) -> dict[str, Any]:
    made = [row_of(row, sizes, tiles, rng) for row in some]
    return mesh_lib.put_batch({k: np.stack([m[k] for m in made]) for k in made[0]}, mesh)

  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    key_ = jax.random.key(0)
    warm = {some[0].length: some for some in batches}
    for some in warm.values():
      state, metrics = step(state, put(some), key_)
    jax.block_until_ready(metrics)
    used = places = steps = 0
    spent = 0.0
    for some in batches:
      ready = jax.block_until_ready(put(some))
      before = time.perf_counter()
      state, metrics = step(state, ready, key_)
      jax.block_until_ready(metrics)
      spent += time.perf_counter() - before
      used += sum(int(sizes.lengths[i]) for row in some for i in row.samples)
      places += sum(row.length for row in some)
      steps += 1
      if spent > seconds:
        break
  return {
    "way": name,
    "tokens_per_second": used / spent,
    "fill": used / places,
    "steps": steps,
    "seconds": spent,
    "programs": step._cache_size(),
  }


def report(full: list[dict[str, Any]], small: list[dict[str, Any]], machine: str) -> str:
  plain = small[0]["tokens_per_second"]
  lines = [
    "# Packing: how full rows are, and what it is worth",
    "",
    "Lengths are a model of LLaVA's 665K mixture (`benchmarks/mixture.py`). The planner at full",
    "size, images of 582 tokens, one epoch; `bound` is what no packing at all can exceed on these",
    "lengths: rows of 2048 do not divide well by samples of 582 and their text. Made by",
    "`python benchmarks/packing.py`.",
    "",
    "| | row length | images a row | places that hold a token | bound | rows |",
    "|---|---|---|---|---|---|",
    *(
      f"| {r['way']} | {r['row_length']} | {r['images_per_row']} | {r['fill']:.1%} | "
      f"{'' if r['bound'] is None else format(r['bound'], '.1%')} | {r['rows']:,} |"
      for r in full
    ),
    "",
    f"The package's train step (LoRA, float32), a small model, all lengths divided by {SHRINK}.",
    "Attention computes whole rows here, so longer ones cost more. The kernel for TPUs skips what",
    "the samples of a row do not see of each other, in rows of up to 2048.",
    "",
    "| | tokens a second, no padding | against plain padding | places used | programs | steps |",
    "|---|---|---|---|---|---|",
    *(
      f"| {r['way']} | {r['tokens_per_second']:,.0f} | {r['tokens_per_second'] / plain:.2f} | "
      f"{r['fill']:.1%} | {r['programs']} | {r['steps']} |"
      for r in small
    ),
    "",
    f"Machine: {machine}.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seconds", type=float, default=20, help="of steps a way (%(default)s)")
  parser.add_argument("--samples", type=int, default=32768, help="for the planner (%(default)s)")
  parser.add_argument("--out", type=Path, default=Path("docs/results/packing"))
  options = parser.parse_args()
  full = fills(options.samples)
  small = []
  for way in WAYS:
    small.append(speed(way, options.seconds))
    print(small[-1], flush=True)
  machine = (
    f"{os.cpu_count()} cores {platform.machine()}, CPU, Python "
    f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}"
  )
  text = report(full, small, machine)
  provenance.named(options.out, "md").write_text(text)
  records = {"fill": full, "speed": small, "machine": machine, "samples": options.samples}
  provenance.write(options.out, records)
  print(text)


if __name__ == "__main__":
  main()
