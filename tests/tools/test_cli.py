"""The console command: help without waiting, and one clear line for what is wrong."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llava_sp_jax
from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.tools import config_help
from llava_sp_jax.tools import train as train_tool
from llava_sp_jax.training import loop
from tests.conftest import REPOSITORY, ConfigMaker

HELP_SECONDS = 0.5  # of CPU time
IMPORTING = {"train": 4.0}  # its help names the rows of tables, which import jax and flax


def llava_sp(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "llava_sp_jax.cli", *arguments],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=False,
    env={**os.environ, "XLA_FLAGS": ""},
  )


def children_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_quick_and_has_an_example(command: str) -> None:
  before = children_seconds()
  done = llava_sp(*filter(None, [command, "--help"]))
  seconds = children_seconds() - before
  assert done.returncode == 0
  assert done.stderr == ""
  assert f"llava-sp {command}".strip() in done.stdout.partition("example:")[2]
  assert seconds < IMPORTING.get(command, HELP_SECONDS)


def test_the_demo_s_help_needs_no_environment(tmp_path: Path) -> None:
  shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
  done = subprocess.run(
    ["bash", "scripts/demo.sh", "--help"],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    timeout=20,
    check=True,
  )
  assert {"--variant", "--seed", "--scale"} <= set(done.stdout.split())
  assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


def test_the_package_runs_as_a_command_too() -> None:
  done = subprocess.run(
    [sys.executable, "-m", "llava_sp_jax", "--version"],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=True,
  )
  assert done.stdout == f"{llava_sp_jax.__version__}\n"


def test_help_lists_every_command() -> None:
  assert all(f"\n  {name} " in cli.usage() for name in cli.COMMANDS)


def test_train_s_help_says_what_every_key_means_and_allows(capsys: pytest.CaptureFixture) -> None:
  assert cli.main(["train", "--help"]) == 0
  printed = capsys.readouterr().out
  keys = list(config_help.fields(config_lib.Config()))
  assert not [key for key, _, meaning in keys if not meaning]
  for key, default, meaning in keys:
    assert f"  --config.{key}={default!r}\n      {meaning}\n" in printed
  assert "    none, first_fit, balanced, buckets\n" in printed
  assert (
    "--config.optimizer.b1=0.9\n      decay of the first moment\n      at least 0 and below 1\n"
    in printed
  )


def test_names_that_a_key_allows_are_those_of_its_table() -> None:
  """Every text that is no path, name or dtype has a table; its default is a row of it."""
  free = {
    "name",
    "model.dtype",
    "model.frozen_dtype",
    "data.path",
    "data.mixture",
    "data.image_folder",
    "data.tokenizer",
    "data.validation_path",
    "train.local_folder",
    "evaluate.data",
  }
  texts = {
    key: value
    for key, value, _ in config_help.fields(config_lib.Config())
    if isinstance(value, str) and not key.startswith("init.")
  }
  assert set(texts) - free == set(config_help.TABLES) - {"train.sinks"}
  for key in set(texts) - free:
    assert texts[key] in config_help.allowed(key, texts[key]).split(", "), key


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture) -> None:
  assert cli.main(["trian"]) == 2
  assert capsys.readouterr().err == (
    f"llava-sp: no command 'trian'; known: {', '.join(cli.COMMANDS)}\n"
  )


@pytest.fixture
def config_file(tiny_config: ConfigMaker, tmp_path: Path) -> str:
  path = tmp_path / "tiny.py"
  path.write_text(
    '"""Tiny."""\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config(arg=""):\n'
    f"  return ConfigDict({config_lib.to_dict(tiny_config())!r})\n"
  )
  return str(path)


def only_line(capsys: pytest.CaptureFixture, *arguments: str) -> str:
  """The single line of an error, on stderr; nothing on stdout; exit code 1."""
  assert cli.main([str(a) for a in arguments]) == 1
  printed = capsys.readouterr()
  assert printed.out == ""
  (line,) = printed.err.splitlines()
  assert line.startswith(f"llava-sp {arguments[0]}: ")
  return line


def test_an_unknown_key_lists_the_known_ones(
  capsys: pytest.CaptureFixture, config_file: str, tmp_path: Path
) -> None:
  line = only_line(
    capsys,
    "train",
    f"--config={config_file}",
    f"--workdir={tmp_path / 'run'}",
    "--config.train.stepz=3",
  )
  assert "config.train.stepz: unknown key; known here: steps, epochs, batch_size" in line
  assert not (tmp_path / "run").exists()


def test_many_unknown_keys_are_named_once() -> None:
  values = {"train": {f"key_{i}": i for i in range(9)}, "modle": {}}
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.from_dict(values)
  text = str(error.value)
  assert "config.modle: unknown key; known here: name, model" in text
  assert "config.train: unknown keys key_0, key_1, key_2, key_3, key_4, key_5 and 3 more; " in text
  assert text.count("known here") == 2


def test_a_value_of_the_wrong_type(
  capsys: pytest.CaptureFixture, config_file: str, tmp_path: Path
) -> None:
  line = only_line(
    capsys,
    "train",
    f"--config={config_file}",
    f"--workdir={tmp_path / 'run'}",
    "--config.train.steps=many",
  )
  assert "config.train.steps: expected int, found 'many'" in line


def test_overrides_reach_the_config(config_file: str) -> None:
  config, options = train_tool.read(
    [
      f"--config={config_file}",
      "--workdir",
      "x",
      "--config.model.tower.width=64",
      "--config.train.steps",
      "7",
    ]
  )
  assert (config.model.tower.width, config.train.steps, options["workdir"]) == (64, 7, "x")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["train", "--config=gone.py", "--workdir=x"], "--config: no file 'gone.py'"),
    (["train"], "no --config, no --workdir"),
    (["eval", "--checkpoint=gone", "--data=gone"], "gone/test.json: no such file"),
    (["generate", "--checkpoint=gone", "--image=gone.png", "--question=x"],
     "image gone.png: no such file"),
    (["generate", "--checkpoint=gone", "--question=x"], "gone: not a run folder"),
    (["report", "--runs", "gone", "--scores=gone", "--out=out"], "gone/scores.json"),
    (["tokenizer", "gone.gguf", "out"], "gone.gguf: no such file"),
  ],
)  # fmt: skip
def test_missing_files_are_named(
  capsys: pytest.CaptureFixture,
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: Path,
  arguments: list[str],
  message: str,
) -> None:
  monkeypatch.chdir(tmp_path)
  assert message in only_line(capsys, *arguments)


def test_a_broken_image_is_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
  path = tmp_path / "broken.png"
  path.write_bytes(b"no picture")
  line = only_line(capsys, "generate", "--checkpoint=x", f"--image={path}", "--question=what?")
  assert f"image {path}: cannot be decoded" in line


def test_generate_computes_in_the_dtype_that_is_asked_for(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  asked = []

  def opened(path: str, options: Any = None, dtype: str = "", **formats: str) -> None:
    asked.append(dtype)
    raise FileNotFoundError(path)

  monkeypatch.setattr("llava_sp_jax.infer.pretrained.from_any", opened)
  for more in ([], ["--dtype=float32"]):
    only_line(capsys, "generate", "--checkpoint=x", "--question=what?", *more)
  assert asked == ["", "float32"]


def test_an_unknown_task_lists_the_known_ones(capsys: pytest.CaptureFixture) -> None:
  line = only_line(capsys, "eval", "--checkpoint=x", "--data=x", "--task=vqa")
  assert "--task: unknown 'vqa'; known: easy_vqa" in line


def test_the_process_exits_with_one_and_a_line() -> None:
  done = llava_sp("train", "--config=gone.py", "--workdir=x")
  assert done.returncode == 1
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("step", "code"), [(4, 0), (3, 75)])
def test_train_s_code_says_whether_the_run_is_complete(
  config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, code: int
) -> None:
  """Launchers go on after 75; the end-to-end test of SIGTERM sees it from a real run."""
  monkeypatch.setattr(loop, "train", lambda *_, **__: loop.Result(step, 4, 1.0, 0))
  assert cli.main(["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]) == code


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
  def broken(argv: list[str]) -> None:
    raise ValueError("a bug")

  monkeypatch.setattr(train_tool, "main", broken)
  with pytest.raises(ValueError, match="a bug"):
    cli.main(["train"])
