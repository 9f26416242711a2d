"""A second prediction of a compiled step, by the cycles that the compiler states for its code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import report, topologies
from tests.plan.test_compile import LIBTPU

LAYERS, ROWS, LENGTH, WIDTH, HEADS = 3, 4, 2048, 4096, 32
LOOPS = 2.5  # the compiler states so many times too many cycles for fusions without a product
KERNELS = 0.5  # share of the peak of attention's kernels, for which it states none
PRODUCTS = 2 + 5  # of attention, forward and backward


def wide() -> config_lib.Config:
  """A few layers of a 7B decoder with adapters, so that products take most of the time."""
  text = {"width": WIDTH, "heads": HEADS, "kv_heads": HEADS, "mlp_width": 11008}
  return config_lib.from_dict(
    {
      "name": "wide",
      "model": {
        "tower": {"image_size": 28, "width": 128, "layers": 2, "heads": 2, "mlp_width": 256},
        "projector": {"variant": "none"},
        "language_model": {**text, "vocab_size": 1024, "layers": LAYERS},
        "lora": {"rank": 128},
      },
      "data": {"row_length": LENGTH},
      "train": {"batch_size": ROWS},
      "mesh": {"base": "replicate"},
    }
  )


class Program:
  """Reads the text of a compiled program, without the reader that `plan` has."""

  def __init__(self, text: str):
    blocks = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text)
    named = {m[1]: block for block in blocks if (m := re.match(r"(?:ENTRY )?%(\S+) \(", block))}
    self._lines = {name: block.splitlines()[1:] for name, block in named.items()}
    self.entry = next(name for name, block in named.items() if block.startswith("ENTRY"))

  def cycles(self, name: str) -> float:
    """The cycles of all operations of a computation, one after another, loops included."""
    total = 0.0
    for line in self._lines[name]:
      if loop := re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line):
        total += self._turns(loop[1]) * self.cycles(loop[2])
      elif found := re.search(r'"estimated_cycles":"(\d+)"', line):
        total += int(found[1]) / (LOOPS if "kind=kLoop" in line else 1)
    return total

  def _turns(self, condition: str) -> int:
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(self._lines[condition]))
    return max(int(value) for value in constants)


@pytest.mark.slow
@LIBTPU
def test_cycles_of_the_code_agree_with_the_plan(tmp_path: Path) -> None:
  """Within 15% of the plan that reads cycles, too, and of the quick plan by 1.35 times at most.

  The quick plan is the faster one: it takes every product at 93% of the peak.
  """
  topology = topologies.topology("v5e-4")
  quick, full = (
    report.make(
      wide(),
      topology,
      "train",
      compile_lib.compile_config(wide(), topology, "train", tmp_path / str(fast), fast),
    ).seconds
    for fast in (True, False)
  )
  (text,) = (file.read_text() for file in (tmp_path / "False").glob(f"*{compile_lib.CODE}"))
  program = Program(text)
  square = 2 * HEADS * LENGTH**2 * (WIDTH // HEADS) / 2  # a product on the causal half
  rows = ROWS / topology.chips
  attention = LAYERS * rows * PRODUCTS * square / (KERNELS * topology.chip.peak_flops)
  second = program.cycles(program.entry) / topology.chip.clock + attention
  print(f"quick {quick:.4f} s, full {full:.4f} s, cycles {second:.4f} s")
  assert second == pytest.approx(full, rel=0.15)
  assert 1 < second / quick < 1.35
