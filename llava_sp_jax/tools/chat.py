"""llava-sp chat: talks about pictures in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llava_sp_jax import console
from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options

if TYPE_CHECKING:
  from llava_sp_jax.infer.engine import Engine, ImageFile, Request

KEYS = "ctrl-C stops an answer; ctrl-D ends."


@dataclasses.dataclass
class Conversation:
  """Holds the turns so far, their pictures, and those of the next question."""

  system: str | None = None
  history: tuple[tuple[str, str], ...] = ()  # (question, answer)
  images: tuple[ImageFile, ...] = ()  # of the questions in `history`, in their order
  waiting: tuple[ImageFile, ...] = ()  # of the next question
  asked: int = 0  # questions, also those without an answer

  def request(self, question: str) -> Request:
    """Returns the request for the answer to a question.

    Puts the marks of the waiting pictures in front of a question that has none.

    Raises: ValueError when a question has other marks than one for each waiting picture.
    """
    from llava_sp_jax.infer.engine import Request

    marks = question.count(IMAGE)
    if marks and marks != len(self.waiting):
      raise ValueError(
        f"the question has {marks} {IMAGE}, and {len(self.waiting)} pictures are waiting; add them "
        "with /image, or leave the marks out"
      )
    self.asked += 1
    return Request(
      question if marks else f"{IMAGE}\n" * len(self.waiting) + question,
      self.images + self.waiting,
      self.system,
      self.asked - 1,
      history=self.history,
    )

  def add(self, request: Request, answer: str) -> None:
    """Adds the turn of a request that was made here."""
    self.history += ((request.question, answer),)
    self.images, self.waiting = request.images, ()


def _image(conversation: Conversation, rest: str) -> str:
  from llava_sp_jax.data import decode

  if not rest:
    raise ValueError("/image: expected a path, found none")
  paths = [rest] if Path(rest).expanduser().exists() else shlex.split(rest)
  conversation.waiting += tuple(decode.read(Path(path).expanduser()) for path in paths)
  return f"{len(conversation.waiting)} in the next question"


def _reset(conversation: Conversation, rest: str) -> str:
  conversation.history, conversation.images, conversation.waiting = (), (), ()
  return "a new conversation"


def _help(conversation: Conversation, rest: str) -> str:
  rows = [(f"{name} {argument}", meaning) for name, (argument, meaning, _) in COMMANDS.items()]
  return "\n".join([*(f"{shown:<14}{meaning}" for shown, meaning in rows), KEYS])


# Name of a command -> (its argument, what it does, function of the conversation and the argument
# that returns what to print). The function may raise ValueError.
COMMANDS: dict[str, tuple[str, str, Callable[[Conversation, str], str]]] = {
  "/image": ("PATH", "adds a picture to the next question", _image),
  "/reset": ("", "forgets the conversation and its pictures", _reset),
  "/help": ("", "lists the commands", _help),
}


def obey(conversation: Conversation, line: str) -> str:
  """Runs a line that begins with a slash, and returns what to print.

  Raises: ValueError for an unknown command, or one that fails.
  """
  name, _, rest = line.partition(" ")
  if name not in COMMANDS:
    raise ValueError(f"no command {name!r}; known: {', '.join(COMMANDS)}")
  return COMMANDS[name][2](conversation, rest.strip())


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp chat",
    description="Talks about pictures in the terminal. /help lists what can be typed beside "
    f"questions. {KEYS}",
    epilog="example: llava-sp chat runs/finetune --image x.png",
  )
  result.add_argument(
    "checkpoint", metavar="CHECKPOINT", help="run of llava-sp train, or any format of convert"
  )
  source_options(result)
  result.add_argument(
    "--image", action="append", default=[], help="picture of the first question; may be repeated"
  )
  result.add_argument("--system", help="system text (default: the one of the template)")
  arguments.generation_options(result, max_new_tokens=512)
  arguments.model_options(result)
  return result


def main(argv: list[str]) -> int:
  """Answers questions until the input ends; returns 1 if one had no answer, else 0."""
  options = parser().parse_args(argv)
  generation = arguments.to_generation(parser(), options)

  from llava_sp_jax.data import decode
  from llava_sp_jax.distributed import mesh
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine

  # Read here, so that a missing image is reported before a model is loaded.
  pictures = tuple(decode.read(Path(path)) for path in options.image)
  devices = mesh.local(options.mesh)
  loaded = pretrained.from_any(
    options.checkpoint,
    to_options(options, options.checkpoint),
    dtype=options.dtype,
    weights=options.weights,
    cache=options.cache,
  )
  engine = Engine(loaded, 1, generation, devices)
  interactive = sys.stdin.isatty()
  if interactive:
    variant = loaded.config.model.projector.variant
    console.say(f"{options.checkpoint}, {variant}. /help lists commands; {KEYS}")
  return talk(engine, Conversation(options.system, waiting=pictures), interactive)


def talk(engine: Engine, conversation: Conversation, interactive: bool) -> int:
  """Answers the lines of standard input; returns 1 if one had no answer, else 0.

  `interactive` prompts for them, and a ctrl-C discards a line.
  """
  failed = False
  for line in _lines(conversation, interactive):
    try:
      if line.startswith("/"):
        console.say(obey(conversation, line))
        continue
      request = conversation.request(line)
      if text := _answered(engine, request):
        conversation.add(request, text)
    except ValueError as error:
      failed = True
      console.say(f"llava-sp chat: {console.one_line(error)}", error=True)
  return int(failed)


def _lines(conversation: Conversation, interactive: bool) -> Iterator[str]:
  """Yields the lines of standard input that are not blank."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  edits lines, and brings back earlier ones
  while True:
    count = len(conversation.waiting)
    prompt = f"[{count} picture{'s' * (count > 1)}] > " if count else "> "
    try:
      line = input(prompt if interactive else "").strip()
    except EOFError:
      if interactive:
        console.say("")
      return
    except KeyboardInterrupt:
      if not interactive:
        raise
      console.say("\nctrl-D ends")
      continue
    if line:
      yield line


def _answered(engine: Engine, request: Request) -> str:
  """Prints an answer while it is decoded, and returns it; a ctrl-C ends it early.

  Raises: ValueError if there is no answer; KeyboardInterrupt for a second ctrl-C.
  """
  text = ""
  stream = cast(Generator[str, None, None], engine.stream(request))
  with _interrupted() as stopped, contextlib.closing(stream):
    for part in stream:
      if stopped.is_set():
        break
      console.say(part, end="")
      text += part
  console.say(" [stopped]" if stopped.is_set() else "")
  return text


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
  """Sets the event at the first ctrl-C in the block, and raises KeyboardInterrupt at others.

  So the engine is left between two of its steps.
  """
  stopped = threading.Event()

  def note(*_: object) -> None:
    if stopped.is_set():
      raise KeyboardInterrupt
    stopped.set()

  before = signal.signal(signal.SIGINT, note)
  try:
    yield stopped
  finally:
    signal.signal(signal.SIGINT, before)
