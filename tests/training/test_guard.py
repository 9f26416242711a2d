"""A step that is not finite changes nothing but the counter; too many of them end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.data import pipeline
from llava_sp_jax.training import guard, ledger, loop
from llava_sp_jax.training.state import TrainState
from tests.conftest import ConfigMaker


def state(value: float, step: int) -> TrainState:
  return TrainState(jnp.int32(step), {"a/x": jnp.full(3, value)}, {}, (jnp.float32(value), None))


@pytest.mark.parametrize(
  ("loss", "norm", "kept"), [(1.0, 2.0, True), (np.nan, 2.0, False), (1.0, np.inf, False)]
)
def test_the_choice(loss: float, norm: float, kept: bool) -> None:
  choose = jax.jit(guard.keep_finite)
  result, flag = choose(state(1.0, 4), state(2.0, 5), jnp.float32(loss), jnp.float32(norm))
  assert int(result.step) == 5
  assert float(flag) == (not kept)
  for leaf in (*result.trainable["a/x"], result.opt_state[0]):
    assert float(leaf) == (2.0 if kept else 1.0)


def test_only_a_row_of_them_is_an_end() -> None:
  seen: list[int] = []
  watch = guard.Guard(2, seen.append)
  for number, flag in enumerate([0, 1, 0, 1, 0, 0], start=1):
    watch.step(number, {"nonfinite": jnp.float32(flag)})
  assert (seen, watch.count) == ([2, 4], 2)
  watch.step(7, {"nonfinite": jnp.float32(1)})
  assert watch.count == 2, "it looks one step late"
  watch.step(8, {"nonfinite": jnp.float32(1)})
  with pytest.raises(guard.NonFiniteError, match=r"steps 7 to 8: .* 2 times in a row"):
    watch.settle()
  assert seen == [2, 4, 7, 8]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
  """The batches of these steps have a weight that is no number."""
  real = pipeline.Batches.__next__
  taken = [0]

  def bad(self: pipeline.Batches) -> dict[str, Any]:
    batch = real(self)
    taken[0] += 1
    if taken[0] in steps:
      batch["weights"][0, 0] = np.nan
    return batch

  monkeypatch.setattr(pipeline.Batches, "__next__", bad)


def test_a_run_goes_on_after_a_bad_step_and_ends_after_many(
  tiny_config: ConfigMaker,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:
  config = tiny_config(
    "pretrain", train={"steps": 6, "save_every": 3, "max_nonfinite": 2, "preflight": False}
  )  # it reads batches of its own
  poison(monkeypatch, {2, 5, 6})
  with pytest.raises(guard.NonFiniteError, match="steps 5 to 6: "):
    loop.train(config, tmp_path / "run")
  out = capsys.readouterr().out
  first = ledger.read(tmp_path / "run")
  ids = next(line["trained"] for line in first if line["step"] == 2 and "rows" in line)
  assert f"step 2: loss or gradient is not finite, skipped; process 0 had samples {ids}" in out
  monkeypatch.undo()
  loop.train(config, tmp_path / "run")  # from step 3, whose checkpoint knows nothing of NaN
  records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in records] == list(range(1, 7))
  assert [r["nonfinite"] for r in records] == [0, 1, 0, 0, 0, 0]
  assert [r["skipped_steps"] for r in records] == [0, 1, 1, 1, 1, 1]
  assert all(np.isfinite(r["loss"]) for r in records[2:])
  assert ledger.check(tmp_path / "run", 6, 8, range(12)) == ledger.Totals(6, 48, 40, 0, 8)
  assert "ledger: 48 samples read in 6 steps = 40 trained + 0 quarantined + 8 in skipped steps" in (
    capsys.readouterr().out
  )
