"""The table over projector rows and seeds on easy-VQA; unattended, goes on where it was stopped.

Usage: python scripts/easy_vqa_table.py [--scale 1] [--seeds 3] [--out docs/results/easy_vqa]

Writes OUT.json (records row, seed, accuracy, seconds, machine) and OUT.md with mean and spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from run_easy_vqa import ROWS, command, job


def page(records: list[dict], scale: float) -> str:
  lines = [
    "# easy-VQA: three projectors", "",
    "Exact match of generated answers over the whole test split (9,673 questions), small LLaVA-SP",
    "from scratch; each record is one seed of both stages at `--scale " + f"{scale:g}`. Seconds are",
    "wall time of both stages, evaluation and report on the machine named. Made by",
    "`python scripts/easy_vqa_table.py --scale " + f"{scale:g}`.", "",
    "| row | mean | lowest | highest | standard deviation | seeds | seconds, mean |",
    "|---|---|---|---|---|---|---|",
  ]  # fmt: skip
  for row in ROWS:
    mine = [r for r in records if r["row"] == row]
    if not mine:
      continue
    values = [100 * r["accuracy"] for r in mine]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    seconds = statistics.mean(r["seconds"] for r in mine)
    lines.append(
      f"| {row} | {statistics.mean(values):.2f}% | {min(values):.2f}% | {max(values):.2f}% | "
      f"{spread:.2f} | {len(values)} | {seconds:.0f} |"
    )
  lines += ["", f"Machine: {records[0]['machine']}.", ""]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--scale", type=float, default=1.0, help="of the steps (%(default)s)")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--runs", type=Path, default=Path("runs/easy_vqa_table"), help="%(default)s")
  parser.add_argument("--data", default="data/easy_vqa", help="%(default)s")
  parser.add_argument("--out", type=Path, default=Path("docs/results/easy_vqa"))
  options = parser.parse_args()
  command("scripts/prepare_easy_vqa.py", "--out", options.data)
  records = []
  for seed in range(options.seeds):
    for row in ROWS:
      record = options.runs / f"{row}-{seed}" / "report" / "record.json"
      if not record.is_file():
        job(row, seed, options.scale, options.runs, options.data)
      found = json.loads(record.read_text())
      records.append({k: found[k] for k in ("row", "seed", "accuracy", "seconds", "machine")})
      options.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
      options.out.with_suffix(".md").write_text(page(records, options.scale))
  print(page(records, options.scale))


if __name__ == "__main__":
  main()
