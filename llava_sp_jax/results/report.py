"""Writes a report: a table, loss curves, bars by kind of question, a sheet of answers."""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import console, jsonl, storage
from llava_sp_jax.data import decode
from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.results import gallery, predictions, tables
from llava_sp_jax.results import scores as scores_lib
from llava_sp_jax.tasks.task import EvalError

RIGHT, INK = "#2a7f62", "#222222"
COLORS = {True: RIGHT, False: "#c0392b", None: "#888888"}  # of an answer: right, wrong, not scored
RECORD = ("step", "loss")  # keys that a record of a run must have
SHEET = (4, 6)  # rows, columns of the sheet of answers


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Reads the records of a run's metrics.jsonl; skips damaged lines.

  Raises: EvalError when there is no record.
  """
  records, _ = jsonl.objects(path.read_bytes().split(b"\n"))
  found = [r for r in records if all(isinstance(r.get(key), int | float) for key in RECORD)]
  if not found:
    raise EvalError(f"{path}: no record that can be read; a run writes one at each log")
  return found


def write(runs: Sequence[str], scores_folder: str, out: str) -> str:
  """Writes report.md, loss.png, accuracy.png, answers.png and scores.json to the folder `out`.

  Omits accuracy.png if there are no figures by kind (a server scores), and answers.png if no image
  is a file of its own (MMBench).

  Args:
    runs: run folders, whose loss curves are drawn.
    scores_folder: a result folder of `llava-sp eval`.
    out: the folder of the report.

  Returns: the text of report.md.
  Raises: FileNotFoundError when a run or the scores are missing; EvalError for damaged ones.
  """
  folder, source = Path(out), storage.place(scores_folder)
  places = [storage.place(run) for run in runs]
  needed = [source / scores_lib.FILE, source / predictions.FILE]
  needed += [place / "metrics.jsonl" for place in places]
  if missing := [str(path) for path in needed if not path.is_file()]:
    raise FileNotFoundError(
      f"no {', '.join(missing)}; --runs are folders of llava-sp train, --scores of llava-sp eval"
    )
  folder.mkdir(parents=True, exist_ok=True)
  scores = scores_lib.read(source / scores_lib.FILE)
  records = [r for r in predictions.read_file(source / predictions.FILE) if not r["error"]]
  if storage.remote(source) or source.resolve() != folder.resolve():
    (folder / scores_lib.FILE).write_bytes((source / scores_lib.FILE).read_bytes())
  curves = {place.name: read_lines(place / "metrics.jsonl") for place in places}
  pictures: tuple[tuple[str, Any, Any, str], ...] = (
    ("loss of each stage", loss_curves, curves, "loss.png"),
    ("accuracy by kind of question", score_bars, scores, "accuracy.png"),
    ("test images with question, answer and truth", answer_sheet, records, "answers.png"),
  )
  drawn = [f"![{what}]({name})" for what, draw, data, name in pictures if draw(data, folder / name)]
  page = "\n".join(
    [
      console.one_line(f"# {scores.task}: {tables.headline(scores)}"),
      "",
      console.one_line(
        f"Checkpoint `{_known(scores.checkpoint)}`, step {_known(scores.step)}; "
        f"{scores.protocol}; data {scores.data_hash}."
      ),
      "",
      tables.markdown(*tables.cells(scores)),
      "",
      *map(console.one_line, filter(None, (tables.interval(scores), tables.coverage(scores)))),
      "",
      *(console.one_line(_run_line(name, lines)) for name, lines in curves.items()),
      "",
      *drawn,
      "",
    ]
  )
  (folder / "report.md").write_text(page, encoding="utf-8")
  return page


def _known(value: str | int | None) -> str:
  return "?" if value is None else str(value)


def _run_line(name: str, lines: list[dict[str, Any]]) -> str:
  last = lines[-1]
  return (
    f"- `{name}`: {last['step']} steps, last loss {last['loss']:.4f}, "
    f"{last.get('steps_per_second', 0.0):.2f} steps/s, {last.get('quarantined', 0)} samples quarantined"
  )


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
  import matplotlib

  matplotlib.use("Agg")
  matplotlib.rcParams["text.parse_math"] = False  # questions may contain dollar signs
  from matplotlib import pyplot

  return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> bool:
  from matplotlib import pyplot

  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # of a script that the font lacks
    figure.savefig(path, dpi=110)
  pyplot.close(figure)
  return True


def loss_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> bool:
  """Draws the loss over steps to `path`, one panel a run of {name: records}; returns True."""
  figure, axes = _figure(4.5 * len(curves), 3.2, 1, len(curves))
  for axis, (name, lines) in zip(axes if len(curves) > 1 else [axes], curves.items(), strict=True):
    axis.plot([r["step"] for r in lines], [r["loss"] for r in lines], color=RIGHT)
    axis.set(title=name, xlabel="step", ylabel="loss (token mean)", ylim=(0, None))
    axis.grid(alpha=0.3)
  return _save(figure, path)


def score_bars(scores: scores_lib.BenchmarkScores, path: Path) -> bool:
  """Draws the headline's figure by kind of question to `path`; returns False if there is none."""
  rows = tables.bars(scores)
  if not rows:
    return False
  figure, axis = _figure(5.5, 3.2)
  bars = axis.bar(
    [console.one_line(kind) for kind, *_ in rows], [value for _, value, *_ in rows], color=RIGHT
  )
  axis.bar_label(bars, labels=[text for _, _, text, _ in rows], padding=2)
  axis.set(ylabel=tables.figure(scores), ylim=(0, 1.09 * tables.full(scores)))
  return _save(figure, path)


def answer_sheet(records: Sequence[predictions.Record], path: Path) -> bool:
  """Draws test images with question, answer and ground truth to the file `path`.

  The answers are chosen by `gallery.mixed`; those without a score are gray. Returns False if no
  image is a file of its own.
  """
  on_disk = [r for r in records if r["images"] and Path(r["images"][0]).is_file()]
  rows = gallery.mixed(on_disk, SHEET[0] * SHEET[1])
  pictures = [attempt(functools.partial(decode.read, row["images"][0])) for row in rows]
  found = zip(rows, pictures, strict=True)
  chosen = [(row, picture) for row, picture in found if not isinstance(picture, SampleError)]
  if not chosen:
    return False
  figure, axes = _figure(2.1 * SHEET[1], 2.8 * SHEET[0], *SHEET)
  for axis in axes.flat:
    axis.axis("off")
  for axis, (row, picture) in zip(axes.flat, chosen, strict=False):
    axis.imshow(picture)
    right = gallery.is_right(row)
    answer = f"{row['text']}  (truth: {row['truth']})" if right is False else row["text"]
    axis.set_title(textwrap.fill(console.safe(row["question"]), 30), fontsize=8, color=INK)
    axis.text(
      0.5,
      -0.06,
      console.safe(answer),
      transform=axis.transAxes,
      ha="center",
      va="top",
      fontsize=9,
      weight="bold",
      color=COLORS[right],
    )
  return _save(figure, path)
