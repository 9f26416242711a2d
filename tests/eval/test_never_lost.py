"""Real `llava-sp eval` processes: killed, started again, divided among hosts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax.results import predictions
from tests.conftest import DEVICES_FLAG, REPOSITORY
from tests.eval.scripted import by_id

QUESTIONS, PATIENCE = 144, 300  # seconds


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Many questions about the twelve pictures, one of which is missing."""
  folder = tmp_path_factory.mktemp("many") / "data"
  shutil.copytree(tiny_data, folder)
  few = json.loads((folder / "test.json").read_text())
  many = [{**few[i % len(few)], "id": f"q{i}", "question": f"is it {i}?"} for i in range(QUESTIONS)]
  (folder / "test.json").write_text(json.dumps(many))
  (folder / "images" / "7.png").unlink()
  return folder


def arguments(run_folder: Path, data: Path, out: Path) -> list[str]:
  return [
    "eval",
    f"--checkpoint={run_folder}",
    f"--data={data}",
    f"--out={out}",
    "--batch-size=1",
    "--max-new-tokens=4",
    "--allow-missing",
  ]


def start(run_folder: Path, data: Path, out: Path, *more: str) -> subprocess.Popen:
  """A `llava-sp eval` on one device that answers one question at a time."""
  flags = os.environ.get("XLA_FLAGS", "").replace(DEVICES_FLAG, "").strip()
  environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
  command = [sys.executable, "-m", "llava_sp_jax.cli", *arguments(run_folder, data, out), *more]
  with out.with_name(f"{out.name}.log").open("a") as log:
    return subprocess.Popen(
      command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def printed(out: Path) -> str:
  return out.with_name(f"{out.name}.log").read_text()


def finish(process: subprocess.Popen, out: Path, code: int = 0) -> None:
  assert process.wait(PATIENCE) == code, printed(out)


def lines(path: Path) -> int:
  return path.read_bytes().count(b"\n") if path.is_file() else 0


def scores(out: Path) -> dict[str, Any]:
  """Without what tells of the way there."""
  found = json.loads((out / "scores.json").read_text())
  return {k: v for k, v in found.items() if k not in ("seconds", "engine", "sessions")}


@pytest.fixture(scope="module")
def unbroken(run_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("unbroken") / "eval"
  assert cli.main(arguments(run_folder, data, out)) == 0
  return out


@pytest.mark.guard
def test_sigkill_loses_no_answer(
  run_folder: Path, data: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """Killed while it writes; the same command asks only what has no answer, and scores the same."""
  out = tmp_path / "eval"
  path = out / predictions.FILE
  killed = start(run_folder, data, out)
  until = time.monotonic() + PATIENCE
  while lines(path) < 20:
    assert killed.poll() is None, printed(out)
    assert time.monotonic() < until
    time.sleep(0.005)
  killed.kill()
  killed.wait()
  with path.open("ab") as file:
    file.write(b'{"id": "q77", "text": "to')  # what a kill leaves that hits a write
  kept = predictions.read_file(path)
  assert 20 <= len(kept) < QUESTIONS, "it was too late for the kill to show anything"
  assert not (out / "scores.json").exists()
  finish(start(run_folder, data, out), out)
  (session,) = [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines()]
  assert session["asked"] == session["engine"]["requests"] == QUESTIONS - len(kept)
  assert f"{len(kept)} questions are answered already" in printed(out)
  assert list(by_id(out).items()) == list(by_id(unbroken).items())
  assert scores(out) == scores(unbroken)
  assert len(scores(out)["failures"]) == QUESTIONS / 12
  assert cli.main([*arguments(run_folder, data, out), "--temperature=0.5"]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert "holds answers made with other settings" in line
  assert ": generation.temperature: 0.5 here, 0.0 there. Continue with" in line
  assert "name another folder with --out" in line


@pytest.mark.guard
def test_two_hosts_answer_a_part_each(
  run_folder: Path, data: Path, unbroken: Path, tmp_path: Path
) -> None:
  out = tmp_path / "eval"
  out.parent.mkdir(exist_ok=True)
  both = [start(run_folder, data, out, f"--part={i}/2") for i in range(2)]
  for process in both:
    finish(process, out)
  parts = [predictions.read_file(out / f"predictions.{i}-of-2.jsonl") for i in range(2)]
  assert sum(map(len, parts)) == QUESTIONS
  images = [{image for record in part for image in record["images"]} for part in parts]
  assert not images[0] & images[1]
  assert by_id(out) == by_id(unbroken)
  assert scores(out) == scores(unbroken)


@pytest.mark.guard
def test_processes_that_start_together_divide_the_questions(
  run_folder: Path, data: Path, unbroken: Path, tmp_path: Path
) -> None:
  """Joined by a coordinator as on a pod, each process takes its part without being told."""
  import socket

  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  out = tmp_path / "eval"
  joined = [f"--coordinator={address}", "--processes=2"]
  both = [start(run_folder, data, out, *joined, f"--process={i}") for i in range(2)]
  for process in both:
    finish(process, out)
  assert all(lines(out / f"predictions.{i}-of-2.jsonl") for i in range(2))
  assert scores(out) == scores(unbroken)
