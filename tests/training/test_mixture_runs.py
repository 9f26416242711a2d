"""Runs on a mixture: a ledger of each source that adds up, also when the mixture changes."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.data import pack
from llava_sp_jax.data import sources as formats
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import ledger, loop, resume
from tests.conftest import ConfigMaker
from tests.end_to_end import cluster
from tests.training.looker import Looker
from tests.training.looker import config as tiny

STEPS, STOP, ROWS = 5, 3, 8
SIZES = {"a": 12, "b": 5, "c": 7}  # samples of each source
CHANGED = resume.ResumeOptions(changed=frozenset({"mixture"}))


@pytest.fixture
def values(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.Config:
  """Of a run on sources of three sizes, one of them packed; `mix` writes its mixture."""
  made = tiny(tiny_config)
  whole = json.loads(Path(made.data.path).read_text())
  for name, count in SIZES.items():
    (tmp_path / f"{name}.json").write_text(json.dumps(whole[:count]))
  images = made.data.image_folder
  pack.write(
    formats.open_path(str(tmp_path / "c.json"), images, lambda image: image), tmp_path / "c", "c"
  )
  data = dataclasses.replace(made.data, path="", mixture=str(tmp_path / "mixture.json"))
  return dataclasses.replace(made, data=data)


def mix(values: config_lib.Config, **weights: Any) -> None:
  file = Path(values.data.mixture)
  paths = {name: name if name == "c" else f"{name}.json" for name in weights}
  file.write_text(
    json.dumps({name: {"path": paths[name], "weight": w} for name, w in weights.items()})
  )


def read(folder: Path) -> collections.Counter[str]:
  """The samples of each source in the ledger."""
  found = collections.Counter[str]()
  for line in ledger.read(folder):
    for name, indices in line["trained"].items():
      found[name] += len(indices)
  return found


def stop_at(looker: Looker, step: int) -> None:
  looker.does = lambda number: signal.raise_signal(signal.SIGTERM) if number == step else None


@pytest.mark.parametrize("packing", [pytest.param("none", marks=pytest.mark.slow), "first_fit"])
def test_it_resumes_exactly(
  values: config_lib.Config, looker: Looker, tmp_path: Path, packing: str
) -> None:
  values = dataclasses.replace(
    values, data=dataclasses.replace(values.data, packing=packing, row_length=128)
  )
  mix(values, a=2, b=1)
  assert loop.train(values, tmp_path / "whole").step == STEPS
  wanted, looker.seen = looker.seen[:], []
  stop_at(looker, STOP)
  assert loop.train(values, tmp_path / "run").step == STOP
  looker.does = lambda number: None
  assert loop.train(values, tmp_path / "run").step == STEPS
  assert looker.seen == wanted
  assert [ledger.read(tmp_path / name) for name in ("run", "whole")] == [
    ledger.read(tmp_path / "whole")
  ] * 2


def test_it_goes_on_from_the_disk_of_a_host(
  values: config_lib.Config, looker: Looker, tmp_path: Path
) -> None:
  """Step 3 is kept there alone; what it says of the mixture is what the run goes on with."""
  mix(values, a=2, b=1)
  local = {"save_every": 2, "local_folder": str(tmp_path / "disk"), "local_every": STOP}
  values = dataclasses.replace(values, train=dataclasses.replace(values.train, **local))
  assert loop.train(values, tmp_path / "whole").step == STEPS
  wanted, looker.seen = looker.seen[:], []

  def fail(number: int) -> None:
    if number > STOP:
      raise RuntimeError("the power fails")

  looker.does = fail
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(values, tmp_path / "run")
  assert on_disk.steps(tmp_path / "run") == [2]
  looker.seen, looker.does = [], lambda number: None
  assert loop.train(values, tmp_path / "run").step == STEPS
  assert looker.seen == wanted[STOP:]


def test_it_may_change_and_the_ledger_adds_up(
  values: config_lib.Config, looker: Looker, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """24 rows of a : b = 24 : 5; then 16 of b : c = 10 : 7, in which b goes on where it stood."""
  mix(values, a=2, b=1)
  stop_at(looker, STOP)
  assert loop.train(values, tmp_path / "run").step == STOP
  before = read(tmp_path / "run")
  assert before == {"a": 20, "b": 4}  # 24 x 24/29 = 19.9
  looker.does = lambda number: None
  mix(values, b=2, c=1)
  with pytest.raises(CheckpointError, match=r"until step 3: mixture \(data.mixture\): a only there; "
                     r"b has weight 2 here, 1 there; c only here\. .*--allow-changed mixture"):  # fmt: skip
    loop.train(values, tmp_path / "run")
  assert read(tmp_path / "run") == before
  capsys.readouterr()
  assert loop.train(values, tmp_path / "run", options=CHANGED).step == STEPS
  after = read(tmp_path / "run")
  assert after == {"a": 20, "b": 4 + 9, "c": 7}  # 16 x 10/17 = 9.4
  times = collections.Counter(
    (name, i) for line in ledger.read(tmp_path / "run") for name in line["trained"]
    for i in line["trained"][name]
  )  # fmt: skip
  assert {times["b", i] for i in range(5)} == {2, 3}
  assert {times["c", i] for i in range(7)} == {1}
  assert {times["a", i] for i in range(12)} == {1, 2}
  said = capsys.readouterr()
  assert "WARNING: mixture is not what it was until step 3, as allowed" in said.err
  assert (
    "ledger: 40 samples read in 5 steps = 40 trained + 0 quarantined + 0 in skipped steps\n"
    "  a: 20 read = 20 trained\n  b: 13 read = 13 trained\n  c: 7 read = 7 trained" in said.out
  )
  mix(values, a=1)  # goes on where it stood five steps ago
  longer = dataclasses.replace(values, train=dataclasses.replace(values.train, steps=STEPS))
  options = dataclasses.replace(CHANGED, step=STOP)
  assert loop.train(longer, tmp_path / "run", options=options).step == STEPS
  assert read(tmp_path / "run") == {"a": 20 + 16, "b": 4}
  assert {
    collections.Counter(
      i for line in ledger.read(tmp_path / "run") for i in line["trained"].get("a", [])
    )[i]
    for i in range(12)
  } == {3}


def test_other_samples_of_a_source_are_refused(
  values: config_lib.Config, looker: Looker, tmp_path: Path
) -> None:
  mix(values, a=2, b=1)
  stop_at(looker, STOP)
  assert loop.train(values, tmp_path / "run").step == STOP
  about = tmp_path / "run" / on_disk.PLACE / str(STOP)
  known = on_disk.about(about)["mixture"]
  assert known["units"] == {"a": 24, "b": 5}
  assert re.fullmatch("[0-9a-f]{16}", known["sources"]["a"]["samples"])
  (tmp_path / "b.json").write_text((tmp_path / "c.json").read_text())
  with pytest.raises(CheckpointError, match=r"data \(data.path\): samples of b have fingerprint"):
    loop.train(values, tmp_path / "run", options=CHANGED)


def test_a_sample_that_is_read_too_often_is_found(tmp_path: Path) -> None:
  book = ledger.Ledger(tmp_path, 0, range(2), [True, True])
  for step, ids in enumerate(([0, 0], [1, 1], [0, 2], [0, 0]), 1):
    book.step(step, np.array(ids), ["a", "b"])
  total = ledger.check(tmp_path, 4, 2, {"b": range(3)})
  assert total.sources == {"a": {"trained": 4}, "b": {"trained": 4}}
  with pytest.raises(ledger.LedgerError, match=r"sample a, 0: read 3 times, another 1 times"):
    ledger.check(tmp_path, 4, 2, {"a": range(2), "b": range(3)})


@pytest.mark.parametrize(
  "packing",
  [
    pytest.param("none", marks=pytest.mark.slow),
    pytest.param("first_fit", marks=pytest.mark.guard),
  ],
)
def test_two_processes_read_what_one_reads(
  values: config_lib.Config, tmp_path: Path, packing: str
) -> None:
  """One process stops, the mixture changes, and two go on: as if one had."""
  values = dataclasses.replace(
    values, data=dataclasses.replace(values.data, packing=packing, row_length=128)
  )
  file = cluster.write_config(values, tmp_path / "tiny.py")
  books = []
  for topology in (cluster.Topology(), cluster.Topology(2, 1, (1, 2, 1))):
    folder = tmp_path / str(topology.processes)
    mix(values, a=2, b=1)
    short = ["--config.train.steps=5", "--config.train.save_every=3"]
    cluster.Cluster(file, folder, topology, *short).finish()
    mix(values, a=1, c=3)
    again = ["--allow-changed=mixture", "--from-step=3"]
    cluster.Cluster(file, folder, topology, *short, *again).finish()
    lines = [line for line in ledger.read(folder) if "rows" in line]
    found = collections.defaultdict(collections.Counter)
    for line in lines:
      for name, indices in line["trained"].items():
        found[line["step"]].update((name, i) for i in indices)
    books.append(dict(found))
    assert set(found) == set(range(1, STEPS + 1))
  assert books[0] == books[1]
