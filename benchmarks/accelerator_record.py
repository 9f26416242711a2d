"""Keeps the figures of accelerator.py, and the time that is left."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerator_page import page

from llava_sp_jax import provenance

DIGITS = 6  # of a figure that is a float


class Record:
  """Prints the lines of each section and keeps them in `--out`."""

  def __init__(self, options: argparse.Namespace):
    self.options = options
    self.figures: dict[str, list[dict[str, Any]]] = {}
    self._started = time.monotonic()
    self._about: dict[str, Any] | None = None

  def left(self) -> float:
    """Returns the seconds until `--seconds` are over."""
    return float(self.options.seconds) - (time.monotonic() - self._started)

  def say(self, section: str, **values: Any) -> None:
    values = {name: _shown(value) for name, value in values.items()}
    self.figures.setdefault(section, []).append(values)
    at = round(time.monotonic() - self._started, 1)
    print(json.dumps({"at": at, "section": section, **values}), flush=True)
    if self.options.out:
      self._write(Path(self.options.out))

  def part(
    self, section: str, seconds: float, run: Callable[[], dict[str, Any] | None], **labels: Any
  ) -> bool:
    """Records what `run` returns, with `labels`; returns whether it finished.

    What needs more than the time that is left (tiny sizes need next to nothing) is skipped, and an
    exception, whatever a driver or compiler raised, is said and ends this part only.
    """
    if self.left() < (seconds if not self.options.tiny else min(seconds, 1)):
      self.say(section, **labels, skipped=f"{self.left():.0f} s are left, {seconds:.0f} are needed")
      return False
    try:
      found = run()
    except Exception as error:
      traceback.print_exc(file=sys.stderr)
      self.say(section, **labels, error=f"{type(error).__name__}: {str(error)[:600]}")
      return False
    if found is not None:
      self.say(section, **labels, **found)
    return True

  def last(self, section: str, name: str) -> Any:
    """Returns the last figure of that name, or None."""
    lines = [line[name] for line in self.figures.get(section, []) if name in line]
    return lines[-1] if lines else None

  def _write(self, out: Path) -> None:
    """Writes the whole record and its page, so that a killed run keeps its figures."""
    self._about = self._about or about()
    record = {"record": self._about, "figures": self.figures}
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", page(record))):
      part = out.with_name(out.name + suffix + ".part")
      part.write_text(text)
      part.replace(out.with_name(out.name + suffix))


def _shown(value: Any) -> Any:
  """Returns a figure for JSON; None if it is not finite or not known."""
  if not isinstance(value, float):
    return value
  return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def about() -> dict[str, Any]:
  """Returns the stamp of a record, with the device as its machine."""
  import jax

  device = jax.devices()[0]
  sources = provenance.table().get("accelerator", {}).get("sources", provenance.EVERYTHING)
  return {
    **provenance.stamp(sources),
    "machine": {
      "device": device.device_kind,
      "platform": device.platform,
      "devices": jax.device_count(),
      "runtime": device.client.platform_version,
      "cpu": platform.machine(),
    },
  }
