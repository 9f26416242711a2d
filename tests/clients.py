"""Programs of others that tests run unchanged, from folders that scripts/clients.sh makes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = "LLAVA_SP_CLIENTS"  # variable of the environment: what scripts/clients.sh was given
# Nothing is looked up on a network, and vLLM looks for no accelerator.
OFFLINE = {
  "HF_HUB_OFFLINE": "1",
  "HF_DATASETS_OFFLINE": "1",
  "VLLM_TARGET_DEVICE": "cpu",
  "VLLM_NO_USAGE_STATS": "1",
  "VLLM_CACHE_ROOT": f"{tempfile.gettempdir()}/llava-sp-clients-{os.getuid()}",
}


def environment(module: str) -> dict[str, str]:
  """The environment of a process that can import `module`; skips the test without one."""
  found = dict(os.environ) | OFFLINE
  folder = Path(os.environ.get(FOLDER, ".")).resolve() / module
  if FOLDER in os.environ and folder.is_dir():
    return found | {"PYTHONPATH": os.pathsep.join([str(folder), found.get("PYTHONPATH", "")])}
  if importlib.util.find_spec(module) is None:
    pytest.skip(f"{module} is missing: bash scripts/clients.sh DIR, then {FOLDER}=DIR")
  return found


def run(module: str, program: str, *arguments: str | Path, cwd: Path, seconds: float = 500) -> str:
  """Runs a program of `module` in a process of its own; returns what it writes.

  A process of its own because these packages want other versions than ours, and warn.
  """
  found = subprocess.run(
    [sys.executable, "-c", program, *map(str, arguments)],
    cwd=cwd,
    env=environment(module),
    capture_output=True,
    text=True,
    timeout=seconds,
    check=False,
  )
  assert found.returncode == 0, f"{found.stdout[-4000:]}\n{found.stderr[-8000:]}"
  return found.stdout


def pairs(options: dict[str, object]) -> Sequence[str]:
  """Options of a command line; True is one without a value."""
  found: list[str] = []
  for name, value in options.items():
    found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
  return found
