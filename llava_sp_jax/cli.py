"""Runs the console command `llava-sp <command>`; heavy imports happen inside the commands."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Callable

from llava_sp_jax import __version__, console, environment

TRACEBACK = "--traceback"  # with any command: prints the traceback of an error

# command: (module under llava_sp_jax with `main(argv)`, what it does)
COMMANDS = {
  "train": ("tools.train", "train a stage, or continue a run"),
  "profile": ("tools.profile", "trace the next steps of a run that is training"),
  "eval": ("tools.evaluate", "score a run on a benchmark; predictions, scores and report"),
  "plan": ("tools.plan", "memory and step time on chips that are not here"),
  "generate": ("tools.generate", "answer a question about an image"),
  "chat": ("tools.chat", "talk about pictures in the terminal"),
  "serve": ("tools.serve", "answer questions over HTTP, by OpenAI's protocol"),
  "report": (
    "tools.report",
    "report.md and pictures from the runs of both stages and their scores",
  ),
  "convert": ("tools.convert", "read a torch checkpoint of any known format into a folder of ours"),
  "export": ("tools.export", "write a checkpoint for the original code, PEFT or transformers"),
  "encode": ("tools.encode", "write the image tokens of pictures, for a server of the decoder"),
  "merge": ("tools.merge", "fold the adapters into the decoder"),
  "inspect": ("tools.inspect", "what a checkpoint is: variant, sizes, dtypes, parameters"),
  "check": ("tools.check", "look through a data set for what training would leave out"),
  "data": ("tools.data", "pack a data set into shards that training reads without opening images"),
  "tokenizer": ("tools.tokenizer", "rebuild a tokenizer folder from a GGUF file"),
}


def usage() -> str:
  """Returns the text of `llava-sp --help`."""
  rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
  return f"""llava-sp {__version__}: LLaVA-SP (visual spatial tokens) in JAX

usage: llava-sp <command> [options]      llava-sp <command> --help

commands:
{rows}

Compiled programs are kept for the next start in {environment.cache_folder()}
(or where {environment.FOLDER} says); {environment.NO_CACHE} with any command does without.
An error is one line; {TRACEBACK} with any command shows where it came from.

example:
  llava-sp train --config configs/easy_vqa.py:stage=pretrain --workdir runs/pretrain
  llava-sp generate --checkpoint runs/finetune --image x.png --question "what shape is present?"
"""


# Options of `llava-sp` itself: {option: function that returns the text to print}.
ABOUT: dict[str, Callable[[], str]] = {
  **dict.fromkeys(("-h", "--help", "help"), usage),
  "--version": lambda: __version__,
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command and returns its exit code.

  An error that a user can cause becomes one line on standard error.
  """
  console.open_streams()
  code = 0
  try:
    try:
      code = _run(sys.argv[1:] if argv is None else argv)
    finally:
      console.flush()  # here, where an error can still be reported
  except BrokenPipeError:  # the reader has closed the pipe: `llava-sp inspect CKPT | head`
    console.silence(sys.stdout)
    return 128 + signal.SIGPIPE
  except console.StreamError as error:
    console.silence(sys.stdout)
    if not code:  # otherwise an error was already printed
      print(f"llava-sp: {console.error_line(error)}", file=sys.stderr)
    return code or 1
  return code


def _run(arguments: list[str]) -> int:
  if not arguments or arguments[0] in ABOUT:
    console.say(ABOUT[arguments[0]]() if arguments else usage())
    return 0
  name, rest = arguments[0], arguments[1:]
  if name not in COMMANDS:
    known = ", ".join(COMMANDS)
    print(f"llava-sp: no command {console.one_line(repr(name))}; known: {known}", file=sys.stderr)
    return 2
  if not {"-h", "--help"} & set(rest):
    rest = environment.prepare(rest)
  trace = TRACEBACK in rest
  rest = [argument for argument in rest if argument != TRACEBACK]
  try:
    code: int | None = importlib.import_module(f"llava_sp_jax.{COMMANDS[name][0]}").main(rest)
  except BrokenPipeError:
    raise
  except KeyboardInterrupt:
    print(f"llava-sp {name}: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT
  except (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
    line = console.error_line(error)
    if not line:
      raise
    if trace:
      traceback.print_exception(error)
    print(f"llava-sp {name}: {line}", file=sys.stderr)
    return 1
  return code or 0


if __name__ == "__main__":
  sys.exit(main())
