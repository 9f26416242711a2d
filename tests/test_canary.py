"""What the canary of a result looks at: every loss and every answer, and no rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> Any:
  monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
  import canary

  return canary


def write_run(folder: Path, loss: float = 1.25, rate: float = 3.0, text: str = "yes") -> None:
  """A run of both stages and its answers, as a recipe leaves them."""
  for stage in ("finetune", "pretrain"):
    (folder / "base" / stage).mkdir(parents=True)
    line = {"step": 5, "loss": loss if stage == "pretrain" else 0.5, "steps_per_second": rate}
    (folder / "base" / stage / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  (folder / "base/eval").mkdir()
  answer = {"text": text, "verdict": "right", "id": 7}
  (folder / "base/eval/predictions.jsonl").write_text(json.dumps(answer) + "\n")
  (folder / "base/eval/scores.json").write_text('{"by_kind": {"all": {"accuracy": 1.0}}}')


def test_losses_in_the_order_of_stages_then_answers(canary: Any, tmp_path: Path) -> None:
  write_run(tmp_path)
  assert canary.bits(tmp_path) == [
    '{"step": 5, "loss": 1.25}',
    '{"step": 5, "loss": 0.5}',
    '["yes", "right"]',
    '{"all": {"accuracy": 1.0}}',
  ]


@pytest.mark.parametrize(
  ("other", "same"), [({"rate": 9.0}, True), ({"loss": 1.2500001}, False), ({"text": "no"}, False)]
)
def test_what_counts(
  canary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Any, same: bool
) -> None:
  made: list[Any] = [{}, other]
  monkeypatch.setitem(
    canary.RECIPES,
    "easy_vqa",
    lambda variant, scale, folder, *rest: write_run(folder, **made.pop(0)),
  )
  first = canary.canary("easy_vqa", ["none"], 0.1, "data")
  assert (canary.canary("easy_vqa", ["none"], 0.1, "data") == first) is same
