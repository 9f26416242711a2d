"""Lists the peak rates, memory and links of accelerator chips in one table.

Sources: the vendors' data sheets (peak, without sparsity); Google's pages "TPU v4 / v5e / v5p /
v6e" (HBM; network of a pod by its chips); "How to scale your model" (Austin et al. 2025), chapter 2
(links, wrap-around, vector unit, network between slices); nvidia-smi (memory of GPUs). Effective
HBM rates and clocks were found by comparing the compiler's own cycle estimates, and the limits of
TPUs are those that the compiler states.

The network between slices is 6.4 Tbit/s for the 256 chips of a v5e pod, 25.6 Tbit/s for those of v6e
(docs.cloud.google.com/tpu/docs/v5e, /v6e), 50 Gbit/s for a chip of v5p (/v5p-training); that of v4 is
the book's.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from llava_sp_jax.errors import LlavaSPError

GIB = 1 << 30
# XLA takes this share of a GPU's memory, and leaves the rest to others; the variables change it.
GPU_SHARE = 0.75
GPU_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class HardwareError(LlavaSPError, ValueError):
  """Reports a value in the environment that no accelerator can have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Describes one accelerator; rates are in bytes or operations per second.

  Values that only `plan` uses are 0 where unknown.
  """

  device_kind: str  # regular expression over jax's name of the device
  peak_flops: float  # bf16, dense
  platform: str = "cuda"
  hbm_bytes: int = 0  # of a device: of a TPU the compiler's own limit, of a GPU all of its memory
  hbm_rate: float = 0.0  # effective rate, not that of the data sheet
  link_rate: float = 0.0  # one ICI link, one way
  slow_rate: float = 0.0  # data-center network between slices, for one chip, one way
  vector_rate: float = 0.0  # elementwise operations
  clock: float = 0.0  # Hz
  devices: int = 1  # of jax on one chip, among which its memory is divided
  config_name: str = ""  # libtpu setting that makes a chip's two cores one device
  wrap: int = 0  # sides of a slice that are a multiple of this are rings; 0: never
  speed: bool = False  # whether a step time can be predicted

  @property
  def limit(self) -> int:
    """Returns the bytes of a device's memory that XLA takes for its programs.

    Raises: HardwareError for a share in the environment that is none.
    """
    if self.platform != "cuda":
      return self.hbm_bytes
    for name in GPU_SHARES:
      if text := os.environ.get(name):
        return int(_share(name, text) * self.hbm_bytes)
    return int(GPU_SHARE * self.hbm_bytes)


def _share(name: str, text: str) -> float:
  try:
    share = float(text)
  except ValueError:
    share = math.nan
  if not 0 < share <= 1:
    raise HardwareError(f"{name}: expected a share of the memory, such as .75, found {text!r:.40}")
  return share


# The first row whose `device_kind` matches describes a device.
CHIPS: dict[str, Chip] = {
  "v4": Chip(
    device_kind=r"TPU v4$", platform="tpu", peak_flops=275e12, hbm_bytes=int(30.75 * GIB),
    hbm_rate=1.1e12, link_rate=4.5e10, slow_rate=6.25e9, vector_rate=8.6e12, clock=1.05e9, wrap=4,
    config_name="megacore", speed=True,
  ),
  "v5e": Chip(
    device_kind=r"TPU v5( lite|e)", platform="tpu", peak_flops=197e12, hbm_bytes=int(15.75 * GIB),
    hbm_rate=7.38e11, link_rate=4.5e10, slow_rate=3.125e9, vector_rate=6.1e12, clock=1.5e9, wrap=16, speed=True,
  ),
  "v5p": Chip(
    device_kind=r"TPU v5p?$", platform="tpu", peak_flops=459e12, hbm_bytes=int(95.74 * GIB),
    hbm_rate=2.35e12, link_rate=9e10, slow_rate=6.25e9, vector_rate=14.3e12, clock=1.75e9, wrap=4, speed=True,
  ),
  "v6e": Chip(
    device_kind=r"TPU v6( lite|e)", platform="tpu", peak_flops=918e12, hbm_bytes=int(31.25 * GIB),
    hbm_rate=1.638e12, link_rate=9e10, slow_rate=1.25e10, vector_rate=7.2e12, clock=1.75e9, wrap=16, speed=True,
  ),
  "tpu7x": Chip(
    device_kind=r"TPU ?v?7x?", platform="tpu", peak_flops=2307e12, hbm_bytes=int(94.75 * GIB),
    devices=2,
  ),
  "h100-pcie": Chip(device_kind=r"NVIDIA H100 PCIe", peak_flops=756e12),
  "h200": Chip(
    device_kind=r"NVIDIA H200", peak_flops=989e12, hbm_bytes=143771 << 20
  ),
  "h100": Chip(
    device_kind=r"NVIDIA H(100|800)", peak_flops=989e12, hbm_bytes=81559 << 20
  ),
  "a100": Chip(device_kind=r"NVIDIA (A100|A800)", peak_flops=312e12),
  "b200": Chip(device_kind=r"NVIDIA B200", peak_flops=2250e12),
  "l40s": Chip(device_kind=r"NVIDIA L40S", peak_flops=362e12),
  "a40": Chip(device_kind=r"NVIDIA A40", peak_flops=149.7e12),
}  # fmt: skip


def peak_tflops(kind: str) -> float | None:
  """Returns the peak dense bf16 TFLOP/s of one chip; `kind` is jax's name of the device.

  Returns None when no row of CHIPS matches (a CPU, say).
  """
  found = (chip for chip in CHIPS.values() if re.match(chip.device_kind, kind))
  return next((chip.peak_flops / 1e12 for chip in found), None)


def chip_count(devices: Iterable[Any]) -> int:
  """Returns the number of chips that jax's devices belong to.

  On some TPUs, each of a chip's two cores is a device.
  """
  places = set()
  for device in devices:
    coords = getattr(device, "coords", None)
    slice_index = getattr(device, "slice_index", 0)
    places.add(("chip", slice_index, *coords) if coords is not None else ("device", device.id))
  return len(places)
