"""A directive that shows an executed notebook: its text, its code, and the outputs that it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def joined(text: str | list[str]) -> str:
  """The text of a cell or an output, which a notebook holds as one string or as lines."""
  return text if isinstance(text, str) else "".join(text)


def block(language: str, text: str) -> str:
  """A fenced block of Markdown."""
  return f"````{language}\n{text}\n````"


def output(held: dict[str, Any]) -> Iterator[str]:
  """One output as Markdown: a picture, or what was printed."""
  data = held.get("data", {})
  if "image/png" in data:
    source = joined(data["image/png"]).replace("\n", "")
    html = f'<img alt="output of the cell above" src="data:image/png;base64,{source}">'
    yield block("{raw} html", html)
  elif text := joined(held.get("text", data.get("text/plain", ""))).strip("\n"):
    yield block("text", text)


def markdown(notebook: dict[str, Any]) -> Iterator[str]:
  """The cells as Markdown, without the title: the page has its own."""
  for cell in notebook["cells"]:
    text = joined(cell["source"])
    if cell["cell_type"] == "markdown":
      yield text.partition("\n")[2] if text.startswith("# ") else text
    else:
      yield block("python", text)
      for held in cell["outputs"]:
        yield from output(held)


class Notebook(SphinxDirective):
  """Shows the cells of the notebook whose path, from the page, is the argument.

  Behind its title the notebook begins with a section: what stands before the first one would come
  last.
  """

  required_arguments = 1

  def run(self) -> list[nodes.Node]:
    _, path = self.env.relfn2path(self.arguments[0])
    self.env.note_dependency(path)
    text = "\n\n".join(markdown(json.loads(Path(path).read_text())))
    found = nodes.Element()
    lines = StringList(text.splitlines(), source=path)
    self.state.nested_parse(lines, self.content_offset, found, match_titles=True)
    return found.children


def setup(app: Sphinx) -> dict[str, bool]:
  app.add_directive("notebook", Notebook)
  return {"parallel_read_safe": True}
