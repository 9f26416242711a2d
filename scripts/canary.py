"""The first steps of a result, bit by bit: whether changed sources still compute the same.

Usage: python scripts/canary.py [--variants none pooling cropping both register] [--scale 0.005]

Trains each variant for some steps of both stages and answers some questions, as scripts/ablation.py
does at length. Prints a hash of all losses, as written, and of all answers with their verdicts. Where it is the hash that
was kept beside a result, on the same kind of machine and with the same versions, sources that were
renamed, moved or rewritten since compute what the result was made with (`results.py --confirm`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path

from ablation import VARIANTS
from run_easy_vqa import CONFIG, Job, command

QUESTIONS = 200
SAME = ("step", "loss", "grad_norm", "token_accuracy")  # of a line of metrics: no rates


def short_run(job: Job, folder: Path, data: str) -> list[str]:
  """Losses and answers of one short job, as text."""
  log, options = folder / "log", f"{job.options},data={data}"

  def llava_sp(*arguments: str) -> None:
    # On one core, so that sums are made in one order on a machine of any size.
    command("-m", "llava_sp_jax.cli", *arguments, cores=[min(os.sched_getaffinity(0))], log=log)

  stages = {"pretrain": "", "finetune": f",init={folder}/pretrain"}
  for stage, init in stages.items():
    llava_sp("train", f"--config={CONFIG}:stage={stage}{init},{options}",
             f"--workdir={folder}/{stage}", "--config.train.log_every=5")  # fmt: skip
  llava_sp("eval", f"--checkpoint={folder}/finetune", f"--data={data}", f"--out={folder}/eval",
           f"--limit={QUESTIONS}")  # fmt: skip
  lines = []
  for stage in stages:
    for text in (folder / stage / "metrics.jsonl").read_text().splitlines():
      values = json.loads(text)
      lines.append(json.dumps({key: values[key] for key in SAME if key in values}))
  answers = (folder / "eval/predictions.jsonl").read_text().splitlines()
  for line in answers:
    values = json.loads(line)
    lines.append(json.dumps([values["text"], values["verdict"]]))
  scores = json.loads((folder / "eval/scores.json").read_text())
  return [*lines, json.dumps(scores["by_kind"])]


def canary(variants: list[str], scale: float, data: str) -> str:
  """The hash over all variants."""
  digest = hashlib.sha256()
  for variant in variants:
    with tempfile.TemporaryDirectory() as folder:
      digest.update("\n".join(short_run(Job(variant, 0, scale), Path(folder), data)).encode())
  return digest.hexdigest()[:16]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
  parser.add_argument("--scale", type=float, default=0.005)
  parser.add_argument("--data", default="data/easy_vqa")
  options = parser.parse_args()
  command("scripts/prepare_easy_vqa.py", "--out", options.data)
  print(canary(options.variants, options.scale, options.data))


if __name__ == "__main__":
  main()
