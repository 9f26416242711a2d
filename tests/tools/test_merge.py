"""What convert and merge write stands alone, and neither writes over what it did not make."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax import cli, folders
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import opening, own_folders, runs, stream, writing
from llava_sp_jax.convert import folding, formats
from llava_sp_jax.progress import Progress
from tests.convert.test_round_trip import source


def run_on(converted: Path, folder: Path) -> Path:
  """A finished run whose adapters and projector go on from those of a converted folder."""
  config = runs.read_config(converted)
  whole = opening.open_any(converted, formats.Options())
  init = config_lib.InitConfig(checkpoint=str(converted))
  train = dataclasses.replace(config.train, steps=7)
  runs.write_config(folder, dataclasses.replace(config, init=init, train=train))
  (folder / "checkpoints").mkdir()
  trained = {p: x for p, x in whole.leaves.items() if p.startswith("projector/") or "/lora_" in p}
  about = {"fingerprint": opening.base_fingerprint(whole), "stage": "finetune", "name": "run"}
  stream.write(folder, trained, about, Progress(1, "GB"))
  (folder / "checkpoints/0").rename(folder / "checkpoints/7")
  return folder


def test_a_merge_of_a_run_on_a_converted_adapter_stands_alone(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """Its logits are compared unasked; what it was made of may go."""
  made = source("pooling")
  writing.write(made, tmp_path / "adapter")
  run = run_on(tmp_path / "adapter", tmp_path / "run")
  assert cli.main(["merge", str(run), str(tmp_path / "merged")]) == 0
  assert "the most likely token is the same at 100.0% of the positions" in capsys.readouterr().out
  wanted = folding.fold(made)
  shutil.rmtree(run)
  shutil.rmtree(tmp_path / "adapter")
  moved = (tmp_path / "merged").rename(tmp_path / "elsewhere")
  opened = own_folders.finished(moved, "init.checkpoint")
  assert opened.config.init == config_lib.InitConfig()
  assert opened.config.model.lora.rank == 0
  assert opened.leaves.keys() == wanted.leaves.keys()
  for path, leaf in wanted.leaves.items():
    np.testing.assert_array_equal(opened.leaves[path].read(), leaf.read(), err_msg=path)
  assert cli.main(["export", str(moved), str(tmp_path / "llm"), "--format=language_model"]) == 0
  assert not list(tmp_path.rglob(folders.MARK))


@pytest.mark.parametrize("command", ["convert", "merge", "export"])
def test_a_run_that_has_no_checkpoint_yet_is_not_written_over(
  tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
  run = tmp_path / "run"
  runs.write_config(run, config_lib.Config(name="mine"))
  (run / "checkpoints").mkdir()
  before = (run / runs.CONFIG_FILE).read_text()
  more = ["--format=llava"] if command == "export" else []
  assert cli.main([command, str(tmp_path / "gone"), str(run), *more]) == 1
  said = capsys.readouterr().err
  assert said == (
    f"llava-sp {command}: {run}: exists and holds checkpoints, config.json; name a new folder\n"
  )
  assert (run / runs.CONFIG_FILE).read_text() == before


def test_what_another_command_left_is_not_finished_by_this_one(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  (tmp_path / folders.MARK).write_text(json.dumps({"command": "convert"}))
  (tmp_path / "config.json").write_text("{}")
  assert cli.main(["merge", "gone", str(tmp_path)]) == 1
  assert "left unfinished by `llava-sp convert`; give that command again" in capsys.readouterr().err
