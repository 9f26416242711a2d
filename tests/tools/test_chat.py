"""llava-sp chat: conversations with pictures in a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.tools import chat
from llava_sp_jax.tools.chat import Conversation
from tests.conftest import REPOSITORY


class Script:
  """An engine that says what it is told to, and keeps what it was asked."""

  def __init__(self, *parts: str, error: str = "") -> None:
    self.parts, self.error = parts or ("a ", "red disk"), error
    self.asked: list[Request] = []
    self.closed = 0

  def stream(self, request: Request) -> Iterator[str]:
    self.asked.append(request)
    try:
      if self.error:
        raise ValueError(self.error)
      yield from self.parts
    finally:
      self.closed += 1


@pytest.fixture
def pictures(tiny_data: Path) -> list[str]:
  return [str(tiny_data / "images" / f"{i}.png") for i in range(3)]


def talk(
  monkeypatch: pytest.MonkeyPatch, engine: Any, *lines: str, conversation: Any = None
) -> int:
  monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
  return chat.talk(engine, conversation or Conversation(), interactive=False)


def test_a_conversation_remembers(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, pictures: list[str]
) -> None:
  engine = Script()
  lines = [f"/image {pictures[0]}", "what is it?", "", "and the color?"]
  lines += [f"/image {pictures[1]} {pictures[2]}", "are they the same?"]
  assert talk(monkeypatch, engine, *lines, conversation=Conversation("Be brief.")) == 0
  first, second, third = engine.asked
  assert (first.question, first.history, len(first.images)) == ("<image>\nwhat is it?", (), 1)
  turn = ("<image>\nwhat is it?", "a red disk")
  assert (second.question, second.history, len(second.images)) == ("and the color?", (turn,), 1)
  assert third.question == "<image>\n<image>\nare they the same?"
  assert third.history == (turn, ("and the color?", "a red disk"))
  assert len(third.images) == 3
  assert {request.system for request in engine.asked} == {"Be brief."}
  assert [request.number for request in engine.asked] == [0, 1, 2]
  printed = capsys.readouterr()
  assert printed.err == ""
  assert printed.out.count("a red disk\n") == 3
  assert "2 in the next question" in printed.out


def test_reset_forgets(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, pictures: list[str]
) -> None:
  engine = Script()
  lines = [f"/image {pictures[0]}", "what?", f"/image {pictures[1]}", "/reset", "hello"]
  assert talk(monkeypatch, engine, *lines) == 0
  last = engine.asked[-1]
  assert (last.question, last.history, last.images) == ("hello", (), ())
  assert "a new conversation" in capsys.readouterr().out


def test_help_lists_every_command(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  assert talk(monkeypatch, Script(), "/help") == 0
  printed = capsys.readouterr().out
  assert all(f"{name} " in printed for name in chat.COMMANDS)
  assert "ctrl-D" in printed


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("/images x", "no command '/images'; known: /image, /reset, /help"),
    ("/image", "/image: expected a path, found none"),
    ("/image gone.png", "image gone.png: no such file"),
    ("/image 'gone", "No closing quotation"),
    ("is <image> red?", "the question has 1 <image>, and 0 pictures are waiting"),
  ],
)
def test_a_line_that_is_wrong_is_said_and_the_next_one_answered(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, line: str, said: str
) -> None:
  engine = Script()
  assert talk(monkeypatch, engine, line, "hello") == 1
  (told,) = capsys.readouterr().err.splitlines()
  assert told.startswith("llava-sp chat: ")
  assert said in told
  assert [request.question for request in engine.asked] == ["hello"]


def test_a_question_without_an_answer_is_left_out(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, pictures: list[str]
) -> None:
  """And its pictures wait for the next one."""
  engine, conversation = Script(error="too\nlong"), Conversation()
  assert talk(monkeypatch, engine, f"/image {pictures[0]}", "what?", conversation=conversation) == 1
  assert "llava-sp chat: too; long" in capsys.readouterr().err
  assert (conversation.history, conversation.images, len(conversation.waiting)) == ((), (), 1)
  assert engine.closed == 1


def test_marks_in_a_question_stay_where_they_are(
  monkeypatch: pytest.MonkeyPatch, pictures: list[str]
) -> None:
  engine = Script()
  question = "is <image> like <image>?"
  assert talk(monkeypatch, engine, f"/image {pictures[0]} {pictures[1]}", question) == 0
  assert engine.asked[0].question == question


def test_ctrl_c_ends_an_answer(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  class Endless(Script):
    def stream(self, request: Request) -> Iterator[str]:
      self.asked.append(request)
      with contextlib.ExitStack() as closing:
        closing.callback(lambda: setattr(self, "closed", self.closed + 1))
        yield "a "
        os.kill(os.getpid(), signal.SIGINT)
        while len(self.asked) == 1:
          yield "b "
        yield "c"

  engine, handler = Endless(), signal.getsignal(signal.SIGINT)
  conversation = Conversation()
  assert talk(monkeypatch, engine, "one", conversation=conversation) == 0
  assert conversation.history == (("one", "a "),)
  assert engine.closed == 1, "the engine is free"
  assert "[stopped]" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_program() -> None:
  with chat._interrupted() as stopped:
    os.kill(os.getpid(), signal.SIGINT)
    assert stopped.is_set()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_the_command_opens_a_checkpoint(
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  run_folder: Path,
  pictures: list[str],
) -> None:
  settings = ["--max-new-tokens=6", f"--image={pictures[0]}"]
  monkeypatch.setattr(sys, "stdin", io.StringIO("what is it?\n"))
  assert cli.main(["chat", str(run_folder), *settings]) == 0
  said = capsys.readouterr().out
  command = ["generate", f"--checkpoint={run_folder}", "--question=what is it?", *settings]
  assert cli.main(command) == 0
  assert said == capsys.readouterr().out


def test_missing_files_are_named(capsys: pytest.CaptureFixture) -> None:
  assert cli.main(["chat", "gone", "--image=gone.png"]) == 1
  assert "image gone.png: no such file" in capsys.readouterr().err
  assert cli.main(["chat", "gone"]) == 1
  assert "gone: not a run folder" in capsys.readouterr().err


class Terminal:
  """A process at a terminal of its own."""

  def __init__(self, *arguments: str) -> None:
    self._end, other = pty.openpty()
    self.process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, *arguments],
      stdin=other,
      stdout=other,
      stderr=other,
      cwd=REPOSITORY,
      start_new_session=True,
      env={**os.environ, "TERM": "dumb"},
    )
    os.close(other)
    self.seen = ""

  def until(self, text: str, seconds: float = 30) -> None:
    """Reads until `text` comes, which must be new."""
    end = time.monotonic() + seconds
    while text not in self.seen:
      ready, _, _ = select.select([self._end], [], [], max(0, end - time.monotonic()))
      assert ready, f"no {text!r} in {self.seen!r}"
      self.seen += os.read(self._end, 4096).decode()
    self.seen = self.seen.partition(text)[2]

  def type(self, text: str) -> None:
    os.write(self._end, text.encode())

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
    os.close(self._end)


# The loop of the command, with an engine that never ends its first answer.
PROGRAM = """
import itertools, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
os.open(os.ttyname(0), os.O_RDWR)  # the terminal of this session, to which its keys belong
from llava_sp_jax.tools import chat

class Engine:
  def stream(self, request):
    for i in itertools.count():
      time.sleep(0.02)
      yield f"word{i} "
      if request.history:
        return

sys.exit(chat.talk(Engine(), chat.Conversation(), interactive=True))
"""
CTRL_C, CTRL_D = "\x03", "\x04"


def test_a_terminal_has_its_keys() -> None:
  terminal = Terminal()
  try:
    terminal.until("> ")
    terminal.type("never sent")
    terminal.until("never sent")  # its echo: the line is being edited
    time.sleep(0.5)  # readline overlooks a signal between two keys until the next one
    terminal.type(CTRL_C)
    terminal.until("ctrl-D ends")
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("word3")
    terminal.type(CTRL_C)
    terminal.until("[stopped]")
    terminal.until("> ")
    terminal.type("again\n")
    terminal.until("word0")
    terminal.until("> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(10) == 0
  finally:
    terminal.close()
