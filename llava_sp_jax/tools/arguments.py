"""What the commands share in reading their arguments: one line for what is wrong, with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from llava_sp_jax import console
from llava_sp_jax.config import FORMER_NAMES, ConfigError

DIGITS = 18  # of a whole number: what 64 bits hold


class Parser(argparse.ArgumentParser):
  """A parser whose errors are one line; a mistyped option is told with the one that was meant.

  Options are found by their former names as well.
  """

  def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
    """Ends the process with code 2 for what it does not take."""
    known = [name for action in self._actions for name in action.option_strings]
    given = [present(text, known) for text in (sys.argv[1:] if args is None else args)]
    found, unknown = self.parse_known_args(given, namespace)
    if unknown:
      self.error(unknown_options(unknown, known))
    return found

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{console.one_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")


def whole(flag: str, text: str, least: int) -> int:
  """The number that was typed behind --flag. Raises: ConfigError for what counts nothing."""
  plain = text.isascii() and text.isdigit() and len(text) <= DIGITS
  if not plain or int(text) < least:
    raise ConfigError(f"--{flag}: expected a whole number from {least}, found {text!r:.40}")
  return int(text)


def present(text: str, known: Iterable[str]) -> str:
  """An argument with the present name of its option, where `known` has that and not the former."""
  flag, equals, value = text.partition("=")
  name = "--" + FORMER_NAMES.get(flag.removeprefix("--"), "")
  return f"{name}{equals}{value}" if flag not in known and name in known else text


def unknown_options(given: Sequence[str], known: Iterable[str]) -> str:
  """What to tell of options that a command does not have; of values among them nothing."""
  names = list(known)
  told = [text.partition("=")[0] for text in given if text.startswith("-")] or list(given)
  return ", ".join(f"unknown {name:.60}{_meant(name, names)}" for name in told)


def _meant(name: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return f" (did you mean {near[0]}?)" if near else ""
