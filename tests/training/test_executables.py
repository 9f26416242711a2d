"""A compiled step from a file: the same bits without compiling, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax.training import executables, loop
from llava_sp_jax.training import run as run_lib
from tests.conftest import ConfigMaker
from tests.end_to_end import cluster
from tests.end_to_end.kill_trials import numbers


@pytest.fixture(scope="module")
def recipe(tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
  config = tiny_config("pretrain", "none", train={"steps": 3, "sinks": ()})
  return cluster.write_config(config, tmp_path_factory.mktemp("recipe") / "recipe.py")


@pytest.fixture(scope="module")
def written(recipe: Path) -> Path:
  """As a user writes it, for the eight devices of this process."""
  file = recipe.with_name("step.bin")
  options = [f"--config={recipe}", "--topology=here", f"--write-executable={file}"]
  assert cli.main(["plan", *options, "--config.data.path=elsewhere.json"]) == 0
  return file


class CompiledError(Exception):
  """The step would be compiled here."""


def train(recipe: Path, workdir: Path, *more: str) -> int:
  return cli.main(["train", f"--config={recipe}", f"--workdir={workdir}", *more])


def test_the_same_bits_without_compiling(
  recipe: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  assert train(recipe, tmp_path / "compiled") == 0

  class Refuses:
    def lower(self, *_: Any) -> Any:
      raise CompiledError

  monkeypatch.setattr(run_lib, "compile_step", lambda *_: Refuses())
  assert train(recipe, tmp_path / "loaded", f"--executable={written}") == 0
  assert len(numbers(tmp_path / "loaded")) == 3
  assert numbers(tmp_path / "loaded") == numbers(tmp_path / "compiled")
  shapes = json.loads(written.with_name("step.bin.json").read_text())["batch"]
  file = edited(written, tmp_path, "batch", {**shapes, "tokens": [4, 64]})
  with pytest.raises(CompiledError):  # batches of another shape have a program of their own
    train(recipe, tmp_path / "other", f"--executable={file}")


def edited(written: Path, folder: Path, name: str, value: Any) -> Path:
  """A copy that says something else about itself."""
  file = folder / "step.bin"
  shutil.copy(written, file)
  said = json.loads(written.with_name("step.bin.json").read_text())
  said[name] = value
  file.with_name("step.bin.json").write_text(json.dumps(said))
  return file


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("libtpu", "0.0.1"),
    ("jax", "0.0.1"),
    ("compiler", "Built on another day"),
    ("devices", "16 x TPU v5 lite"),
    ("order of devices", "0123"),
    ("mesh", "data 8 x fsdp 1 x tensor 1"),
    ("code", "0123"),
  ],
)
def test_another_machine_is_refused_first(
  recipe: Path,
  written: Path,
  tmp_path: Path,
  capsys: pytest.CaptureFixture,
  name: str,
  value: str,
) -> None:
  file = edited(written, tmp_path, name, value)
  assert train(recipe, tmp_path / "run", f"--executable={file}") == 1
  message = capsys.readouterr().err
  assert f"--executable {file}: was compiled for another run" in message
  assert f"{name}: " in message
  assert f" here, {value} there" in message
  assert message.count(" there;") == 1  # nothing else differs
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.train.steps=4", "config.train.steps: 4 here, 3 there"),
    ("--config.optimizer.b1=0.8", "config.optimizer.b1: 0.8 here, 0.9 there"),
    ("--config.model.remat=full", "config.model.remat: 'full' here, 'none' there"),
    ("--config.mesh.tensor=2", "mesh: data 1 x fsdp 4 x tensor 2 here, data 1 x fsdp 8"),
    ("--config.mesh.base=replicate", "mesh.base: replicate here, shard there"),
  ],
)
def test_another_config_is_refused_first(
  recipe: Path,
  written: Path,
  tmp_path: Path,
  capsys: pytest.CaptureFixture,
  flag: str,
  message: str,
) -> None:
  assert train(recipe, tmp_path / "run", f"--executable={written}", flag) == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.guard
def test_steps_that_follow_from_the_data(
  recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """Twelve samples in batches of eight: three steps of two epochs, in the file as in the run."""
  file, epochs = tmp_path / "step.bin", "--config.train.epochs=2"
  options = [f"--config={recipe}", epochs, "--config.train.steps=1000"]
  assert cli.main(["plan", *options, "--topology=here", f"--write-executable={file}"]) == 0
  assert "for here and a run of 3 steps" in capsys.readouterr().out
  given = [*options[1:], f"--executable={file}"]
  assert train(recipe, tmp_path / "run", *given) == 0
  assert train(recipe, tmp_path / "run", *given) == 0  # nothing is left to do
  said = json.loads(file.with_name("step.bin.json").read_text())
  said["config"]["train"]["steps"] = 4
  file.with_name("step.bin.json").write_text(json.dumps(said))
  assert train(recipe, tmp_path / "other", *given) == 1
  assert "config.train.steps: 3 here, 4 there" in capsys.readouterr().err


def test_it_is_compared_before_the_data_are_measured(
  recipe: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  file = edited(written, tmp_path, "jax", "0.0.1")

  def read(*_: Any, **__: Any) -> Any:
    raise AssertionError("the data are read")

  monkeypatch.setattr(loop.pipeline, "make", read)
  for more in ((), ("--config.train.epochs=2",)):
    assert train(recipe, tmp_path / "run", f"--executable={file}", *more) == 1


def test_it_is_loaded_while_the_data_are_opened(
  recipe: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Neither waits for the other to begin."""
  loads, opens = threading.Event(), threading.Event()
  load, make = executables._load, loop.pipeline.make

  def loading(*given: Any) -> Any:
    loads.set()
    assert opens.wait(60)
    return load(*given)

  def opening(*given: Any, **more: Any) -> Any:
    opens.set()
    assert loads.wait(60)
    return make(*given, **more)

  monkeypatch.setattr(executables, "_load", loading)
  monkeypatch.setattr(loop.pipeline, "make", opening)
  assert train(recipe, tmp_path / "run", f"--executable={written}") == 0


def test_files_that_are_damaged(
  recipe: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  file = edited(written, tmp_path, "sha256", "0")
  assert train(recipe, tmp_path / "one", f"--executable={file}") == 1
  assert "expected the executable that step.bin.json describes, found" in capsys.readouterr().err
  assert not (tmp_path / "one").exists()
  file = edited(written, tmp_path, "arguments", 3)
  assert train(recipe, tmp_path / "one", f"--executable={file}") == 1
  assert f"{file}: cannot be loaded on these devices (" in capsys.readouterr().err
  file.with_name("step.bin.json").unlink()
  assert train(recipe, tmp_path / "two", f"--executable={file}") == 1
  assert f"{file}.json: no such file" in capsys.readouterr().err
  file.with_name("step.bin.json").write_text('{"config": {"model": 3}}')
  assert train(recipe, tmp_path / "three", f"--executable={file}") == 1
  assert "jax: 0." in (message := capsys.readouterr().err)
  assert "unknown there" in message


def test_what_no_executable_is_written_for(recipe: Path, capsys: pytest.CaptureFixture) -> None:
  options = ["plan", f"--config={recipe}", "--write-executable=x.bin"]
  assert cli.main([*options, "--topology=h100x8"]) == 1
  assert "compiles for TPUs that are absent, not for h100x8" in capsys.readouterr().err
  assert cli.main([*options, "--topology=v9"]) == 1
  assert "--topology: unknown 'v9'" in capsys.readouterr().err
  assert cli.main([*options, "--topology=here", "--config.train.batch_size=7"]) == 1
  assert "7 rows" in capsys.readouterr().err


@pytest.mark.guard
def test_it_is_written_for_an_absent_slice(recipe: Path, tmp_path: Path) -> None:
  """Needs libtpu; the executable can be loaded on a TPU only."""
  pytest.importorskip("libtpu")
  file = tmp_path / "v5e.bin"
  options = [f"--config={recipe}", "--topology=v5e-8", f"--write-executable={file}"]
  assert cli.main(["plan", *options]) == 0
  said = json.loads(file.with_name("v5e.bin.json").read_text())
  assert said["devices"] == "8 x TPU v5 lite"
  assert said["compiler"].startswith("Built on")
  assert said["mesh"] == "data 1 x fsdp 8 x tensor 1"
  assert executables._version("libtpu") == said["libtpu"]
  assert file.stat().st_size > 100_000
