"""The launcher for XPK: the command that creates a workload, and what the workload runs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from llava_sp_jax.training import STOPPED_EARLY
from tests.test_launchers import RECIPE, WORKLOAD, launch, program

STOP = "stop it (it saves): xpk workload delete --workload=llava --cluster=here"
# As in a container of XPK: the command is a child in the background, to which SIGTERM is passed on.
CONTAINER = """
trap 'kill -s TERM $child' TERM
({command}) & child=$!
while kill -0 $child 2>/dev/null; do sleep 0.1; done
wait $child
"""


def parser() -> argparse.ArgumentParser:
  """The options of `xpk workload create` that are used (xpk/parser/workload.py)."""
  result = argparse.ArgumentParser(allow_abbrev=False)
  for name in ("workload", "cluster", "tpu-type", "docker-image", "command"):
    result.add_argument(f"--{name}", required=True)
  result.add_argument("--num-slices", type=int)
  for name in ("max-restarts", "restart-on-exit-codes", "termination-grace-period-seconds"):
    result.add_argument(f"--{name}")
  result.add_argument("--project")
  result.add_argument("--storage", action="append", default=[])
  return result


def created(*options: str) -> argparse.Namespace:
  done = launch("launch_xpk", *WORKLOAD, "--dry-run", *options)
  assert (done.returncode, done.stderr) == (0, "")
  line, stop = done.stdout.splitlines()
  assert stop == STOP
  first, *words = shlex.split(line.removeprefix("$ "))
  assert (first, words[:2]) == ("xpk", ["workload", "create"])
  return parser().parse_args(words[2:])


def test_dry_run_of_a_workload() -> None:
  """Words reach llava-sp as they were given, through XPK's shell."""
  given = ['--config.name=it\'s "mine" & \\', "a  b: c", "#no", "{x}"]
  more = ["--create-flag", "--project=P", "--create-flag", "--storage=disk"]
  made = created("--slices", "2", "--grace", "60", *more, "--", *given)
  assert (made.workload, made.cluster, made.tpu_type) == ("llava", "here", "v5litepod-16")
  assert (made.docker_image, made.num_slices) == ("here/llava:1", 2)
  assert (made.max_restarts, made.termination_grace_period_seconds) == ("50", "60")
  assert (made.project, made.storage) == ("P", ["disk"])
  assert str(STOPPED_EARLY) in made.restart_on_exit_codes.split(",")
  assert "\n" not in made.command  # it becomes one line of YAML
  assert shlex.split(made.command) == [
    *("exec", "llava-sp", "train", "--config", RECIPE, "--workdir", "gs://bucket/run"),
    *given,
  ]


def test_it_is_created(tmp_path: Path) -> None:
  program(tmp_path, "xpk", f'printf "%s\\n" "$@" > {tmp_path}/called\n')
  done = launch("launch_xpk", *WORKLOAD, PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert (done.returncode, done.stderr) == (0, "")
  words = (tmp_path / "called").read_text().splitlines()
  assert vars(parser().parse_args(words[2:])) == vars(created())


def test_a_run_that_is_asked_to_stop_saves(tmp_path: Path) -> None:
  """The signal reaches llava-sp itself, and its exit code is that of the container."""
  ready = tmp_path / "ready"
  program(
    tmp_path,
    "llava-sp",
    f"trap 'exit {STOPPED_EARLY}' TERM; touch {ready}; while :; do sleep 0.05; done\n",
  )
  container = subprocess.Popen(
    ["bash", "-c", CONTAINER.format(command=created().command)],
    env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
  )
  while not ready.exists():
    assert container.poll() is None
    time.sleep(0.02)
  container.send_signal(signal.SIGTERM)
  assert container.wait(30) == STOPPED_EARLY
