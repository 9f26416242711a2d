"""A closed pipe, ctrl-C, a full disk: no traceback; --traceback shows where an error came from."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_sp_jax import cli, console, recipes
from llava_sp_jax import config as config_lib
from llava_sp_jax.tools import train as train_tool
from llava_sp_jax.training import loop


@contextlib.contextmanager
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """Standard output is a pipe that was closed at its other end."""
  there, here = os.pipe()
  os.close(there)
  with os.fdopen(here, "w", buffering=64) as stream, monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", stream)
    yield


def command(monkeypatch: pytest.MonkeyPatch, does: Callable[[], int | None]) -> int:
  monkeypatch.setattr(train_tool, "main", lambda argv: does())
  return cli.main(["train"])


def talk() -> None:
  for _ in range(100):
    print("x" * 100)


def test_a_closed_pipe_ends_a_command_in_silence(
  monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  with nobody_reads(monkeypatch):
    assert command(monkeypatch, talk) == 128 + signal.SIGPIPE
    print("and no more", flush=True)
  assert capfd.readouterr() == ("", "")


def test_training_goes_on_when_nobody_reads_what_it_prints(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  done = []

  def train(*_: object) -> loop.Result:
    talk()
    done.append(sys.stdout.isatty())
    talk()
    return loop.Result(5, 5, 1.0, 0)

  monkeypatch.setattr(loop, "train", train)
  config = config_lib.Config(train=config_lib.TrainConfig(steps=5))
  monkeypatch.setattr(recipes, "load", lambda value: config)
  with nobody_reads(monkeypatch):
    assert cli.main(["train", "--config=x", f"--workdir={tmp_path / 'run'}"]) == 0
  assert done == [False]
  assert capfd.readouterr() == ("", "")


def test_what_is_read_arrives(capsys: pytest.CaptureFixture) -> None:
  with console.patient():
    print("one")
    print("two", file=sys.stderr)
  assert capsys.readouterr() == ("one\n", "two\n")


def failing(error: BaseException) -> Callable[[], None]:
  def fail() -> None:
    raise error

  return fail


FULL = OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (KeyboardInterrupt(), 130, "interrupted"),
    (FULL, 1, "run/metrics.jsonl: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied"),
    (FileNotFoundError("x: no such file"), 1, "x: no such file"),
    (MemoryError(), 1, "out of memory (on the host)"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore"), 1, "out of memory (RESOURCE_EXHAUSTED: 9 GiB)"),
    (config_lib.ConfigError("a: b"), 1, "a: b"),
  ],
)  # fmt: skip
def test_what_a_user_can_cause_is_one_line(
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  error: BaseException,
  code: int,
  line: str,
) -> None:
  assert command(monkeypatch, failing(error)) == code
  assert capsys.readouterr() == ("", f"llava-sp train: {line}\n")


def test_a_traceback_is_shown_when_asked_for(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  seen: list[list[str]] = []

  def main(argv: list[str]) -> None:
    seen.append(argv)
    raise config_lib.ConfigError("a: b")

  monkeypatch.setattr(train_tool, "main", main)
  assert cli.main(["train", "--traceback", "--x"]) == 1
  assert seen == [["--x"]]
  said = capsys.readouterr().err
  assert "Traceback (most recent call last)" in said
  assert said.endswith("llava-sp train: a: b\n")


def test_our_mistakes_have_no_line() -> None:
  assert console.error_line(ValueError("a bug")) == ""
