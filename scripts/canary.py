"""Prints a hash of the first steps of a result, to check that changed sources compute the same.

Usage: python scripts/canary.py [--recipe smollm2] [--variants none pooling cropping] [--scale 0.005]

Trains each variant for some steps of both stages and answers some questions, like
scripts/ablation.py and scripts/easy_vqa_smollm2.sh, but shorter. The hash covers all losses, as
written, and all answers with their verdicts. `results.py --confirm` compares it with the hash that
is stored beside a result. Equal hashes on the same kind of machine and with the same versions mean
that sources that were renamed, moved or rewritten compute the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ablation import VARIANTS
from run_easy_vqa import CONFIG, Job, command

QUESTIONS = 200
SAME = ("step", "loss", "grad_norm", "token_accuracy")  # fields of a line of metrics, without rates


def easy_vqa(variant: str, scale: float, folder: Path, data: str, core: int) -> None:
  """Runs both stages and the answers of one short job of configs/easy_vqa.py."""
  options = f"{Job(variant, 0, scale).options},data={data}"

  def llava_sp(*arguments: str) -> None:
    command("-m", "llava_sp_jax.cli", *arguments, cores=[core], log=folder / "log")

  for stage, init in {"pretrain": "", "finetune": f",init={folder}/pretrain"}.items():
    llava_sp(
      "train",
      f"--config={CONFIG}:stage={stage}{init},{options}",
      f"--workdir={folder}/{stage}",
      "--config.train.log_every=5",
    )
  llava_sp(
    "eval",
    f"--checkpoint={folder}/finetune",
    f"--data={data}",
    f"--out={folder}/eval",
    f"--limit={QUESTIONS}",
  )


def smollm2(variant: str, scale: float, folder: Path, data: str, core: int) -> None:
  """Runs scripts/easy_vqa_smollm2.sh shortly."""
  with (folder / "log").open("w") as log:
    done = subprocess.run(
      [
        "taskset",
        "--cpu-list",
        str(core),
        "bash",
        "scripts/easy_vqa_smollm2.sh",
        "--variant",
        variant,
        "--scale",
        f"{scale:g}",
        "--tower-steps",
        "30",
        "--limit",
        "40",
        "--data",
        data,
        "--runs",
        str(folder),
      ],
      check=False,
      stdout=log,
      stderr=log,
      env={**os.environ, "VENV": sys.prefix},
    )
  if done.returncode:
    raise SystemExit(f"{(folder / 'log').read_text()}\nscripts/easy_vqa_smollm2.sh: see above")


RECIPES = {"easy_vqa": easy_vqa, "smollm2": smollm2}


def bits(folder: Path) -> list[str]:
  """Returns the losses of every stage below `folder` and the answers with their verdicts, as text."""
  lines = []
  for metrics in sorted(folder.rglob("metrics.jsonl"), key=order):
    for text in metrics.read_text().splitlines():
      values = json.loads(text)
      lines.append(json.dumps({key: values[key] for key in SAME if key in values}))
  (answers,) = folder.rglob("predictions.jsonl")
  for line in answers.read_text().splitlines():
    values = json.loads(line)
    lines.append(json.dumps([values["text"], values["verdict"]]))
  scores = json.loads((answers.parent / "scores.json").read_text())
  return [*lines, json.dumps(scores["by_kind"])]


def order(metrics: Path) -> int:
  return ("tower", "pretrain", "finetune").index(metrics.parent.name)


def canary(recipe: str, variants: list[str], scale: float, data: str) -> str:
  """Returns the hash over all variants."""
  # On one core, so that sums have one order on every machine.
  digest, core = hashlib.sha256(), min(os.sched_getaffinity(0))
  for variant in variants:
    with tempfile.TemporaryDirectory() as folder:
      RECIPES[recipe](variant, scale, Path(folder), data, core)
      digest.update("\n".join(bits(Path(folder))).encode())
  return digest.hexdigest()[:16]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipe", choices=tuple(RECIPES), default="easy_vqa")
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
  parser.add_argument("--scale", type=float, default=0.005)
  parser.add_argument("--data", default="data/easy_vqa")
  options = parser.parse_args()
  command("scripts/prepare_easy_vqa.py", "--out", options.data)
  print(canary(options.recipe, options.variants, options.scale, options.data))


if __name__ == "__main__":
  main()
