"""The main job on easy-VQA: prepares the data, trains both stages, evaluates, writes a report.

Usage: python scripts/run_easy_vqa.py [--row pooling] [--seed 0] [--scale 1] [--runs runs/easy_vqa]

Each stage is a `llava-sp` command that it prints first; a killed job goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROWS = ("none", "pooling", "cropping")
CONFIG = "configs/easy_vqa.py"


def command(*arguments: str) -> None:
  """Runs `llava-sp` or a script with this Python, and shows the command."""
  print("\n$ " + shlex.join(["llava-sp" if arguments[0] == "-m" else "python", *arguments[2:]])
        if arguments[0] == "-m" else "\n$ python " + shlex.join(arguments), flush=True)  # fmt: skip
  done = subprocess.run([sys.executable, *arguments], check=False)
  if done.returncode:
    raise SystemExit(done.returncode)


def llava_sp(*arguments: str) -> None:
  command("-m", "llava_sp_jax.cli", *arguments)


def job(row: str, seed: int, scale: float, runs: Path, data: str, config: str = CONFIG) -> Path:
  """Both stages, evaluation and report for one row and seed; returns the report's folder."""
  base = runs / f"{row}-{seed}"
  options = f"row={row},seed={seed},scale={scale},data={data}"
  started = time.monotonic()
  llava_sp("train", f"--config={config}:stage=pretrain,{options}", f"--workdir={base}/pretrain")
  llava_sp("train", f"--config={config}:stage=finetune,init={base}/pretrain,{options}",
           f"--workdir={base}/finetune")  # fmt: skip
  llava_sp("eval", f"--checkpoint={base}/finetune", f"--data={data}", f"--out={base}/eval")
  llava_sp("report", "--runs", f"{base}/pretrain", f"{base}/finetune", f"--scores={base}/eval",
           f"--out={base}/report")  # fmt: skip
  seconds = time.monotonic() - started
  record = {
    "row": row, "seed": seed, "seconds": first_seconds(base, seconds), "scale": scale,
    "accuracy": json.loads((base / "eval/scores.json").read_text())["by_kind"]["all"]["accuracy"],
    "machine": machine(),
  }  # fmt: skip
  (base / "report/record.json").write_text(json.dumps(record) + "\n")
  return base / "report"


def first_seconds(base: Path, seconds: float) -> int:
  """The time of the job when it was done; doing a finished job again does not replace it."""
  record = base / "report/record.json"
  return json.loads(record.read_text())["seconds"] if record.is_file() else round(seconds)


def machine() -> str:
  """What it ran on, for the record."""
  import platform

  return f"{os.cpu_count()} cores {platform.machine()}, CPU, Python {platform.python_version()}"


def show_answers(report: Path, count: int = 6) -> None:
  lines = (report.parent / "eval/predictions.jsonl").read_text().splitlines()
  print("\nsome answers:")
  for line in lines[:: max(1, len(lines) // count)][:count]:
    row = json.loads(line)
    right = row["verdict"].get("score") == 1
    mark = "right" if right else f"wrong, truth: {row['truth']}"
    print(f"  {Path(row['images'][0]).name:>9}  {row['question']:<45} {row['text']:<10} ({mark})")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--row", choices=ROWS, default="pooling", help="projector (%(default)s)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--scale", type=float, default=1.0,
                      help="multiplies the steps of both stages (%(default)s)")  # fmt: skip
  parser.add_argument("--runs", type=Path, default=Path("runs/easy_vqa"), help="%(default)s")
  parser.add_argument("--data", default="data/easy_vqa", help="%(default)s")
  options = parser.parse_args()
  command("scripts/prepare_easy_vqa.py", "--out", options.data)
  report = job(options.row, options.seed, options.scale, options.runs, options.data)
  show_answers(report)
  record = json.loads((report / "record.json").read_text())
  print(f"\naccuracy {100 * record['accuracy']:.2f}% on the test split, {record['seconds']} s")
  print(f"report: {report}/report.md (with loss.png, accuracy.png, answers.png)")


if __name__ == "__main__":
  main()
