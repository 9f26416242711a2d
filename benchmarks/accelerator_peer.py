"""Measures the same step of another implementation: transformers' Llava with PEFT, in torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerator_models as models
from accelerator_record import Record

SECONDS = 80


def peer(record: Record) -> None:
  """Runs in a process of its own, before this one holds the memory of the device."""
  record.part("peer", SECONDS + 20, lambda: _run(record), model="transformers' Llava, PEFT")


def _run(record: Record) -> dict[str, Any]:
  tiny = record.options.tiny
  names = ["tiny"] if tiny else ["7b", "1b"]
  size = models.SIZES[names[0]]
  request = {
    "model": {
      name: dataclasses.asdict(models.config_of(models.SIZES[name]).model) for name in names
    },
    "size": "tiny" if tiny else record.options.size,
    "room": models.ROOM_OF_7B,
    "rank": size.rank,
    "row_length": size.row_length,
    "images": size.images,
    "seconds": 2 if tiny else SECONDS,
  }
  done = subprocess.run(
    [sys.executable, str(Path(__file__).with_name("torch_peer.py"))],
    input=json.dumps(request),
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    said = done.stderr.strip().splitlines() or ["no output"]
    raise RuntimeError(f"torch_peer.py: {said[-1]}")
  found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
  return found
