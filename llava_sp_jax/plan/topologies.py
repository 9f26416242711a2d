"""Lists the slices that `llava-sp plan` knows, by the names of cloud providers.

Source: Google's pages "TPU v4 / v5e / v5p / v6e" (chips of a slice).
"""

from __future__ import annotations

import dataclasses
import math

from llava_sp_jax import config as config_lib
from llava_sp_jax.hardware import CHIPS, Chip
from llava_sp_jax.plan import gpu

# Name of a GPU -> its description, with which XLA compiles for it without one.
TARGETS = {"h100": gpu.H100}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Describes a slice: its chips and their interconnect."""

  name: str
  chip_name: str
  sides: tuple[int, ...]  # chips along each axis of the interconnect

  @property
  def chip(self) -> Chip:
    """Returns the rates and memory of a chip of this kind."""
    return CHIPS[self.chip_name]

  @property
  def chips(self) -> int:
    """Returns the number of chips of the slice."""
    return math.prod(self.sides)

  @property
  def compiler_name(self) -> str:
    """Returns the name for `jax.experimental.topologies.get_topology_desc`; "" for GPUs."""
    sides = "x".join(map(str, self.sides))
    return f"{self.chip_name}:{sides}" if self.chip.platform == "tpu" else ""

  @property
  def compiler_arguments(self) -> dict[str, str]:
    """Returns further arguments of `get_topology_desc`.

    For GPUs these are slices x hosts x devices, and the description of the GPU.
    """
    if self.chip.platform == "tpu":
      return {"chip_config_name": self.chip.config_name} if self.chip.config_name else {}
    return {"target_config": TARGETS[self.chip_name], "topology": f"1x1x{self.chips}"}

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


# name -> (chip, sides). Names of v4 and v5p count cores, two a chip; those of v5e and v6e chips.
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
  """Returns the slice that a cloud provider calls `name`.

  Raises: ConfigError that lists the known names.
  """
  chip, sides = config_lib.lookup("--topology", name, SLICES)
  return Topology(name, chip, sides)
