"""Lists the slices that `llava-sp plan` knows, by the names of cloud providers.

Sources: Google's pages "TPU v4 / v5e / v5p / v6e / TPU7x" (chips of a slice); for several slices,
the number follows the name of one (`v5e-256x2`).
"""

from __future__ import annotations

import dataclasses
import math
import re

from llava_sp_jax import config as config_lib
from llava_sp_jax.hardware import CHIPS, Chip
from llava_sp_jax.plan import gpu

# Name of a GPU -> its description, with which XLA compiles for it without one.
TARGETS = {"h100": gpu.H100, "h200": gpu.H200}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Describes chips and their interconnect: one slice, or several equal ones."""

  name: str
  chip_name: str
  sides: tuple[int, ...]  # chips along each axis of a slice's interconnect
  slices: int = 1  # joined by the data-center network

  @property
  def chip(self) -> Chip:
    """Returns the rates and memory of a chip of this kind."""
    return CHIPS[self.chip_name]

  @property
  def chips(self) -> int:
    """Returns the number of chips of all slices."""
    return self.slices * math.prod(self.sides)

  @property
  def devices(self) -> int:
    """Returns the number of devices that jax finds there."""
    return self.chips * self.chip.devices

  @property
  def compiler_name(self) -> str:
    """Returns the name for `jax.experimental.topologies.get_topology_desc`; "" for GPUs."""
    sides = "x".join(map(str, self.sides))
    return f"{self.chip_name}:{sides}" if self.chip.platform == "tpu" else ""

  @property
  def compiler_arguments(self) -> dict[str, str | int]:
    """Returns further arguments of `get_topology_desc`.

    For GPUs these are slices x hosts x devices, and the description of the GPU.
    """
    if self.chip.platform != "tpu":
      return {"target_config": TARGETS[self.chip_name], "topology": f"1x1x{self.chips}"}
    found: dict[str, str | int] = {
      "chip_config_name": self.chip.config_name,
      "num_slices": self.slices,
    }
    return {key: value for key, value in found.items() if value not in ("", 1)}

  def ring_rate(self, varying: tuple[bool, ...]) -> float:
    """Returns the bytes per second that a chip receives in a group of chips.

    `varying` says for each axis of the interconnect whether the group spans it. A chip receives
    from both directions of an axis that is a ring, and from one direction of any other axis (as the
    chips at its ends do).
    """
    links = 0
    for side, used in zip(self.sides, varying, strict=True):
      ring = bool(self.chip.wrap) and side % self.chip.wrap == 0
      links += (2 if ring else 1) if used and side > 1 else 0
    return max(links, 1) * self.chip.link_rate


# name -> (chip, sides). Names of v4, v5p and tpu7x count cores, two a chip; all others count chips.
SLICES: dict[str, tuple[str, tuple[int, ...]]] = {
  "v4-8": ("v4", (2, 2, 1)),
  "v4-16": ("v4", (2, 2, 2)),
  "v4-32": ("v4", (2, 2, 4)),
  "v4-64": ("v4", (2, 4, 4)),
  "v4-128": ("v4", (4, 4, 4)),
  "v4-256": ("v4", (4, 4, 8)),
  "v4-512": ("v4", (4, 8, 8)),
  "v4-1024": ("v4", (8, 8, 8)),
  "v4-2048": ("v4", (8, 8, 16)),
  "v4-4096": ("v4", (8, 16, 16)),
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
  "v5p-512": ("v5p", (4, 8, 8)),
  "v5p-1024": ("v5p", (8, 8, 8)),
  "v5p-1536": ("v5p", (8, 8, 12)),
  "v5p-2048": ("v5p", (8, 8, 16)),
  "v5p-4096": ("v5p", (8, 16, 16)),
  "v5p-6144": ("v5p", (12, 16, 16)),
  "v5p-8192": ("v5p", (16, 16, 16)),
  "v5p-12288": ("v5p", (16, 16, 24)),
  "v5p-17920": ("v5p", (16, 20, 28)),
  "v6e-4": ("v6e", (2, 2)),
  "v6e-8": ("v6e", (2, 4)),
  "v6e-16": ("v6e", (4, 4)),
  "v6e-32": ("v6e", (4, 8)),
  "v6e-64": ("v6e", (8, 8)),
  "v6e-128": ("v6e", (8, 16)),
  "v6e-256": ("v6e", (16, 16)),
  "tpu7x-8": ("tpu7x", (2, 2, 1)),
  "tpu7x-16": ("tpu7x", (2, 2, 2)),
  "tpu7x-32": ("tpu7x", (2, 2, 4)),
  "tpu7x-64": ("tpu7x", (2, 4, 4)),
  "tpu7x-128": ("tpu7x", (4, 4, 4)),
  "tpu7x-256": ("tpu7x", (4, 4, 8)),
  "tpu7x-512": ("tpu7x", (4, 8, 8)),
  "h100x1": ("h100", (1,)),
  "h100x8": ("h100", (8,)),
  "h200x1": ("h200", (1,)),
  "h200x8": ("h200", (8,)),
}


def topology(name: str) -> Topology:
  """Returns the slice that a cloud provider calls `name`, or N of them for `namexN`.

  Raises: ConfigError that lists the known names.
  """
  several = re.fullmatch(r"(.+-\d+)x([1-9]\d*)", name)
  one, count = (several[1], int(several[2])) if several else (name, 1)
  chip, sides = config_lib.lookup("--topology", one, SLICES)
  return Topology(name, chip, sides, count)
