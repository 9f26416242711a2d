"""Measures conversion of a checkpoint with real shapes, beside a file copy and transformers.

Usage: python benchmarks/convert_memory.py [--size 13b] [--layers 6] [--out docs/results/conversion]

Writes random bfloat16 weights in the original's merged layout (a LLaMA of the given size with fewer
layers, the cropping projector with all its 763 M spatial weights, the CLIP-L tower). Then copies
the files, converts them, and loads the decoder with transformers, each in its own process. Prints
GB/s and the peak resident memory of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llava_sp_jax import provenance

SIZES = {  # width, heads, MLP width, layers
  "7b": (4096, 32, 11008, 32),
  "13b": (5120, 40, 13824, 40),
}


def make(folder: Path, size: str, layers: int) -> None:
  """Yields the checkpoint tensor by tensor; values are small random numbers."""
  import dataclasses

  import jax.numpy as jnp
  import numpy as np
  from flax.traverse_util import flatten_dict

  from llava_sp_jax import config as config_lib
  from llava_sp_jax.convert import export, formats, leaves
  from llava_sp_jax.convert.loaded import Loaded
  from llava_sp_jax.models import build

  width, heads, mlp, _ = SIZES[size]
  text = config_lib.LanguageModelConfig(
    width=width, heads=heads, kv_heads=heads, layers=layers, head_dim=width // heads, mlp_width=mlp
  )
  model = config_lib.ModelConfig(language_model=text)
  dtype = np.dtype(jnp.bfloat16)

  @dataclasses.dataclass(frozen=True)
  class Random(leaves.Leaf):
    def read(self, index: leaves.Index | None = None) -> np.ndarray:
      index = index or (slice(None),) * len(self.shape)
      shape = [len(range(*s.indices(n))) for s, n in zip(index, self.shape, strict=True)]
      bits = np.random.default_rng(0).integers(0, 1 << 14, shape, dtype=np.uint16)
      return bits.view(dtype)  # below 2 in size, never NaN

  flat = flatten_dict(build.abstract(model), sep="/")
  random: leaves.Leaves = {p: Random(p, leaf.shape, dtype) for p, leaf in flat.items()}
  config = config_lib.Config(model=model)
  export.export(Loaded("random", config, random, formats.PARTS, None), "llava", folder)


def bound(size: str, layers: int) -> float:
  """Returns the limit of memory in GB: twice the largest stacked leaf, plus one."""
  width, _, mlp, _ = SIZES[size]
  return 2 * max(layers * width * mlp, 24 * 24 * 1024 * 512) * 2 / 1e9 + 1


def copy(folder: Path, out: Path) -> int:
  shutil.copytree(folder, out)
  os.sync()
  return size_of(out)


def convert(folder: Path, out: Path) -> int:
  from llava_sp_jax import cli

  if cli.main(["convert", str(folder), str(out)]):
    raise SystemExit(1)
  os.sync()
  return size_of(folder)


def load(folder: Path, out: Path) -> int:
  """Loads the decoder with transformers, which does not know the rest."""
  import torch
  import transformers

  config = json.loads((folder / "config.json").read_text())
  config.update(model_type="llama", architectures=["LlamaForCausalLM"])
  loaded = transformers.LlamaForCausalLM.from_pretrained(
    folder, config=transformers.LlamaConfig(**config), dtype=torch.bfloat16
  )
  for parameter in loaded.parameters():  # the loader maps the files; reading them is the work
    parameter.data = parameter.data.clone()
  return sum(p.numel() * p.element_size() for p in loaded.parameters())


WAYS = {
  "file copy": copy,
  "llava-sp convert": convert,
  "transformers, into memory (decoder only)": load,
}


def size_of(folder: Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def measure(way: str, folder: Path, out: Path) -> None:
  """Runs one way in this process and prints its time and memory."""
  started = time.monotonic()
  count = WAYS[way](folder, out)
  seconds = time.monotonic() - started
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(
    json.dumps(
      {
        "way": way,
        "gb": count / 1e9,
        "seconds": seconds,
        "gb_per_second": count / 1e9 / seconds,
        "peak_gb": peak / 1e9,
      }
    )
  )


def run(arguments: list[str]) -> str:
  done = subprocess.run(
    [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
  )
  return done.stdout.splitlines()[-1] if done.stdout else ""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="13b")
  parser.add_argument("--layers", type=int, default=6, help="of the decoder (%(default)s)")
  parser.add_argument("--out", type=Path, default=Path("docs/results/conversion"))
  parser.add_argument("--folder", type=Path, help="where to work; emptied afterwards")
  parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
  parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.make:
    return make(options.folder / "in", options.size, options.layers)
  if options.way:
    return measure(options.way, options.folder / "in", options.folder / "out")
  with tempfile.TemporaryDirectory(dir=options.folder) as work:
    run(["--make", "--folder", work, "--size", options.size, "--layers", str(options.layers)])
    records = []
    for way in WAYS:
      records.append(json.loads(run(["--way", way, "--folder", work])))
      shutil.rmtree(Path(work) / "out", ignore_errors=True)
      print(records[-1], flush=True)
  machine = f"{os.cpu_count()} cores {platform.machine()}, CPU, Python {platform.python_version()}"
  total = SIZES[options.size][3]
  lines = [
    "# Conversion: speed and memory",
    "",
    f"A {options.size} LLaVA-SP-Cropping in bfloat16 with {options.layers} of {total} decoder",
    "layers, random weights; each way in a process of its own. A conversion",
    "reads, transposes, checks and writes every value; its bound is twice the largest stacked leaf",
    f"plus 1 GB: {bound(options.size, options.layers):.2f} GB. Made by",
    f"`python benchmarks/convert_memory.py --size {options.size} --layers {options.layers}`.",
    "",
    "| way | GB | seconds | GB/s | peak memory, GB |",
    "|---|---|---|---|---|",
    *(
      f"| {r['way']} | {r['gb']:.2f} | {r['seconds']:.1f} | {r['gb_per_second']:.2f} | "
      f"{r['peak_gb']:.2f} |"
      for r in records
    ),
    "",
    f"Machine: {machine}.",
  ]
  provenance.named(options.out, "md").write_text("\n".join(lines) + "\n")
  records = [
    {**r, "size": options.size, "layers": options.layers, "machine": machine} for r in records
  ]
  provenance.write(options.out, records)
  print("\n".join(lines))
  return None


if __name__ == "__main__":
  main()
