"""The API reference: a directive that documents a room, and docstrings as they are written here.

Docstrings are plain text: `x` is code, `Args:`, `Returns:` and `Raises:` begin fields, a block that
is indented is code or a table. What else reStructuredText would read into them is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PACKAGE = Path(__file__).parents[2] / "llava_sp_jax"
SECTION = re.compile(r"(Args|Returns|Yields|Raises): *(.*)")
ITEM = re.compile(r"  (\w+): (.*)")
CODE = re.compile(r"(`+[^`]+`+)")
FIELDS = {"Args": "param {}", "Returns": "returns", "Yields": "yields", "Raises": "raises {}"}


def modules(room: str) -> list[str]:
  """The modules of a folder of the package, or the one of a file; names below the package."""
  folder = PACKAGE / room
  files = sorted(folder.glob("[!_]*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
  return [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]


def automodule(name: str, option: str = ":members:") -> list[str]:
  """The lines that document a module."""
  return [
    "```{eval-rst}",
    f".. automodule:: {PACKAGE.name}.{name}",
    f"   {option}",
    "   :ignore-module-all:",
    "```",
    "",
  ]


class Room(SphinxDirective):
  """Documents rooms: what a folder says of itself, then each module under a heading."""

  required_arguments = 1
  final_argument_whitespace = True

  def run(self) -> list[nodes.Node]:
    text: list[str] = []
    for room in self.arguments[0].split():
      if (PACKAGE / room).is_dir():
        text += automodule(room, ":no-members:")
      for name in modules(room):
        text += [f"## {name}", "", *automodule(name)]
    source, _ = self.get_source_info()
    found = nodes.Element()
    lines = StringList(text, source=source)
    self.state.nested_parse(lines, self.content_offset, found, match_titles=True)
    return found.children


def whole_code(lines: list[str]) -> list[str]:
  """Lines of running text; code that goes on in the next line is joined to one line."""
  one = lambda code: re.sub(r" *\n *", " ", code[0])  # noqa: E731
  return CODE.sub(one, "\n".join(lines)).splitlines()


def plain(text: str) -> str:
  """Text in which reStructuredText finds code alone."""
  parts = CODE.split(text)
  return "".join(
    f"``{part.strip('`')}``" + ("\\ " if re.match(r"\w", after) else "")
    if code
    else re.sub(r"([\\*|`_])|::$|^(\.\. |[A-Za-z0-9]+[.)] )", lambda m: "\\" + m[0], part)
    for code, part, after in zip(
      (i % 2 for i in range(len(parts))), parts, [*parts[1:], ""], strict=True
    )
  )


def field(section: str, lines: list[str]) -> Iterator[str]:
  """Fields of a section: one for each `name: text`, or one of everything."""
  name, items = FIELDS[section], []
  for line in lines:
    item = ITEM.fullmatch(line)
    if item and "{}" in name:
      items.append([item[1], item[2]])
    elif items:
      items[-1].append(line.strip())
  if items:
    for first, *rest in items:
      yield f":{name.format(first)}: {plain(' '.join(rest))}"
  else:
    yield f":{section}: {plain(' '.join(line.strip() for line in lines))}"
  yield ""


def paragraph(lines: list[str]) -> Iterator[str]:
  """One paragraph: running text, a list, code, or lines that keep their places."""
  indented = [line.startswith(" ") for line in lines]
  if section := SECTION.fullmatch(lines[0]):
    yield from field(section[1], [*([section[2]] if section[2] else []), *lines[1:]])
  elif all(indented):
    yield from ("::", "", *lines)
  elif any(indented) and not lines[0].startswith("- "):
    yield from (
      f"| {line[: -len(line.lstrip())] if line[0] == ' ' else ''}{plain(line.lstrip())}"
      for line in lines
    )
  else:
    for line in whole_code(lines):
      yield line[: len(line) - len(line.lstrip())] + plain(line.lstrip())
  yield ""


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
  """Lines between blank ones; a section begins a paragraph of its own."""
  held: list[str] = []
  for line in [*lines, ""]:
    if held and (not line.strip() or SECTION.fullmatch(line)):
      yield held
      held = []
    if line.strip():
      held.append(line.rstrip())


def docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
  lines[:] = [out for part in paragraphs(lines) for out in paragraph(part)]


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
  """Fields of a named tuple are in its signature."""
  return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
  app.add_directive("room", Room)
  app.connect("autodoc-process-docstring", docstring)
  app.connect("autodoc-skip-member", skip)
  return {"parallel_read_safe": True}
