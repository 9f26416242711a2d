"""Reads how much memory the devices of this process have: what is in use, and what is free."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import jax

MEMINFO = Path("/proc/meminfo")  # of Linux, in kB
STATM = Path("/proc/self/statm")  # of Linux, in pages; the second number is what is resident


def described() -> str:
  """Returns how much memory the first device has in use, or this process where devices share its."""
  device = jax.local_devices()[0]
  found = device.memory_stats() or {}
  if "bytes_limit" in found:
    used, limit = found["bytes_in_use"], found["bytes_limit"]
    return f"{used / 1e9:.2f} of {limit / 1e9:.2f} GB in use on {device.device_kind}"
  return f"{_resident() / 1e9:.2f} GB in use by this process ({device.device_kind})"


def free(devices: int) -> int | None:
  """Returns the bytes that are free on the first `devices` devices together; None if unknown."""
  found = [device.memory_stats() or {} for device in jax.local_devices()[:devices]]
  if all("bytes_limit" in stats for stats in found):
    return sum(int(stats["bytes_limit"]) - int(stats["bytes_in_use"]) for stats in found)
  available = (
    re.search(r"MemAvailable: *(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
  )
  return int(available[1]) * 1024 if available else None


def device_bytes(tree: Any) -> int:
  """Returns the bytes of arrays, or of placed shapes, on one device, without padding to tiles."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _resident() -> int:
  if STATM.exists():
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
