"""llava-sp plan: help and errors."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import topologies
from tests.conftest import REPOSITORY
from tests.plan.plans import GIB, plan

RECIPE = str(REPOSITORY / "configs" / "finetune_lora.py")


def test_help_is_instant(capsys: pytest.CaptureFixture) -> None:
  started = time.monotonic()
  assert cli.main(["plan", "--help"]) == 0
  assert time.monotonic() - started < 5
  printed = capsys.readouterr().out
  assert all(
    f"--{name}" in printed for name in ("config", "topology", "what", "search", "out", "full")
  )
  assert all(name in printed for name in topologies.SLICES)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology", "v5e-16"], "no --config"),
    ([f"--config={RECIPE}", "--topology=v9"], "--topology: unknown 'v9'; known: "),
    ([f"--config={RECIPE}", "--topology=v5e-7x2"], "--topology: unknown 'v5e-7'; known: "),
    ([f"--config={RECIPE}", "--topology=v5e-4", "--filled=1.2"], "--filled: expected a share"),
    ([f"--config={RECIPE}", "--topology=v5e-4", "--filled=0"], "--filled: expected a share"),
    ([f"--config={RECIPE}", "--topology=v5e-16", "--what=x"], "--what: unknown 'x'"),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--weights=int8", "--cache=int8"],
      "--weights, --cache: of an evaluation; add --what eval",
    ),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--what=eval", "--weights=x"],
      "weights: unknown 'x'; known: ",
    ),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--search=many"],
      "--search: expected a whole number from 0, found 'many'",
    ),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--top=0"],
      "--top: expected a whole number from 1",
    ),
    ([f"--config={RECIPE}", "--topology=v5e-16", "--frobnicate=1"], "unknown --frobnicate"),
    ([f"--config={RECIPE}", "--topology=v5e-16", "--full=yes"], "--full: unknown 'yes'"),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--what=eval", "--filled=.8", "--search=3"],
      "--search, --filled: without effect with --what eval; leave them out",
    ),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--write-executable=x", "--out=y"],
      "--out: without effect with --write-executable; leave it out",
    ),
    ([f"--config={RECIPE}", "--topology=v5e-16", "--write=x.py"], "add --search N"),
    ([f"--config={RECIPE}", "--topology=h100x8", "--search=3"], "no speed is predicted for h100x8"),
  ],
)
def test_errors(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
  assert cli.main(["plan", *arguments]) == 1
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ("options", "fast"), [([], True), (["--full=true"], False), (["--full", "false"], True)]
)
def test_full_asks_for_code(
  options: list[str], fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  asked: list[bool] = []

  def compile_config(config: Any, topology: Any, what: str, keep: Any, fast: bool) -> Any:
    asked.append(fast)
    return {"train": dataclasses.replace(plan(8 * GIB).largest.compiled, full=not fast)}

  monkeypatch.setattr(compile_lib, "compile_config", compile_config)
  assert cli.main(["plan", f"--config={RECIPE}", "--topology=v5e-16", *options]) == 0
  assert asked == [fast]
