"""Parses the arguments of commands; an error is one line and suggests the nearest option."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from llava_sp_jax import config as config_lib
from llava_sp_jax import console, recipes
from llava_sp_jax.config import FORMER_NAMES, ConfigError
from llava_sp_jax.infer.generation import Generation

DIGITS = 18  # of a whole number: what 64 bits hold
# The formats that a model may be held in while it answers; rows of the tables that the models have,
# which are not imported for a help text.
FORMATS = {
  "weights": "of the decoder's weight matrices, adapters folded in: none (floats), int8, int8_block, fp8, "
  "int4, int4_64, nf4, nf4_double",
  "cache": "of the keys and values of earlier positions: float, int8",
}

MESH = (
  "devices as DATA,FSDP,TENSOR: 1,1,4 divides kernels over four; -1: what is left (default: one)"
)
DTYPES = ("float32", "bfloat16")
DTYPE = "what the model computes in (default: the checkpoint's config)"


class Parser(argparse.ArgumentParser):
  """Parses arguments; an error is one line, and suggests an option for a mistyped one.

  Former names of options are accepted.
  """

  def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
    """Parses `args`, by default those of the process; exits with code 2 if they are wrong.

    `namespace` is that of argparse.
    """
    known = [name for action in self._actions for name in action.option_strings]
    given = [present(text, known) for text in (sys.argv[1:] if args is None else args)]
    found, unknown = self.parse_known_args(given, namespace)
    if unknown:
      self.error(unknown_options(unknown, known))
    return found

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{console.one_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")


class RecipeParser(Parser):
  """Parses the arguments of a command that reads a recipe.

  These are --config FILE[:OPTIONS], --config.GROUP.KEY=VALUE, and the options in `required` and in
  `optional` (with their defaults). Each option has one value.
  """

  def __init__(
    self, command: str, required: Sequence[str] = (), optional: Mapping[str, str] | None = None
  ):
    super().__init__(prog=f"llava-sp {command}", add_help=False, allow_abbrev=False)
    self._required = ("config", *required)
    for name, default in {**dict.fromkeys(self._required, ""), **(optional or {})}.items():
      self.add_argument(f"--{name}", dest=name, default=default)

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f"{message}; see {self.prog} --help")

  def read(
    self, argv: Sequence[str], check: Callable[[dict[str, str]], object] | None = None
  ) -> tuple[config_lib.Config, dict[str, str]]:
    """Returns the recipe's config with the overrides, and the other options by name.

    `check` is called with the options before the recipe runs.

    Raises: ConfigError for unknown or missing options and wrong values; FileNotFoundError for a
      file that a recipe needs.
    """
    known = [name for action in self._actions for name in action.option_strings]
    typed = [text.partition("=")[0] for text in argv if text.startswith("--config.")]
    for flag in dict.fromkeys(typed):
      self.add_argument(flag, dest=flag.removeprefix("--"))
    found, unknown = self.parse_known_args(argv)
    given = vars(found)
    overrides = {name: given.pop(name) for name in list(given) if name.startswith("config.")}
    problems = [f"no --{name}" for name in self._required if not given[name]]
    if unknown:
      problems.append(unknown_options(unknown, known))
    if problems:
      self.error(", ".join(problems))
    if check:
      check(given)
    return config_lib.override(recipes.load(given.pop("config")), overrides), given


def format_options(add: Callable[..., Any]) -> None:
  """Adds the options for the formats that a model is held in while it answers, by `add_argument`."""
  for flag, help_ in FORMATS.items():
    add(f"--{flag}", default="", metavar="FORMAT", help=f"{help_} (default: the checkpoint's)")


def whole(flag: str, text: str, least: int) -> int:
  """Parses the value of --flag as a whole number. Raises: ConfigError if it is below `least`."""
  plain = text.isascii() and text.isdigit() and len(text) <= DIGITS
  if not plain or int(text) < least:
    raise ConfigError(f"--{flag}: expected a whole number from {least}, found {text!r:.40}")
  return int(text)


def present(text: str, known: Iterable[str]) -> str:
  """Returns the argument `text` with the present name of its option in place of a former one.

  Only if `known` has the present name and not the former one.
  """
  flag, equals, value = text.partition("=")
  name = "--" + FORMER_NAMES.get(flag.removeprefix("--"), "")
  return f"{name}{equals}{value}" if flag not in known and name in known else text


def unknown_options(given: Sequence[str], known: Iterable[str]) -> str:
  """Returns the message about options that a command does not have, without their values.

  `known` are those that it has; the nearest one is suggested.
  """
  names = list(known)
  told = [text.partition("=")[0] for text in given if text.startswith("-")] or list(given)
  return ", ".join(f"unknown {name:.60}{_meant(name, names)}" for name in told)


def _meant(name: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return f" (did you mean {near[0]}?)" if near else ""


def model_options(parser: argparse.ArgumentParser) -> None:
  """Adds options for where and in what dtype a model computes, and how it is held."""
  parser.add_argument("--mesh", default="", help=MESH)
  parser.add_argument("--dtype", default="", choices=DTYPES, help=DTYPE)
  format_options(parser.add_argument)


def generation_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
  """Adds options for how answers are generated, of at most `max_new_tokens` by default."""
  parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
  parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
  parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens; 0: all")
  parser.add_argument(
    "--top-p", type=float, default=1.0, help="draw from the likeliest, up to this"
  )
  parser.add_argument("--num-beams", type=int, default=1, help="beam search (1: none)")
  parser.add_argument("--stop", action="append", default=[], help="text that ends an answer")
  parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def to_generation(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Generation:
  """Returns the settings of `generation_options`; exits with code 2 for an impossible one."""
  try:
    return Generation(
      max_new_tokens=given.max_new_tokens,
      temperature=given.temperature,
      top_k=given.top_k,
      top_p=given.top_p,
      num_beams=given.num_beams,
      stop=tuple(given.stop),
      seed=given.seed,
    )
  except ValueError as error:
    setting, found = str(error).split(":", 1)
    parser.error(f"--{setting.replace('_', '-')}:{found}")
