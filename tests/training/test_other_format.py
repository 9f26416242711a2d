"""A run that resumes on the same samples in another format, or from an earlier version."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.data import pack, sources
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import ledger, loop, resume
from tests.data import every_format
from tests.training.looker import Looker, logged


def packed(values: config_lib.Config, out: Path) -> config_lib.Config:
  data = values.data
  source = sources.open_path(data.path, data.image_folder, lambda image: image)
  pack.write(source, out, data.path)
  changed = dataclasses.replace(data, path=str(out), image_folder="")
  return dataclasses.replace(values, data=changed)


def ledger_of(folder: Path) -> list[bytes]:
  return [path.read_bytes() for path in sorted((folder / ledger.FOLDER).iterdir())]


@pytest.mark.parametrize("kind", [kind for kind in every_format.WRITERS if kind != "llava_json"])
def test_a_run_goes_on_in_another_format_as_if_nothing_had_changed(
  run: Path,
  values: config_lib.Config,
  looker: Looker,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  kind: str,
) -> None:
  assert loop.train(values, tmp_path / "whole").step == 5
  wanted, looker.seen = looker.seen[3:], []
  capsys.readouterr()
  if kind == "packed":
    other = packed(values, tmp_path / "other")
  else:
    data = every_format.rewritten(values.data, kind, tmp_path / "other")
    other = dataclasses.replace(values, data=data)
  assert loop.train(other, run).step == 5
  assert looker.seen == wanted
  assert logged(run) == [1, 2, 3, 4, 5]
  assert ledger.check(run, 5, 8, range(12)).read == 40
  ours, theirs = (ledger_of(f) for f in (run, tmp_path / "whole"))
  assert ours == theirs
  assert "WARNING" not in capsys.readouterr().err


def test_other_samples_in_another_format_are_refused(
  run: Path, values: config_lib.Config, looker: Looker, tmp_path: Path
) -> None:
  path = tmp_path / "fewer.json"
  path.write_text(json.dumps(json.loads(Path(values.data.path).read_text())[:9]))
  data = dataclasses.replace(values.data, path=str(path))
  other = packed(dataclasses.replace(values, data=data), tmp_path / "packed")
  with pytest.raises(CheckpointError, match=r"data \(data.path\) has fingerprint .* there"):
    loop.train(other, run)
  assert not looker.seen


def test_a_run_of_an_earlier_version_goes_on(
  run: Path, values: config_lib.Config, looker: Looker, tmp_path: Path
) -> None:
  """It recorded the hash of the file, which a packed folder knows as well."""
  former = hashlib.sha256(Path(values.data.path).read_bytes()).hexdigest()[:16]
  known = resume.about(run, 3)["inputs"]["data"]
  assert known != former
  for step in on_disk.steps(run):
    place = run / on_disk.PLACE / str(step) / "about" / "metadata"
    place.write_text(place.read_text().replace(known, former))
  assert resume.about(run, 3)["inputs"]["data"] == former
  assert loop.train(packed(values, tmp_path / "packed"), run).step == 5
  assert [number for number, *_ in looker.seen] == [3, 4]
