"""Runs the demo on easy-VQA: prepares the data, trains both stages, evaluates, writes a report.

Usage: python scripts/run_easy_vqa.py [--variant pooling] [--seed 0] [--scale 1] [--runs runs/easy_vqa]

Prints each `llava-sp` command before it runs it. The same command resumes a killed job. Exits with
code 1 if the model answers fewer questions than README promises.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCES = "sources.txt"  # holds the hash of the package that trained a run
ATTEMPTS = "attempts.txt"  # holds the seconds of each unfinished attempt
CONFIG = "configs/easy_vqa.py"
# (least scale, least share of right answers) of the variant `pooling`, for any seed, as README
# promises.
PROMISED = ((3.0, 0.99), (1.0, 0.90))


@dataclasses.dataclass(frozen=True)
class Job:
  """One model: a variant of the projector (optionally with scales), a seed, a length of training."""

  variant: str  # NAME or NAME@SIZE+SIZE.., sizes of the views in patches
  seed: int
  scale: float

  @property
  def options(self) -> str:
    """The options of the recipe."""
    variant, _, scales = self.variant.partition("@")
    return f"variant={variant},scales={scales},seed={self.seed},scale={self.scale:g}"

  @property
  def name(self) -> str:
    return f"{self.variant}-{self.seed}"


def command(*arguments: str, cores: Sequence[int] = (), log: Path | None = None) -> None:
  """Prints a command, and runs `llava-sp` or a script with this Python.

  `cores` are those it may use (none: all), `log` a file for what it prints (none: the terminal).
  """
  llava_sp = arguments[0] == "-m"
  shown = ["llava-sp", *arguments[2:]] if llava_sp else ["python", *arguments]
  if not log:
    print(f"\n$ {shlex.join(shown)}", flush=True)
  taken = ["taskset", "--cpu-list", ",".join(map(str, cores))] if cores else []
  with log.open("a") if log else open(os.devnull, "w") as file:
    output: Any = file if log else None
    done = subprocess.run(
      [*taken, sys.executable, *arguments], check=False, stdout=output, stderr=output
    )
  if done.returncode:
    told = f"; what it printed is in {log}" if log else ""
    raise SystemExit(f"{shlex.join(shown)}: ended with code {done.returncode}{told}")


def run(
  job: Job, runs: Path, data: str, cores: Sequence[int] = (), log: Path | None = None
) -> Path:
  """Runs both stages, evaluation and report; returns the report's folder, which holds record.json."""
  from llava_sp_jax.results import scores

  base = runs / job.name
  options = f"{job.options},data={data}"
  record, started = base / "report/record.json", time.monotonic()
  base.mkdir(parents=True, exist_ok=True)
  refuse_older(base, record)

  def llava_sp(*arguments: str) -> None:
    try:
      command("-m", "llava_sp_jax.cli", *arguments, cores=cores, log=log)
    except BaseException:
      with (base / ATTEMPTS).open("a") as file:
        file.write(f"{time.monotonic() - started:.1f}\n")
      raise

  llava_sp("train", f"--config={CONFIG}:stage=pretrain,{options}", f"--workdir={base}/pretrain")
  llava_sp(
    "train",
    f"--config={CONFIG}:stage=finetune,init={base}/pretrain,{options}",
    f"--workdir={base}/finetune",
  )
  llava_sp("eval", f"--checkpoint={base}/finetune", f"--data={data}", f"--out={base}/eval")
  llava_sp(
    "report",
    "--runs",
    f"{base}/pretrain",
    f"{base}/finetune",
    f"--scores={base}/eval",
    f"--out={base}/report",
  )
  kinds = scores.read(base / "eval/scores.json").by_kind
  found = {
    "variant": job.variant,
    "seed": job.seed,
    "scale": job.scale,
    "accuracy": kinds["all"]["accuracy"],
    "by_kind": {kind: values["accuracy"] for kind, values in kinds.items() if kind != "all"},
    "seconds": taken(base, time.monotonic() - started),
  }
  record.write_text(json.dumps(found) + "\n")
  return base / "report"


def refuse_older(base: Path, record: Path) -> None:
  """Exits if other sources made a finished run: its answers are not those of the current ones."""
  from llava_sp_jax import provenance

  made_by, now = base / SOURCES, provenance.digest(provenance.fingerprints(provenance.EVERYTHING))
  if record.is_file() and made_by.is_file() and made_by.read_text().strip() != now:
    raise SystemExit(
      f"{base}: finished, but by other sources than these; remove it, or give --runs"
    )
  made_by.write_text(f"{now}\n")


def taken(base: Path, seconds: float) -> int:
  """Returns the seconds of a job with its unfinished attempts; a finished job keeps its seconds."""
  record = base / "report/record.json"
  if record.is_file():
    return int(json.loads(record.read_text())["seconds"])
  return round(seconds + before(base))


def before(base: Path) -> float:
  """Sums the seconds of earlier attempts."""
  attempts = base / ATTEMPTS
  return sum(map(float, attempts.read_text().split())) if attempts.is_file() else 0.0


def broken_promise(job: Job, accuracy: float) -> str:
  """Returns a sentence if README promises more of this job, otherwise nothing."""
  least = next((share for scale, share in PROMISED if job.scale >= scale), 0.0)
  if job.variant != "pooling" or accuracy >= least:
    return ""
  return (
    f"{accuracy:.2%} of the answers are right, where README promises at least {least:.0%}: something "
    "on this machine or in these versions computes otherwise; please report it with "
    f"{job.name}/report/record.json and `pip list`"
  )


def show_answers(report: Path, count: int = 6) -> None:
  lines = (report.parent / "eval/predictions.jsonl").read_text().splitlines()
  print("\nsome answers:")
  for line in lines[:: max(1, len(lines) // count)][:count]:
    row = json.loads(line)
    right = row["verdict"].get("score") == 1
    mark = "right" if right else f"wrong, truth: {row['truth']}"
    print(f"  {Path(row['images'][0]).name:>9}  {row['question']:<45} {row['text']:<10} ({mark})")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--variant",
    default="pooling",
    metavar="NAME[@SIZE+SIZE..]",
    help="projector: none, pooling, cropping or any other (%(default)s); "
    "sizes of its views in patches",
  )
  parser.add_argument(  # the former name
    "--row", dest="variant", default=argparse.SUPPRESS, help=argparse.SUPPRESS
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--scale", type=float, default=1.0, help="multiplies the steps of both stages (%(default)s)"
  )
  parser.add_argument("--runs", type=Path, default=Path("runs/easy_vqa"), help="%(default)s")
  parser.add_argument("--data", default="data/easy_vqa", help="%(default)s")
  return parser.parse_args(argv)


def main() -> None:
  options = parse()
  command("scripts/prepare_easy_vqa.py", "--out", options.data)
  job = Job(options.variant, options.seed, options.scale)
  report = run(job, options.runs, options.data)
  show_answers(report)
  record = json.loads((report / "record.json").read_text())
  print(f"\naccuracy {100 * record['accuracy']:.2f}% on the test split, {record['seconds']} s")
  print(f"report: {report}/report.md (with loss.png, accuracy.png, answers.png)")
  if broken := broken_promise(job, record["accuracy"]):
    raise SystemExit(broken)


if __name__ == "__main__":
  main()
