"""Chips and slices that `llava-sp plan` knows, by the names that users rent them under.

Sources: Google's pages "TPU v4 / v5e / v5p / v6e" (peak, HBM, chips); "How to scale your model"
(Austin et al. 2025), chapter 2 (links, wrap-around, vector unit); NVIDIA's H100 SXM data sheet.
Effective HBM rates and clocks were found by comparing the compiler's own cycle estimates.
"""

from __future__ import annotations

import dataclasses
import math

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import gpu

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator. Rates in bytes or operations per second."""

  platform: str
  peak_flops: float  # bf16, dense
  hbm_bytes: int  # what a program may use: the compiler's own limit where it is known
  hbm_rate: float  # effective, not the data sheet's
  link_rate: float  # one ICI link, one way
  vector_rate: float  # elementwise operations
  clock: float  # Hz
  config_name: str = ""  # how libtpu is told to see a chip's two cores as one device
  wrap: int = 0  # sides of a slice that are a multiple of this are rings; 0: never
  speed: bool = True  # whether a step time can be predicted
  target: str = ""  # of a GPU, see plan.gpu


CHIPS: dict[str, Chip] = {
  "v4": Chip(
    platform="tpu", peak_flops=275e12, hbm_bytes=int(30.75 * GIB), hbm_rate=1.1e12,
    link_rate=4.5e10, vector_rate=8.6e12, clock=1.05e9, wrap=4, config_name="megacore",
  ),
  "v5e": Chip(
    platform="tpu", peak_flops=197e12, hbm_bytes=int(15.75 * GIB), hbm_rate=7.38e11,
    link_rate=4.5e10, vector_rate=6.1e12, clock=1.5e9, wrap=16,
  ),
  "v5p": Chip(
    platform="tpu", peak_flops=459e12, hbm_bytes=int(95.74 * GIB), hbm_rate=2.35e12,
    link_rate=9e10, vector_rate=14.3e12, clock=1.75e9, wrap=4,
  ),
  "v6e": Chip(
    platform="tpu", peak_flops=918e12, hbm_bytes=int(31.25 * GIB), hbm_rate=1.638e12,
    link_rate=9e10, vector_rate=7.2e12, clock=1.75e9, wrap=16,
  ),
  "h100": Chip(
    platform="cuda", peak_flops=989e12, hbm_bytes=80 * 10**9, hbm_rate=0.0, link_rate=0.0,
    vector_rate=0.0, clock=0.0, speed=False,
    target=gpu.H100,
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice: `sides` are its chips along each axis of the interconnect."""

  name: str
  chip_name: str
  sides: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.chip_name]

  @property
  def chips(self) -> int:
    return math.prod(self.sides)

  @property
  def compiler_name(self) -> str:
    """As `jax.experimental.topologies.get_topology_desc` takes it; GPUs have none."""
    sides = "x".join(map(str, self.sides))
    return f"{self.chip_name}:{sides}" if self.chip.platform == "tpu" else ""

  @property
  def compiler_arguments(self) -> dict[str, str]:
    """Further arguments of `get_topology_desc`: on GPUs slices x hosts x devices, and the GPU."""
    if self.chip.platform == "tpu":
      return {"chip_config_name": self.chip.config_name} if self.chip.config_name else {}
    return {"target_config": self.chip.target, "topology": f"1x1x{self.chips}"}

  def ring_rate(self, varying: tuple[bool, ...]) -> float:
    """Bytes per second that a chip receives when a group spans the axes that vary.

    A side that is a ring serves a chip from both directions, another one from one (at its ends).
    """
    links = 0
    for side, used in zip(self.sides, varying, strict=True):
      ring = bool(self.chip.wrap) and side % self.chip.wrap == 0
      links += (2 if ring else 1) if used and side > 1 else 0
    return max(links, 1) * self.chip.link_rate


# name: (chip, sides). v4 and v5p are named by their cores, two on a chip; v5e and v6e by chips.
SLICES: dict[str, tuple[str, tuple[int, ...]]] = {
  "v4-8": ("v4", (2, 2, 1)),
  "v4-16": ("v4", (2, 2, 2)),
  "v4-32": ("v4", (2, 2, 4)),
  "v4-64": ("v4", (2, 4, 4)),
  "v4-128": ("v4", (4, 4, 4)),
  "v5e-4": ("v5e", (2, 2)),
  "v5e-8": ("v5e", (2, 4)),
  "v5e-16": ("v5e", (4, 4)),
  "v5e-32": ("v5e", (4, 8)),
  "v5e-64": ("v5e", (8, 8)),
  "v5e-128": ("v5e", (8, 16)),
  "v5e-256": ("v5e", (16, 16)),
  "v5p-8": ("v5p", (2, 2, 1)),
  "v5p-16": ("v5p", (2, 2, 2)),
  "v5p-32": ("v5p", (2, 2, 4)),
  "v5p-64": ("v5p", (2, 4, 4)),
  "v5p-128": ("v5p", (4, 4, 4)),
  "v5p-256": ("v5p", (4, 4, 8)),
  "v5p-1024": ("v5p", (8, 8, 8)),
  "v6e-4": ("v6e", (2, 2)),
  "v6e-8": ("v6e", (2, 4)),
  "v6e-16": ("v6e", (4, 4)),
  "v6e-32": ("v6e", (4, 8)),
  "v6e-64": ("v6e", (8, 8)),
  "v6e-128": ("v6e", (8, 16)),
  "v6e-256": ("v6e", (16, 16)),
  "h100x8": ("h100", (8,)),
}


def topology(name: str) -> Topology:
  """The slice of that name. Raises: ConfigError that lists the known ones."""
  chip, sides = config_lib.lookup("--topology", name, SLICES)
  return Topology(name, chip, sides)
