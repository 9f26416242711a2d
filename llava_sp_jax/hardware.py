"""What one chip can do: peak rates by the name that jax gives its devices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# (regex over `device_kind`, peak dense bf16 TFLOP/s of one chip); the first match wins. Source: the
# vendors' data sheets (without sparsity).
PEAKS: tuple[tuple[str, float], ...] = (
  (r"TPU v4$", 275.0),
  (r"TPU v5( lite|e)", 197.0),
  (r"TPU v5p?$", 459.0),
  (r"TPU v6( lite|e)", 918.0),
  (r"TPU ?v?7x?", 2307.0),
  (r"NVIDIA H100 PCIe", 756.0),
  (r"NVIDIA H(100|200|800)", 989.0),
  (r"NVIDIA (A100|A800)", 312.0),
  (r"NVIDIA B200", 2250.0),
  (r"NVIDIA L40S", 362.0),
  (r"NVIDIA A40", 149.7),
)


def peak_tflops(kind: str) -> float | None:
  """Peak dense bf16 TFLOP/s of one chip of `kind`; None when no row knows it (a CPU, say)."""
  return next((peak for pattern, peak in PEAKS if re.match(pattern, kind)), None)


def chip_count(devices: Iterable[Any]) -> int:
  """Chips behind jax's devices: on some TPUs each of a chip's two cores is a device."""
  places = set()
  for device in devices:
    coords = getattr(device, "coords", None)
    slice_index = getattr(device, "slice_index", 0)
    places.add(("chip", slice_index, *coords) if coords is not None else ("device", device.id))
  return len(places)
