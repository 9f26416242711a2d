"""The table of slices is total, and rates follow the wiring."""

from __future__ import annotations

import re

import pytest

from llava_sp_jax import hardware
from llava_sp_jax.config import ConfigError
from llava_sp_jax.plan import topologies
from llava_sp_jax.plan.compile import ENVIRONMENT, NEEDS


@pytest.mark.parametrize("name", topologies.SLICES)
def test_every_slice_is_whole(name: str) -> None:
  slice_ = topologies.topology(name)
  assert slice_.chip.platform in NEEDS
  number = int(re.search(r"\d+$", name).group())  # type: ignore[union-attr]
  per_chip = 2 if slice_.chip_name in ("v4", "v5p", "tpu7x") else 1
  assert slice_.chips * per_chip == number
  assert slice_.chip.peak_flops > 1e14
  assert slice_.chip.hbm_bytes > 10 << 30
  if slice_.chip.speed:
    chip = slice_.chip
    assert min(chip.hbm_rate, chip.link_rate, chip.vector_rate, chip.clock, chip.wrap) > 0
    assert 0 < chip.slow_rate < chip.link_rate
    assert len(slice_.sides) in (2, 3)


def test_every_chip_is_rented_somewhere() -> None:
  planned = {chip for chip, _ in topologies.SLICES.values()}
  assert planned == {name for name, chip in topologies.CHIPS.items() if chip.hbm_bytes}
  assert set(topologies.TARGETS) == {n for n in planned if topologies.CHIPS[n].platform != "tpu"}


def test_several_slices_have_the_name_of_one() -> None:
  two = topologies.topology("v5e-256x2")
  one = topologies.topology("v5e-256")
  assert (two.chips, two.slices, two.sides) == (512, 2, one.sides)
  assert two.compiler_name == one.compiler_name
  assert two.compiler_arguments == {"num_slices": 2}
  assert topologies.topology("v4-8x3").compiler_arguments == {
    "num_slices": 3,
    "chip_config_name": "megacore",
  }
  assert topologies.topology("h100x8").slices == 1


def test_the_largest_v5p_is_a_whole_pod() -> None:
  sizes = [topologies.topology(n).chips for n in topologies.SLICES if n.startswith("v5p")]
  assert max(sizes) == 8960


def test_two_devices_of_a_chip_divide_its_memory() -> None:
  slice_ = topologies.topology("tpu7x-8")
  assert (slice_.chips, slice_.devices) == (4, 8)
  assert slice_.chip.limit * 8 < 4 * 192 * hardware.GIB


@pytest.mark.parametrize(("name", "memory"), [("h100x8", 79.6), ("h200x8", 140.4)])
def test_a_gpu_has_the_share_that_xla_takes(
  name: str, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
  for variable in hardware.GPU_SHARES:
    monkeypatch.delenv(variable, raising=False)
  chip = topologies.topology(name).chip
  assert chip.hbm_bytes / hardware.GIB == pytest.approx(memory, abs=0.1)
  assert chip.limit == pytest.approx(0.75 * chip.hbm_bytes, abs=1)
  assert f"device_memory_size: {chip.hbm_bytes}\n" in topologies.TARGETS[name[:4]]
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
  assert chip.limit == pytest.approx(0.9 * chip.hbm_bytes, abs=1)
  tpu = topologies.topology("v5e-4").chip
  assert tpu.limit == tpu.hbm_bytes


@pytest.mark.parametrize("share", ["92", "0", "75%", "nan"])
def test_a_share_of_a_gpu_that_is_none_is_an_error(
  share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  with pytest.raises(hardware.HardwareError, match=r"expected a share of the memory, such as \.75"):
    _ = topologies.topology("h100x8").chip.limit


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
