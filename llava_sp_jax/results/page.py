"""Writes the page of a result: bars, answers with their images, flips and failures.

The page is one HTML file that contains its styles, bars as SVG, and thumbnails as `data:` URIs.
ElementTree builds it, and escapes the texts of models and data sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from llava_sp_jax.results import gallery, predictions, published, tables
from llava_sp_jax.results.compare import Flip, Flips
from llava_sp_jax.results.predictions import Record
from llava_sp_jax.results.scores import BenchmarkScores

FILE = "index.html"
WRONG, RIGHT, FLIPS, FAILURES = 36, 24, 24, 200  # the most that are shown of each
LONGEST = 400  # the most characters of a text that are shown
BAR, LABEL = (420, 18), 40  # width and height of the longest bar in pixels; characters of a label

Pictures = Mapping[str, Sequence[Path | bytes]]  # item id -> its images
Element = ElementTree.Element

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #222; background: #fff }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.2rem }
.note { color: #666 } .big { font-size: 2.2rem; font-weight: 600 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.published { border-left: 4px solid #b8860b; padding-left: 1rem }
.cards { display: flex; flex-wrap: wrap; gap: .8rem }
.card { border: 1px solid #ccc; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere;
  box-sizing: border-box; width: 12.5rem }
.card img { display: block; max-width: 100%; margin: 0 auto .4rem }
.card p { margin: .2rem 0; white-space: pre-wrap }
.right { border-top: 4px solid #2a7f62 } .wrong { border-top: 4px solid #c0392b }
.unsaid { border-top: 4px solid #888 } .kind { color: #666; font-size: .85em }
svg { font-size: 13px }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 }
  .note, .kind { color: #aaa } .card { border-color: #444 } }
"""


def tag(name: str, /, *children: Element | str | None, **attributes: object) -> Element:
  """Builds an element; the attribute `class_` becomes `class`, `text_anchor` `text-anchor`."""
  names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
  element = ElementTree.Element(name, {names[k]: str(v) for k, v in attributes.items()})
  last = None
  for child in children:
    if isinstance(child, str):
      if last is None:
        element.text = (element.text or "") + child
      else:
        last.tail = (last.tail or "") + child
    elif child is not None:
      element.append(child)
      last = child
  return element


def write(
  folder: Path,
  scores: BenchmarkScores,
  records: Sequence[Record],
  pictures: Pictures,
  flips: Flips | None = None,
) -> Path:
  """Writes `index.html` to `folder` and returns its path.

  Args:
    folder: the result folder.
    scores: those of the result.
    records: the answers, in the order of the items.
    pictures: the images of each item by its id.
    flips: differences from another run; None without one.
  """
  title = f"{scores.task}: {tables.headline(scores)}"
  body = tag(
    "body",
    tag("h1", scores.task),
    _headline(scores),
    *_bars(scores),
    *_published(scores),
    *_flips(flips, pictures),
    *_answers(records, pictures),
    *_failures(scores),
    *_settings(scores),
  )
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag("title", title),
    tag("style", STYLE),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
  )
  tree = ElementTree.tostring(tag("html", head, body, lang="en"), "unicode", method="html")
  text = "<!DOCTYPE html>\n" + tree + "\n"
  predictions.replace(folder / FILE, text.encode("utf-8", "replace").decode())
  return folder / FILE


def _headline(scores: BenchmarkScores) -> Element:
  lines = [tag("p", tables.headline(scores), class_="big")]
  if sure := tables.interval(scores):
    lines.append(tag("p", sure, class_="note"))
  lines.append(tag("p", tables.coverage(scores)))
  lines.append(tag("p", f"protocol: {scores.protocol}", class_="note"))
  return tag("div", *lines)


def _bars(scores: BenchmarkScores) -> Iterable[Element]:
  rows = tables.bars(scores)
  if not rows:
    return
  scale = tables.full(scores)
  width, height = BAR
  left = 16 + 8 * min(LABEL, max(len(name) for name, *_ in rows))
  marks = []
  for i, (name, value, text, items) in enumerate(rows):
    y, long = i * (height + 6), max(0.0, value) / scale * width
    label = name if len(name) <= LABEL else f"{name[: LABEL - 1]}…"
    figure = f"{text} of {items}"
    marks += [
      tag("text", label, x=left - 8, y=y + 13, text_anchor="end", fill="currentColor"),
      tag("rect", x=left, y=y, width=f"{long:.1f}", height=height, fill="#2a7f62"),
      tag("text", figure, x=f"{left + 6 + long:.1f}", y=y + 13, fill="currentColor"),
    ]
  total = (left + width + 150, len(rows) * (height + 6))
  yield tag("h2", f"By kind: {tables.figure(scores)}")
  yield tag(
    "svg", *marks, viewBox=f"0 0 {total[0]} {total[1]}", width=total[0], height=total[1], role="img"
  )


def _published(scores: BenchmarkScores) -> Iterable[Element]:
  rows = published.beside(scores)
  if not rows:
    return
  cells = [
    tag("tr", tag("td", name), tag("td", f"{value:g}", class_="number")) for name, value in rows
  ]
  yield tag("h2", "Published by others")
  yield tag(
    "div",
    tag(
      "p",
      "These figures were not measured here. They are quoted from their authors, and stand "
      "here for comparison; their protocol is that of LLaVA's own scripts.",
    ),
    tag("table", *cells),
    tag("p", f"Source: {published.SOURCE}", class_="note"),
    class_="published",
  )


def _flips(flips: Flips | None, pictures: Pictures) -> Iterable[Element]:
  if flips is None:
    return
  yield tag("h2", "Flips")
  yield tag("p", tables.flips(flips.counts()))
  for note in flips.notes:
    yield tag("p", note, class_="note")
  groups = (("Fixed", flips.fixed), ("Broken", flips.broken), ("Changed", flips.changed))
  for name, group in groups:
    if group:
      shown = f", {FLIPS} shown" if len(group) > FLIPS else ""
      yield tag("h3", f"{name}: {len(group)}{shown}")
      yield tag("div", *(_flip(flip, pictures) for flip in group[:FLIPS]), class_="cards")


def _flip(flip: Flip, pictures: Pictures) -> Element:
  return _card(flip.here, pictures, tag("p", f"before: {shortened(flip.there['text'])}"))


def _answers(records: Sequence[Record], pictures: Pictures) -> Iterable[Element]:
  answered = [r for r in records if not r["error"]]
  groups = (
    ("Wrong answers", False, WRONG),
    ("Right answers", True, RIGHT),
    ("Answers", None, RIGHT),
  )
  for name, right, limit in groups:
    rows = [r for r in answered if gallery.is_right(r) is right]
    if rows:
      chosen = gallery.spread(rows, limit)
      yield tag("h2", f"{name}: {len(rows)}, {len(chosen)} shown")
      yield tag("div", *(_card(r, pictures) for r in chosen), class_="cards")


def _card(record: Record, pictures: Pictures, *more: Element) -> Element:
  found = (gallery.thumbnail(picture) for picture in pictures.get(record["id"], ()))
  images = [tag("img", src=uri, alt="") for uri in found if uri]
  right = gallery.is_right(record)
  truth = record["truth"]
  score = record["verdict"].get("score")
  lines = [
    tag("p", f"{record['id']} · {record['kind']}", class_="kind"),
    tag("p", shortened(record["question"])),
    tag("p", tag("b", shortened(record["text"]) or "(empty)")),
  ]
  if truth is not None and not right:
    lines.append(tag("p", f"truth: {shortened(_text(truth))}"))
  if score not in (None, 0, 1):
    lines.append(tag("p", f"score: {score:.2f}"))
  look = {True: "right", False: "wrong", None: "unsaid"}[right]
  return tag("div", *images, *lines, *more, class_=f"card {look}")


def _failures(scores: BenchmarkScores) -> Iterable[Element]:
  failures = scores.failures
  yield tag("h2", f"Without an answer: {len(failures)}")
  if failures:
    rows = [tag("tr", tag("td", f.id), tag("td", shortened(f.error))) for f in failures]
    yield tag("table", *rows[:FAILURES])
    if len(rows) > FAILURES:
      yield tag("p", f"and {len(rows) - FAILURES} more, all in scores.json", class_="note")


def _settings(scores: BenchmarkScores) -> Iterable[Element]:
  names = (
    "checkpoint",
    "step",
    "fingerprint",
    "inputs",
    "model",
    "generation",
    "version",
    "data_hash",
    "engine",
    "sessions",
    "seconds",
    "figures",
    "submission",
  )
  rows = [
    tag("tr", tag("td", name), tag("td", shortened(_text(value), 4 * LONGEST)))
    for name in names
    if (value := getattr(scores, name)) not in (None, "", (), {})
  ]
  yield tag("h2", "How it was made")
  yield tag("table", *rows)


def _text(value: object) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(text: str, longest: int = LONGEST) -> str:
  """Returns a text as it is, or its first `longest` characters and its length if it is longer."""
  return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
