"""Compares variants of the projector on easy-VQA; runs unattended and resumes where it stopped.

Usage: python scripts/ablation.py [--variants none pooling cropping@2+4+8 ..] [--seeds 5] [--scale 0.25]

A variant is any variant of the projector; @ and sizes of views in patches replace its default
views. Every variant is trained with the same seeds: the same initial tower and decoder, and the
same samples in the same order. Skips runs that OUT.json holds for the current sources. Prints the
cost before it starts; --dry-run prints only that. Writes OUT.json (a record for each run), OUT.md
(means, intervals, differences to `none`) and OUT.png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from run_easy_vqa import Job, command, run

from llava_sp_jax import provenance
from llava_sp_jax.progress import eta
from llava_sp_jax.results import interval

BASELINE = "none"
VARIANTS = (BASELINE, "pooling", "cropping", "both", "register")
KEYS = ("variant", "seed", "scale")
Record = dict[str, Any]


class Book:
  """Holds the records of OUT.json, each with the commit and the digest of its sources."""

  def __init__(self, out: Path):
    self.path = provenance.named(out, "json")
    held = json.loads(self.path.read_text()) if self.path.is_file() else {}
    self.records: list[Record] = held.get("figures", [])
    self._files: dict[str, Any] = held.get("sources", {})
    self._canary = {k: held[k] for k in ("canary", "confirmed") if k in held}
    self._sources = provenance.sources_of(out)
    self.digest = provenance.digest(provenance.fingerprints(self._sources))
    # Only records of sources that are known to compute the same are compared with each other.
    self._confirmed = held.get("confirmed", {}).get("sources") == self.digest
    older = {r["sources"] for r in self.records} if self._confirmed else set()
    self.same = {self.digest, *older}

  def find(self, job: Job) -> Record | None:
    """Returns the record of a run by the current sources, if there is one."""
    wanted = dataclasses.asdict(job)
    return next(
      (r for r in self.records if {k: r[k] for k in KEYS} == wanted and r["sources"] in self.same),
      None,
    )

  def add(self, record: Record) -> None:
    """Replaces an older record of the same run, and writes the file at once."""
    stamp = provenance.stamp(self._sources)
    if stamp["sources"] != self.digest:
      raise SystemExit(
        "the sources have changed while runs went on; what they found is not recorded"
      )
    if stamp["sources"] not in self._files and not self._confirmed:
      self._canary = {}
    self._files[stamp["sources"]] = stamp.pop("files")
    self.records = [r for r in self.records if any(r[k] != record[k] for k in KEYS)]
    self.records.append({**record, **stamp})
    used = {r["sources"] for r in self.records}
    self._files = {name: found for name, found in self._files.items() if name in used}
    content = {"figures": self.records, "sources": self._files, **self._canary}
    provenance.write_json(self.path, content)


def cost(todo: list[Job], out: Path, at_once: int) -> str:
  """Estimates the time of the runs from records of runs of the same length."""
  files = {provenance.named(out, "json"), *Path("docs/results").glob("easy_vqa_*.json")}
  held = [json.loads(path.read_text())["figures"] for path in files if path.is_file()]
  known = [
    r["seconds"] / r["scale"]
    for figures in held
    for r in figures
    if isinstance(r, dict) and set(KEYS) <= set(r)
  ]
  if not todo:
    return ""
  if not known:
    return ", how long a run takes is known after the first"
  seconds = statistics.median(known) * sum(job.scale for job in todo)
  return f", about {seconds / 60 / at_once:.0f} minutes by the records of {len(known)} runs"


def summary(records: list[Record]) -> list[dict[str, Any]]:
  """Returns a row for each variant: mean with its 95% interval, and the paired difference to
  BASELINE.
  """
  by_variant: dict[str, dict[int, float]] = {}
  for record in records:
    by_variant.setdefault(record["variant"], {})[record["seed"]] = 100 * record["accuracy"]
  base, rows = by_variant.get(BASELINE, {}), []
  for variant, found in by_variant.items():
    both = sorted(set(found) & set(base)) if variant != BASELINE else []
    rows.append(
      {
        "variant": variant,
        "seeds": len(found),
        **interval.of_mean(list(found.values())),
        "lowest": min(found.values()),
        "highest": max(found.values()),
        "paired": interval.of_mean([found[s] - base[s] for s in both]) if both else None,
        "pairs": len(both),
      }
    )
  return rows


def spread(row: dict[str, Any]) -> str:
  return f"{row['low']:.2f} to {row['high']:.2f}" if row["low"] is not None else "one seed"


def page(book: Book, records: list[Record], scale: float, out: Path, called: str) -> str:
  rows = summary(records)
  lines = [
    "# easy-VQA: variants of the projector",
    "",
    "Exact match of generated answers over the whole test split (9,673 questions), small LLaVA-SP",
    f"from scratch, both stages at `--scale {scale:g}`. Intervals are Student's, 95%, over seeds; a",
    f"difference to `{BASELINE}` is that of runs with the same seed and the same order of samples.",
    f"Made by `{called}`.",
    "",
    f"| variant | seeds | mean | 95% interval | lowest | highest | minus `{BASELINE}` | 95% interval |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    paired = row["paired"]
    against = f"{paired['mean']:+.2f} | {spread(paired)}" if paired else "- | -"
    lines.append(
      f"| {row['variant']} | {row['seeds']} | {row['mean']:.2f}% | {spread(row)} | "
      f"{row['lowest']:.2f}% | {row['highest']:.2f}% | {against} |"
    )
  kinds = sorted({kind for r in records for kind in r["by_kind"]})
  lines += [
    "",
    f"| variant | {' | '.join(kinds)} | seconds of a run, median |",
    "|---" * (len(kinds) + 2) + "|",
  ]
  for row in rows:
    mine = [r for r in records if r["variant"] == row["variant"]]
    means = [f"{100 * statistics.mean(r['by_kind'][kind] for r in mine):.2f}%" for kind in kinds]
    seconds = statistics.median(r["seconds"] for r in mine)
    lines.append(f"| {row['variant']} | {' | '.join(means)} | {seconds:.0f} |")
  commits = sorted({r["commit"] for r in records})
  machines = sorted({f"{r['machine']}, jax {r['versions']['jax']}" for r in records})
  lines += [
    "",
    f"Commits {', '.join(commits)}; {'; '.join(machines)}.",
    "",
    f"![mean and interval of each variant]({provenance.named(out, 'png').name})",
    "",
  ]
  return "\n".join(lines)


def picture(rows: list[dict[str, Any]], records: list[Record], path: Path) -> None:
  """Draws every seed as a point, and means with their intervals."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(1.4 + 1.1 * len(rows), 3.4), layout="constrained")
  for place, row in enumerate(rows):
    values = [100 * r["accuracy"] for r in records if r["variant"] == row["variant"]]
    axis.plot([place] * len(values), values, "o", color="#9bbfb2", markersize=4)
    low, high = (row["low"], row["high"]) if row["low"] is not None else (row["mean"],) * 2
    axis.errorbar(
      place,
      row["mean"],
      yerr=[[row["mean"] - low], [high - row["mean"]]],
      fmt="_",
      markersize=16,
      capsize=4,
      color="#2a7f62",
    )
  axis.set_xticks(range(len(rows)), [row["variant"] for row in rows], rotation=20)
  axis.set_ylabel("right answers, %")
  axis.grid(axis="y", alpha=0.3)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def shares(at_once: int) -> list[list[int]]:
  """Divides the cores among parallel runs; a single run gets all of them."""
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i::at_once] for i in range(at_once)] if at_once > 1 else [[]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME[@SIZE+SIZE..]")
  parser.add_argument(
    "--seeds", type=int, default=5, help="number of seeds 0, 1, .. for each variant (%(default)s)"
  )
  parser.add_argument(
    "--scale", type=float, default=0.25, help="multiplies the steps of both stages (%(default)s)"
  )
  parser.add_argument(
    "--at-once",
    type=int,
    default=1,
    help="number of parallel runs, which share the cores (%(default)s)",
  )
  parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="%(default)s")
  parser.add_argument("--data", default="data/easy_vqa", help="%(default)s")
  parser.add_argument(
    "--out",
    type=Path,
    default=Path("docs/results/easy_vqa_ablation"),
    help="output path without a suffix (%(default)s)",
  )
  parser.add_argument(
    "--pictures",
    type=Path,
    default=None,
    metavar="FOLDER",
    help="copies the report of the first run to FOLDER",
  )
  parser.add_argument("--dry-run", action="store_true", help="prints what there is to do and exits")
  return parser.parse_args(argv)


def main() -> None:
  options = parse()
  book = Book(options.out)
  jobs = [
    Job(variant, seed, options.scale)
    for seed in range(options.seeds)
    for variant in options.variants
  ]
  todo = [job for job in jobs if not book.find(job)]
  print(
    f"{len(jobs)} runs, {len(jobs) - len(todo)} of them on record for these sources; "
    f"{len(todo)} to do{cost(todo, options.out, options.at_once)}",
    flush=True,
  )
  if options.dry_run:
    return
  command("scripts/prepare_easy_vqa.py", "--out", options.data)
  free, started, done = shares(options.at_once), time.monotonic(), 0
  folder = options.runs / f"scale-{options.scale:g}-{book.digest}"
  folder.mkdir(parents=True, exist_ok=True)

  def one(job: Job) -> Path:
    report = folder / job.name / "report"
    if (report / "record.json").is_file():  # the command was stopped before it recorded the run
      return report
    cores = free.pop()
    try:
      return run(job, folder, options.data, cores, folder / f"{job.name}.log")
    finally:
      free.append(cores)

  failed: list[str] = []
  with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
    futures = {pool.submit(one, job): job for job in todo}
    for future in finished(pool, futures):
      job = futures[future]
      try:
        report = future.result()
      except SystemExit as error:
        failed.append(f"{job.name}: {error}")
        print(failed[-1], flush=True)
        continue
      record = json.loads((report / "record.json").read_text())
      book.add(record)
      show(book, options)
      if options.pictures and job == jobs[0]:
        shutil.copytree(report, options.pictures, dirs_exist_ok=True)
      done += 1
      left = (time.monotonic() - started) / done * (len(todo) - done)
      print(
        f"{job.name}: {record['accuracy']:.2%} in {record['seconds']} s; {done} of {len(todo)} "
        f"done, {eta(left)}",
        flush=True,
      )
  print(show(book, options))
  if failed:
    raise SystemExit(f"{len(failed)} of {len(todo)} runs failed: {'; '.join(failed)}")


def finished(pool: concurrent.futures.Executor, futures: Iterable[Any]) -> Iterator[Any]:
  """Yields futures as they finish; cancels the others when the consumer stops."""
  try:
    yield from concurrent.futures.as_completed(futures)
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def show(book: Book, options: argparse.Namespace) -> str:
  """Writes page and picture for the records of this scale; returns the page."""
  variants = list(dict.fromkeys([*options.variants, *(r["variant"] for r in book.records)]))
  records = sorted(
    (r for r in book.records if r["scale"] == options.scale and r["sources"] in book.same),
    key=lambda r: (variants.index(r["variant"]), r["seed"]),
  )
  if not records:
    return ""
  row = provenance.table().get(options.out.stem, {})
  text = page(book, records, options.scale, options.out, row.get("command", records[-1]["command"]))
  provenance.named(options.out, "md").write_text(text)
  picture(summary(records), records, provenance.named(options.out, "png"))
  return text


if __name__ == "__main__":
  main()
