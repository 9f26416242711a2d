"""configs/finetune.py: a user's data on a checkpoint, whose sizes it takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llava_sp_jax import cli, recipes
from llava_sp_jax.config import ConfigError
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import loop
from llava_sp_jax.training import run as run_lib
from tests.conftest import REPOSITORY, ConfigMaker
from tests.training.looker import Looker

RECIPE = f"{REPOSITORY}/configs/finetune.py"


def test_sizes_and_reading_are_the_checkpoint_s(run_folder: Path, tiny_data: Path) -> None:
  base = json.loads((run_folder / "config.json").read_text())
  options = (
    f"init={run_folder},data={tiny_data}/train.json,images={tiny_data}/images,epochs=3,batch=8"
  )
  config = recipes.load(f"{RECIPE}:{options},row_length=96")
  assert dataclasses.asdict(config.model)["tower"] == base["model"]["tower"]
  assert config.model.lora.rank == 8, "its adapters go on learning"
  assert config.data.template == base["data"]["template"]
  assert config.data.tokenizer == str(run_folder / "tokenizer"), "its own copy"
  assert config.train.steps == 5, "3 epochs of 12 samples in batches of 8"
  assert config.data.row_length == 96
  assert (config.optimizer.stage, config.optimizer.learning_rate) == ("finetune", 2e-4)


@pytest.mark.guard
def test_a_converted_checkpoint_is_trained_on(
  run_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
  """Merged, it has no adapters: the recipe gives it new ones, or trains the decoder whole."""
  merged = tmp_path / "merged"
  assert cli.main(["merge", str(run_folder), str(merged)]) == 0
  options = (
    f"init={merged},data={tiny_data}/train.json,images={tiny_data}/images,batch=8,row_length=128"
  )
  whole = recipes.load(f"{RECIPE}:{options},rank=0")
  assert (whole.optimizer.stage, whole.optimizer.learning_rate) == ("finetune_full", 2e-5)
  assert (
    cli.main(
      [
        "train",
        f"--config={RECIPE}:{options},rank=4",
        f"--workdir={tmp_path}/run",
        "--config.train.steps=2",
      ]
    )
    == 0
  )
  config = json.loads((tmp_path / "run/config.json").read_text())
  assert config["model"]["lora"] == {"rank": 4, "alpha": 8.0, "dropout": 0.05}
  assert config["data"]["tokenizer"] == str(merged / "tokenizer")


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ("", "no init= and no data= after the ':'"),
    ("init=x,data=y,batch=0", "batch at least 1"),
    ("init=x,data=y,epochs=0", "epochs above 0"),
    ("init=gone,data=y", "gone: not a run folder"),
    ("init={run},data=gone.json", "no file 'gone.json'"),
  ],
)
def test_what_is_missing_is_said(run_folder: Path, options: str, said: str) -> None:
  with pytest.raises((ConfigError, FileNotFoundError, CheckpointError), match=said):
    recipes.load(f"{RECIPE}:{options.format(run=run_folder)}")


@pytest.mark.parametrize("name", ["pooling/llava-lora", "clip-vit-tiny"])
def test_a_checkpoint_of_others_is_converted_first(name: str) -> None:
  folder = REPOSITORY / "tests/golden" / name
  with pytest.raises(
    CheckpointError, match=r"model_type '\w+'; read it with llava-sp convert"
  ) as e:
    recipes.load(f"{RECIPE}:init={folder},data=y")
  assert len(str(e.value)) < len(str(folder)) + 200


def test_captions_know_no_questions(
  tiny_config: ConfigMaker, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(run_lib, "compile_step", lambda *_: Looker())  # nothing is asked of its model
  loop.train(tiny_config("pretrain", train={"steps": 1, "preflight": False}), tmp_path / "pretrain")
  options = f"init={tmp_path}/pretrain,data={tiny_data}/train.json"
  with pytest.raises(ConfigError, match=r"trained on captions .* give template=v1 or another"):
    recipes.load(f"{RECIPE}:{options}")
  assert recipes.load(f"{RECIPE}:{options},template=v1").data.template == "v1"
