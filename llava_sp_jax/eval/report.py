"""Results to look at: a table, loss curves, bars by kind of question, a sheet of answers."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RIGHT, WRONG, INK = "#2a7f62", "#c0392b", "#222222"
SHEET = (4, 6)  # rows, columns of the sheet of answers


def score_table(scores: dict[str, Any]) -> str:
  """The scores as a markdown table."""
  lines = ["| questions | items | accuracy |", "|---|---|---|"]
  for kind, row in scores["by_kind"].items():
    lines.append(f"| {kind} | {row['items']} | {100 * row['accuracy']:.2f}% |")
  if scores["failed"]:
    lines.append(f"| not answered (image unreadable) | {len(scores['failed'])} | - |")
  return "\n".join(lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def write(runs: Sequence[str], scores_folder: str, out: str) -> str:
  """Writes report.md with loss.png, accuracy.png, answers.png and scores.json; returns the page.

  Raises: FileNotFoundError when a run or the scores are not there.
  """
  folder, source = Path(out), Path(scores_folder)
  needed = [source / "scores.json", source / "predictions.jsonl"]
  needed += [Path(run) / "metrics.jsonl" for run in runs]
  if missing := [str(path) for path in needed if not path.is_file()]:
    raise FileNotFoundError(
      f"no {', '.join(missing)}; --runs are folders of llava-sp train, --scores of llava-sp eval"
    )
  folder.mkdir(parents=True, exist_ok=True)
  scores = json.loads((source / "scores.json").read_text())
  predictions = read_lines(source / "predictions.jsonl")
  if source.resolve() != folder.resolve():
    shutil.copy(source / "scores.json", folder / "scores.json")
  curves = {Path(run).name: read_lines(Path(run) / "metrics.jsonl") for run in runs}
  loss_curves(curves, folder / "loss.png")
  accuracy_bars(scores, folder / "accuracy.png")
  answer_sheet(predictions, folder / "answers.png")
  page = "\n".join(
    [
      f"# {scores['task']}: {100 * scores['by_kind']['all']['accuracy']:.2f}%",
      "",
      f"Checkpoint `{scores.get('checkpoint', '?')}`, step {scores.get('step', '?')}; "
      f"{scores['protocol']}; data {scores['data_hash']}.",
      "",
      score_table(scores),
      "",
      *(_run_line(name, lines) for name, lines in curves.items()),
      "",
      "![loss of each stage](loss.png)",
      "![accuracy by kind of question](accuracy.png)",
      "![test images with question, answer and truth](answers.png)",
      "",
    ]
  )
  (folder / "report.md").write_text(page)
  return page


def _run_line(name: str, lines: list[dict[str, Any]]) -> str:
  last = lines[-1]
  return (
    f"- `{name}`: {last['step']} steps, last loss {last['loss']:.4f}, "
    f"{last.get('steps_per_second', 0.0):.2f} steps/s, {last['quarantined']} samples quarantined"
  )


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
  from matplotlib import pyplot

  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def loss_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
  """One panel a run: loss over steps."""
  figure, axes = _figure(4.5 * len(curves), 3.2, 1, len(curves))
  for axis, (name, lines) in zip(axes if len(curves) > 1 else [axes], curves.items(), strict=True):
    axis.plot([r["step"] for r in lines], [r["loss"] for r in lines], color=RIGHT)
    axis.set(title=name, xlabel="step", ylabel="loss (token mean)", ylim=(0, None))
    axis.grid(alpha=0.3)
  _save(figure, path)


def accuracy_bars(scores: dict[str, Any], path: Path) -> None:
  """Accuracy by kind of question."""
  kinds = scores["by_kind"]
  figure, axis = _figure(5.5, 3.2)
  values = [100 * row["accuracy"] for row in kinds.values()]
  bars = axis.bar(list(kinds), values, color=RIGHT)
  axis.bar_label(bars, fmt="%.1f%%", padding=2)
  axis.set(ylabel="accuracy, %", ylim=(0, 109))
  _save(figure, path)


def answer_sheet(predictions: list[dict[str, Any]], path: Path) -> None:
  """Test images with question, answer and truth: from the whole split, some mistakes among them."""
  from PIL import Image

  chosen = sheet_rows(predictions, SHEET[0] * SHEET[1])
  figure, axes = _figure(2.1 * SHEET[1], 2.8 * SHEET[0], *SHEET)
  for axis in axes.flat:
    axis.axis("off")
  for axis, row in zip(axes.flat, chosen, strict=False):
    with Image.open(row["image"]) as picture:
      axis.imshow(picture.convert("RGB"))
    answer = row["text"] if row["right"] else f"{row['text']}  (truth: {row['truth']})"
    axis.set_title(textwrap.fill(row["question"], 30), fontsize=8, color=INK)
    axis.text(0.5, -0.06, answer, transform=axis.transAxes, ha="center", va="top", fontsize=9,
              weight="bold", color=RIGHT if row["right"] else WRONG)  # fmt: skip
  _save(figure, path)


def sheet_rows(predictions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
  """Rows for the sheet: at most a quarter are mistakes, each from another image."""
  rows: list[dict[str, Any]] = []
  for wanted, limit in ((False, count // 4), (True, count)):
    by_image: dict[str, list[dict[str, Any]]] = {}
    for r in predictions:
      if r["right"] is wanted:
        by_image.setdefault(r["image"], []).append(r)
    pool = [rs[i % len(rs)] for i, rs in enumerate(by_image.values())]  # first, second, .. question
    room = min(limit, count - len(rows))
    rows += pool[:: max(1, len(pool) // max(1, room))][:room]
  return sorted(rows, key=lambda r: r["id"])
