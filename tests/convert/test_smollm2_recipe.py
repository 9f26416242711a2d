"""The recipe of SmolLM2 as a user starts it: a tower trained elsewhere, and all commands in a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from llava_sp_jax.checkpoints import initial, own_folders
from llava_sp_jax.training import optimizer
from tests.convert.test_smollm2 import RECIPE, REPOSITORY, recipe


@pytest.mark.slow
def test_recipe_with_a_tower_trained_elsewhere(
  smollm2_file: Path, tiny_config, tmp_path: Path
) -> None:
  """`init.vision_tower` takes the tower of a run; then stage 1 trains the projector only."""
  from llava_sp_jax.training import loop

  ours = recipe(f"stage=pretrain,tower={tmp_path / 'run'}")
  assert ours.init.vision_tower == str(tmp_path / "run")
  groups = {
    p: optimizer.group_of(p, ours.optimizer.stage) for p in own_folders.abstract_leaves(ours.model)
  }
  assert {p.split("/")[0] for p, g in groups.items() if g != optimizer.FROZEN} == {"projector"}
  loop.train(tiny_config("pretrain_all", train={"steps": 2}), tmp_path / "run")
  other = tiny_config("pretrain", init={"vision_tower": str(tmp_path / "run")})
  taken = initial.initial_params(other)["vision_tower"]
  trained = unflatten_dict(own_folders.open_own(tmp_path / "run").params(), sep="/")["vision_tower"]
  jax.tree.map(np.testing.assert_array_equal, taken, trained)
  fresh = initial.initial_params(tiny_config("pretrain"))["vision_tower"]
  assert not np.array_equal(fresh["patch_embed"]["kernel"], taken["patch_embed"]["kernel"])


def llava_sp(*arguments: str) -> str:
  """A command as a user gives it, on one device."""
  done = subprocess.run(
    [sys.executable, "-m", "llava_sp_jax.cli", *arguments],
    cwd=REPOSITORY,
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_recipe_end_to_end(smollm2_file: Path, tiny_data: Path, tmp_path: Path) -> None:
  """Two steps of each stage, evaluation and report, through the command line."""
  tokenizer, first, second = tmp_path / "tokenizer", tmp_path / "first", tmp_path / "second"
  llava_sp("tokenizer", str(smollm2_file), str(tokenizer))
  options = f"data={tiny_data},tokenizer={tokenizer}"
  short = ("--config.train.steps=2", "--config.train.batch_size=2", "--config.train.log_every=1")
  out = llava_sp(
    "train", f"--config={RECIPE}:stage=pretrain,{options}", f"--workdir={first}", *short
  )
  assert "134,515,008 frozen" in out  # the decoder, and nothing else
  llava_sp(
    "train",
    f"--config={RECIPE}:stage=finetune,init={first},{options}",
    f"--workdir={second}",
    *short,
  )
  for run in (first, second):
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["quarantined"] == 0
  # Text without meaning would cost log(49152) = 10.8 nats a token.
  assert metrics(second)[0]["loss"] < 8.0
  scores = tmp_path / "eval"
  llava_sp(
    "eval",
    f"--checkpoint={second}",
    f"--data={tiny_data}",
    f"--out={scores}",
    "--limit=4",
    "--batch-size=4",
  )
  assert json.loads((scores / "scores.json").read_text())["by_kind"]["all"]["items"] == 4
  llava_sp(
    "report",
    "--runs",
    str(first),
    str(second),
    f"--scores={scores}",
    f"--out={tmp_path / 'report'}",
  )
  assert (tmp_path / "report" / "report.md").is_file()
