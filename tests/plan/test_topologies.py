"""The table of slices is total, and rates follow the wiring."""

from __future__ import annotations

import re

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.plan import topologies
from llava_sp_jax.plan.compile import ENVIRONMENT, NEEDS


@pytest.mark.parametrize("name", topologies.SLICES)
def test_every_slice_is_whole(name: str) -> None:
  slice_ = topologies.topology(name)
  assert slice_.chip.platform in NEEDS
  number = int(re.search(r"\d+$", name).group())  # type: ignore[union-attr]
  per_chip = 2 if slice_.chip_name in ("v4", "v5p") else 1
  assert slice_.chips * per_chip == number
  assert slice_.chip.peak_flops > 1e14
  assert slice_.chip.hbm_bytes > 10 << 30
  if slice_.chip.speed:
    chip = slice_.chip
    assert min(chip.hbm_rate, chip.link_rate, chip.vector_rate, chip.clock, chip.wrap) > 0
    assert len(slice_.sides) in (2, 3)


def test_every_chip_is_rented_somewhere() -> None:
  planned = {chip for chip, _ in topologies.SLICES.values()}
  assert planned == {name for name, chip in topologies.CHIPS.items() if chip.hbm_bytes}
  assert set(topologies.TARGETS) == {n for n in planned if topologies.CHIPS[n].platform != "tpu"}


def test_unknown_slices_list_the_known_ones() -> None:
  with pytest.raises(ConfigError, match=r"--topology: unknown 'v5e-17'; known: .*v5e-16"):
    topologies.topology("v5e-17")


@pytest.mark.parametrize(
  ("name", "varying", "links"),
  [
    ("v5e-16", (True, True), 2),  # a mesh of 4x4: no rings
    ("v5e-16", (False, True), 1),
    ("v5e-256", (True, True), 4),  # rings of 16
    ("v5p-128", (True, True, True), 6),  # rings of 4
    ("v5p-8", (True, True, True), 2),  # 2x2x1
  ],
)
def test_links_of_a_group(name: str, varying: tuple[bool, ...], links: int) -> None:
  slice_ = topologies.topology(name)
  assert slice_.ring_rate(varying) == links * slice_.chip.link_rate


def test_the_child_never_touches_real_devices() -> None:
  assert ENVIRONMENT["JAX_PLATFORMS"] == "cpu"
