"""What the processes of a run do not agree on is named with its hosts."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import locks
from llava_sp_jax.data import measured
from llava_sp_jax.data.usable import Usable
from llava_sp_jax.distributed import processes
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import inputs, peers
from tests.conftest import ConfigMaker


def differ(*configs: config_lib.Config, **inputs: str) -> list[str]:
  said = [(f"host{i}", peers.facts(config, lambda: inputs)) for i, config in enumerate(configs)]
  return peers.differences([(host, json.loads(json.dumps(found))) for host, found in said])


def test_each_key_that_differs_is_a_line(tiny_config: ConfigMaker) -> None:
  ours = tiny_config()
  others = tiny_config(optimizer={"learning_rate": 0.5}, train={"seed": 7})
  assert differ(ours, ours, ours) == []
  assert differ(ours, ours, others) == [
    "config.optimizer.learning_rate: 0.01 in process 0 (host0), 1 (host1); 0.5 in process 2 (host2)",
    "config.train.seed: 0 in process 0 (host0), 1 (host1); 7 in process 2 (host2)",
  ]
  (line, _) = differ(*[ours] * 9, others)
  assert "0.01 in process 0 (host0), 1 (host1), 2 (host2), 3 (host3) and 5 more; 0.5 in" in line


def test_what_a_host_may_choose_is_not_compared(tiny_config: ConfigMaker) -> None:
  ours = tiny_config()
  data = dataclasses.replace(ours.data, threads=7, processes=3)
  assert differ(ours, dataclasses.replace(ours, data=data)) == []


def test_inputs_code_and_what_cannot_be_read_are_compared(tiny_config: ConfigMaker) -> None:
  config = tiny_config()

  def broken() -> dict[str, str]:
    raise FileNotFoundError("data.path: no file 'x'")

  one = peers.facts(config, lambda: {"data": "1", "tokenizer": "2"})
  two = peers.facts(config, broken)
  three = {**one, "code": "other", "version of jax": "0.0"}
  assert peers.differences([("a", one), ("b", two)]) == [
    "data: 1 in process 0 (a); FileNotFoundError: data.path: no file 'x' in process 1 (b)",
    "tokenizer: 2 in process 0 (a); absent in process 1 (b)",
  ]
  assert [line.split(":")[0] for line in peers.differences([("a", one), ("b", three)])] == [
    "code",
    "version of jax",
  ]


def test_files_of_validation_are_compared(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """Where a run reads them; their names alone are in the config."""
  path = tmp_path / "held_out.json"
  train = {"validate_every": 2}
  config = tiny_config(data={"validation_path": str(path)}, train=train)
  said = []
  for answer in ("red", "red", "blue"):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": answer}]
    path.write_text(json.dumps([{"conversations": turns}]))
    said.append((answer, peers.facts(config, functools.partial(inputs.validation_input, config))))
  assert peers.differences(said[:2]) == []
  (line,) = peers.differences(said)
  assert line.startswith("validation data: ")
  assert "in process 2 (blue)" in line
  path.unlink()
  gone = peers.facts(config, functools.partial(inputs.validation_input, config))
  assert gone["data"].startswith("FileNotFoundError: data.validation_path: no file '")
  assert inputs.validation_input(tiny_config(data={"validation_path": str(path)})) == {}
  assert inputs.validation_input(tiny_config(train=train)) == {}


@pytest.mark.parametrize("place", [0, 100, -1])
def test_weights_are_compared_by_names_sizes_and_ends(
  tiny_config: ConfigMaker, tmp_path: Path, place: int
) -> None:
  weights = tmp_path / "llm"
  weights.mkdir()
  (weights / "config.json").write_text("{}")
  content = bytearray(2 * peers.SMALL)
  (weights / "model.safetensors").write_bytes(content)
  config = tiny_config(init={"language_model": str(weights)})
  one = peers.facts(config, dict)
  content[place] = 1
  (weights / "model.safetensors").write_bytes(content)
  two = peers.facts(config, dict)
  (line,) = peers.differences([("a", one), ("b", two)])
  assert line.startswith("config.init.language_model (contents): ")
  (weights / "model.safetensors").rename(weights / "other.safetensors")
  assert peers.differences([("a", two), ("b", peers.facts(config, dict))])
  assert peers.of_folder(tmp_path / "gone") == "not there"


def test_a_run_folder_that_a_process_does_not_share_is_an_error(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(locks, "PATIENCE", 0.1)
  with locks.Lock(tmp_path / "shared", "llava-sp train") as lock:
    peers.compare_folders(tmp_path / "shared", lock)
    with pytest.raises(CheckpointError, match=r"--workdir .*/own: on .* all processes need one"):
      peers.compare_folders(tmp_path / "own", lock)


def test_other_sizes_of_an_epoch_end_the_run_before_it_is_saved(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Of an epoch that both have planned; one may be ahead of the other."""
  mine, others = Usable(), dict[str, str]()
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "all_gather", lambda text, name: [text, json.dumps(others)])
  sizes = measured.Measured.empty(3)
  sizes.fill(range(3), [(5, 5, 1, ""), (6, 6, 1, ""), (0, 0, 0, "gone")])
  mine.settle("epoch 0", sizes, "data")
  others |= {"epoch 0": sizes.digest(), "epoch 1": "another"}
  peers.compare_samples(mine)
  mine.settle("epoch 1", sizes, "data")
  with pytest.raises(CheckpointError, match="have measured the samples of an epoch differently"):
    peers.compare_samples(mine)
