"""The command lines that README.md, CONTRIBUTING.md, docs/*.md and the recipes show, as words, with where they stand."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import runs
from llava_sp_jax.data import sources
from tests.conftest import REPOSITORY

PAGES = (
  REPOSITORY / "README.md",
  REPOSITORY / "CONTRIBUTING.md",
  *sorted((REPOSITORY / "docs").glob("*.md")),
)
RECIPES = tuple(sorted((REPOSITORY / "configs").glob("*.py")))
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
VARIABLE = re.compile(r"\w+=")  # set for one command: `PYTHONPATH=deps python x.py`
PROGRAM = re.compile(r"(\S*/)?(llava-sp|python[\d.]*|bash|pip) ")


@dataclasses.dataclass(frozen=True)
class Command:
  """One command. In running text it may be a part of one: `llava-sp check --images all`."""

  file: str
  line: int
  words: tuple[str, ...]
  partial: bool = False

  def __str__(self) -> str:
    return f"{self.file}:{self.line}: {' '.join(self.words)}"

  @property
  def program(self) -> str:
    return re.sub(r"[\d.]+$", "", Path(self.words[0]).name)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
  """In place of the checkpoint and the data file that a recipe reads: default sizes, ten samples."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, "read_config", lambda folder: config_lib.Config())
    patch.setattr(sources, "open_path", lambda *_: [{}] * 10)
    yield


def commands() -> list[Command]:
  """All of them, from top to bottom."""
  found = [command for page in PAGES for command in of_page(page.read_text(), name(page))]
  for recipe in RECIPES:
    first = recipe.read_text().splitlines()[0]
    found += split(first[first.index("llava-sp ") :], name(recipe), 1)
  return found


def name(path: Path) -> str:
  return str(path.relative_to(REPOSITORY))


def of_page(text: str, file: str) -> Iterator[Command]:
  """Lines of blocks marked as bash (others: those that begin with a program of ours), and spans."""
  held, held_at = "", 0
  for number, (block, line) in enumerate(blocks(text), 1):
    if block == "bash" or (block == "" and PROGRAM.match(line)):
      held, held_at = held + line, held_at or number
      if held.endswith("\\"):
        held = held[:-1] + " "
        continue
      yield from split(held, file, held_at)
      held, held_at = "", 0
  yield from spans(prose(text), file)


def blocks(text: str) -> Iterator[tuple[str | None, str]]:
  """Each line with the language of its block: None for running text, and "-" for the fences."""
  block: str | None = None
  for line in text.splitlines():
    if line.startswith("```"):
      block = line.removeprefix("```").strip() if block is None else None
      yield "-", line
    else:
      yield block, line


def prose(text: str) -> str:
  """The same lines with nothing in the blocks."""
  return "\n".join(line if block is None else "" for block, line in blocks(text))


def split(line: str, file: str, number: int, partial: bool = False) -> Iterator[Command]:
  """The commands of a line of shell, joined by && or ||, in braces or not. `...` is left out."""
  lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
  lexer.whitespace_split = True
  words: list[str] = []
  for word in [*lexer, ";"]:
    if set(word) <= set("&|;"):
      given = without_dots([w for w in words if w not in ("{", "}")])
      given = tuple(itertools.dropwhile(VARIABLE.match, given))
      if given:
        yield Command(file, number, given, partial or "..." in words)
      words = []
    else:
      words.append(word)


def without_dots(words: list[str]) -> tuple[str, ...]:
  """`a --b ... c` -> `a c`: an option whose value is left out is left out."""
  pairs = itertools.pairwise([*words, ""])
  return tuple(w for w, after in pairs if w != "..." and not (w[:2] == "--" and after == "..."))


def spans(text: str, file: str) -> Iterator[Command]:
  """Commands and options within `...`; `a|b` stands for each of them."""
  for match in SPAN.finditer(text):
    span = " ".join(match[1].split()).replace("\\|", "|")
    number = text.count("\n", 0, match.start()) + 1
    if PROGRAM.match(span) or span.startswith("--config."):
      choices = [word.split("|") for word in without_dots(shlex.split(span))]
      for words in itertools.product(*(expanded(c) for c in choices)):
        yield Command(file, number, words, partial=True)


def expanded(choices: list[str]) -> list[str]:
  """["--x=a", "b"] -> ["--x=a", "--x=b"]."""
  head, equals, first = choices[0].rpartition("=")
  return [head + equals + choice for choice in (first, *choices[1:])]
