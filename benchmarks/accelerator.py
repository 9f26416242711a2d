"""Measures llava_sp_jax on this accelerator in nine minutes: one JSON object per line.

Usage: python benchmarks/accelerator.py [--seconds 540] [--only rates,train] [--out accelerator]
       [--checkpoint runs/easy_vqa/pooling-0/finetune --data data/easy_vqa]

Runs on one GPU or TPU. Needs no network, torch only for the peer, and no weights but those of the checkpoint;
others are random. Sections, in this order: peer, rates, correct, train, decode, prefill, engine, flips,
variants (docs/accelerator.md says what each measures). A part that fails reports why and does not
stop the others; a part without time left is reported, too. OUT.json and its page OUT.md are
complete after every line. --tiny runs everything on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import os

from accelerator_record import Record

# section: the file and the function that measure it, imported when the section starts.
SECTIONS = {
  "peer": ("accelerator_peer", "peer"),  # first, while no memory of the device is held
  "rates": ("accelerator_arithmetic", "rates"),
  "correct": ("accelerator_arithmetic", "correct"),
  "train": ("accelerator_training", "train"),
  "decode": ("accelerator_answers", "decode"),
  "prefill": ("accelerator_answers", "prefill"),
  "engine": ("accelerator_answers", "engine"),
  "flips": ("accelerator_flips", "flips"),
  "variants": ("accelerator_training", "variants"),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=540, help="for all of it (540)")
  parser.add_argument("--only", default=",".join(SECTIONS), help="sections, divided by commas")
  parser.add_argument("--out", default="", help="writes OUT.json and OUT.md")
  parser.add_argument(
    "--size", default="auto", choices=("auto", "7b", "1b"), help="of the decoder; auto: by memory"
  )
  parser.add_argument(
    "--peak",
    type=float,
    default=0.0,
    help="bf16 TFLOP/s of a device that llava_sp_jax.hardware does not know",
  )
  parser.add_argument("--checkpoint", default="", help="run folder of the demo, for flips")
  parser.add_argument("--data", default="", help="folder of scripts/prepare_easy_vqa.py, for flips")
  parser.add_argument("--tiny", action="store_true", help="a few seconds a section, on a CPU")
  options = parser.parse_args(argv)
  options.only = [name for name in options.only.split(",") if name]
  if unknown := [name for name in options.only if name not in SECTIONS]:
    parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
  if bool(options.checkpoint) != bool(options.data):
    parser.error("--checkpoint and --data belong together: give both, or neither")
  return options


def main(argv: list[str] | None = None) -> Record:
  options = arguments(argv)
  # jax reads this when it is imported. Its default of 75% of a card would hide what fits.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
  record = Record(options)
  for name in (name for name in SECTIONS if name in options.only):
    file, function = SECTIONS[name]
    record.part(name, 0, lambda: getattr(importlib.import_module(file), function)(record))  # noqa: B023
  return record


if __name__ == "__main__":
  main()
