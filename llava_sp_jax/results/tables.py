"""Formats scores as a headline, tables and bars, for the terminal, markdown and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_sp_jax import console
from llava_sp_jax.results.compare import Compared
from llava_sp_jax.results.scores import BenchmarkScores, Unscored

SHOWN = 3  # the most left-out questions that are named
COUNTS = ("items", "asked")  # keys of a row of `by_kind` that are counts; all others are figures
# Names of figures in [0, 1]. All others are points, or counts if they are integers.
SHARES = frozenset({"accuracy", "accuracy_plus", "precision", "recall", "f1", "yes_ratio", "anls"})


def number(value: float, name: str) -> str:
  """Formats a figure by its name: a share in percent, a count as it is, points with one decimal."""
  if name in SHARES:
    return f"{100 * value:.2f}%"
  return str(value) if isinstance(value, int) else f"{value:.1f}"


def headline(scores: BenchmarkScores) -> str:
  """Returns the headline and its metric as text, or why there is none."""
  if scores.headline is None:
    files = ", ".join(scores.submission)
    return f"{scores.metric} ({files})" if files else scores.metric
  return f"{number(scores.headline, figure(scores))} {scores.metric}"


def interval(scores: BenchmarkScores) -> str:
  """Returns the confidence interval with its quantity and method as text; "" if there is none."""
  found = scores.interval
  if not found:
    return ""
  mean, low, high = (f"{100 * value:.2f}%" for value in (found.mean, found.low, found.high))
  level = f"{100 * found.level:.0f}% interval"
  return f"{found.of}: {mean}, {level} {low} to {high} ({found.method})"


def coverage(scores: BenchmarkScores) -> str:
  """Returns a sentence on how many questions the headline covers, and why others are missing."""
  total, failed = scores.by_kind["all"], len(scores.failures)
  unjudged, bad, whole = scores.figures.get("unjudged"), scores.left_out, scores.questions
  limited = f", the first of {whole}: not the benchmark's result" if scores.asked < whole else ""
  parts = [
    f"Over {total['items']} of {total['asked']} questions{limited}",
    f"{failed} without an answer, see below" if failed else "",
    f"{unjudged} unjudged: the judge failed or said nothing that can be read{_failed(scores)}"
    if unjudged
    else "",
    f"{len(bad)} left out, whose truth or options are not understood: {_shown(bad)}" if bad else "",
  ]
  return "; ".join(filter(None, parts)) + "."


def _failed(scores: BenchmarkScores) -> str:
  """Returns the first failure of a judge, or ""."""
  reviews: Any = scores.figures.get("reviews", ())  # a list of objects, of the task's own keys
  first = next((review for review in reviews if review["error"]), None)
  return f", first at {first['id']} ({first['error']:.300})" if first else ""


def _shown(rows: Sequence[Unscored]) -> str:
  more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
  return ", ".join(f"{row.id} ({row.error})" for row in rows[:SHOWN]) + more


def figures(scores: BenchmarkScores) -> list[str]:
  """Returns the names of the figures by kind, such as accuracy, without the counts."""
  rows = scores.by_kind.values()
  return list(dict.fromkeys(name for row in rows for name in row if name not in COUNTS))


def figure(scores: BenchmarkScores) -> str:
  """Returns the name of the figure that is the headline; "" if there are no figures.

  It is the one that the metric mentions, or else the first.
  """
  names = figures(scores)
  words = scores.metric.lower().split()
  return next((name for name in names if name.lower() in words), next(iter(names), ""))


def bars(scores: BenchmarkScores) -> list[tuple[str, float, str, int]]:
  """Returns (kind, value, value as text, number of answers) of the headline's figure, by kind."""
  name = figure(scores)
  return [
    (kind, row[name], number(row[name], name), int(row["items"]))
    for kind, row in scores.by_kind.items()
    if name in row
  ]


def full(scores: BenchmarkScores) -> float:
  """Returns the value of a bar of full length: 1 for shares, the largest value for points."""
  return (
    1.0 if figure(scores) in SHARES else max((row[1] for row in bars(scores)), default=0) or 1.0
  )


def cells(scores: BenchmarkScores) -> tuple[list[str], list[list[str]]]:
  """Returns (head, rows) of the table of figures by kind, as texts."""
  names = figures(scores)
  rows = [
    [
      kind,
      str(row["items"]),
      str(row["asked"]),
      *(number(row[name], name) if name in row else "" for name in names),
    ]
    for kind, row in scores.by_kind.items()
  ]
  return ["questions", "answered", "asked", *names], rows


def together(several: Sequence[BenchmarkScores]) -> tuple[list[str], list[list[str]]]:
  """Returns (head, rows) of a table of the scores of several tasks, one a row, as texts."""
  rows = []
  for scores in several:
    total, found = scores.by_kind["all"], scores.interval
    spread = (  # which is not that of a headline such as an F1
      f"{100 * found.mean:.2f}%, {100 * found.low:.2f}% to {100 * found.high:.2f}%" if found else ""
    )
    rows.append(
      [
        scores.task,
        scores.variant.get("protocol", ""),
        headline(scores),
        spread,
        f"{total['items']} of {total['asked']}",
      ]
    )
  return ["task", "protocol", "score", "mean score of the answers, 95% interval", "scored"], rows


def listed() -> tuple[list[str], list[list[str]]]:
  """Returns (head, rows) of the table of all benchmarks, with a row for each protocol, as texts."""
  from llava_sp_jax.tasks.catalog import TASKS

  rows = []
  for name, task in TASKS.items():
    others = [o for o in task.options if o not in ("protocol", "judge", "reviews")]
    reads = ", ".join(getattr(task, "needed", ())) or (task.__init__.__doc__ or "").split(".")[0]
    protocols = getattr(task, "protocols", None)
    described = (
      {key: rules.says for key, rules in protocols.items()} if protocols else {"": task.protocol}
    )
    for place, (key, says) in enumerate(described.items()):
      first = [name, ", ".join(others), reads] if not place else [""] * 3
      rows.append([first[0], key, says, *first[1:]])
  return ["task", "protocol", "which", "--option", "reads"], rows


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in markdown; escapes the texts of its cells."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
  return console.one_line(text).replace("\\", "\\\\").replace("|", "\\|")


def flips(found: Compared) -> str:
  """Returns a sentence about the counts of a comparison."""
  return (
    f"Against {found.folder}, of {found.both} questions that both answered: {found.fixed} "
    f"fixed, {found.broken} broken, {found.changed} in other words with the same score "
    f"(McNemar's exact test: p = {found.p_value:.2g})."
  )


def draw(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a table: drawn on a terminal, and as markdown otherwise."""
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  drawn, title = Console(), console.one_line(title)
  if not drawn.is_terminal:
    print(f"{title}\n\n{markdown(head, rows)}\n" if title else markdown(head, rows))
    return
  table = Table(*head, title=Text(title) if title else None)
  for row in rows:
    table.add_row(*(Text(console.one_line(cell)) for cell in row))  # without rich's markup
  drawn.print(table)


def show(scores: BenchmarkScores) -> None:
  """Prints the scores of a task, and its comparison with another run if there is one."""
  draw(f"{scores.task} ({scores.protocol}): {headline(scores)}", *cells(scores))
  compared = flips(scores.compared) if scores.compared else ""
  for line in (interval(scores), coverage(scores), compared):
    if line:
      print(console.one_line(line))
