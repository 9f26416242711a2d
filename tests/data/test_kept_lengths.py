"""Sizes that were kept: what a new run measures again, a resumed one does not, and hosts agree on."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import kept, lengths, measured, sources
from llava_sp_jax.data.anyres import Reader
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.data.usable import Usable
from tests.conftest import ConfigMaker
from tests.data.mixed import COUNT, TILE, mixed_config


@pytest.fixture
def data(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> config_lib.DataConfig:
  """Samples of which the picture of every fourth is away; they count as large."""
  monkeypatch.setattr(kept, "SMALL", 3)
  (tmp_path / "data").mkdir()
  found = mixed_config(tiny_config, tmp_path / "data").data
  picture(found).rename(tmp_path / "away.png")
  return found


def picture(data: config_lib.DataConfig) -> Path:
  return Path(data.image_folder) / "2.png"


def restore(data: config_lib.DataConfig, tmp_path: Path) -> None:
  (tmp_path / "away.png").rename(picture(data))


def of(
  data: config_lib.DataConfig,
  run: Path | None,
  said: list[str] | None = None,
  resumed: bool = False,
  book: Usable | None = None,
  **options: Any,
) -> measured.Measured:
  """Measures as a run in `run` does when it starts, or resumes, or in another of its pipelines."""
  source = sources.of(data, Reader(data, TILE))
  say = (said if said is not None else []).append
  index = options["hosts"].index if "hosts" in options else 0
  used = book or Usable(run, resumed, not index)
  found = lengths.Lengths(
    source,
    Tokenizer(data.tokenizer),
    data,
    TILE,
    0,
    Quarantine(),
    run,
    say,
    usable=used,
    **options,
  ).measured(0)
  if not book:
    used.begin()
  return found


def usable(found: measured.Measured) -> int:
  return int((found.lengths > 0).sum())


def test_a_new_run_measures_what_was_missing_again(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  said: list[str] = []
  first = of(data, tmp_path / "first")
  missing = len(first.errors)
  assert 0 < missing < COUNT
  restore(data, tmp_path)
  second = of(data, tmp_path / "second", said)
  assert (len(second.errors), usable(second)) == (0, COUNT)
  assert f"measured {missing} samples again that could not be used" in said[0]
  assert second.digest() == of(data, None).digest()  # as if all had been measured now
  said.clear()
  of(data, tmp_path / "third", said)
  assert not said  # and that was kept


def test_a_resumed_run_goes_on_with_the_samples_that_it_began_with(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  run = tmp_path / "run"
  begun = of(data, run)
  restore(data, tmp_path)
  assert usable(of(data, tmp_path / "other")) == COUNT  # which writes beside the data
  resumed = of(data, run, resumed=True)
  assert (resumed.digest(), resumed.errors) == (begun.digest(), begun.errors)
  again = of(data, run)  # nothing was trained: a start, not a resume
  assert usable(again) == COUNT
  assert of(data, run, resumed=True).digest() == again.digest()


def test_a_resumed_run_refuses_other_sizes(data: config_lib.DataConfig, tmp_path: Path) -> None:
  run = tmp_path / "run"
  restore(data, tmp_path)
  of(data, run)
  picture(data).unlink()
  for file in kept.beside(data.path).glob("lengths-*"):
    file.unlink()
  wanted = r"data: .* not measured as when this run began \(\d more cannot.*--allow-changed data"
  with pytest.raises(ConfigError, match=wanted):
    of(data, run, resumed=True)
  with pytest.raises(ConfigError, match=wanted):
    of(data, run, resumed=True)
  allowed = Usable(run, True, may_change=True)
  other = of(data, run, book=allowed)
  assert usable(other) < COUNT
  assert allowed.changed
  assert Usable(run, True).changed is False  # nothing is read yet
  with pytest.raises(ConfigError, match=wanted):
    of(data, run, resumed=True)  # that run was refused before it began
  allowed.begin()
  later = Usable(run, True)
  assert of(data, run, book=later).digest() == other.digest()
  assert later.changed, "also when it resumes without the option"


def test_pipelines_of_a_run_read_the_same_samples(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  """Also where a picture comes back between the two, or when sizes are read again."""
  book = Usable(tmp_path / "run")
  begun = of(data, tmp_path / "run", book=book)
  restore(data, tmp_path)
  assert usable(of(data, tmp_path / "other")) == COUNT
  said: list[str] = []
  assert of(data, tmp_path / "run", said, book=book).digest() == begun.digest()
  assert not said, "nothing is measured again"
  book.begin()
  assert of(data, tmp_path / "run", resumed=True).digest() == begun.digest()


def test_a_start_that_is_refused_leaves_the_notes_of_the_run(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  """As `--from-step 0` with a base that does not load; the plain command resumes as before."""
  run = tmp_path / "run"
  begun = of(data, run)
  restore(data, tmp_path)
  refused = Usable(run)
  assert usable(of(data, run, book=refused)) == COUNT
  assert of(data, run, resumed=True).digest() == begun.digest()


def test_a_run_of_a_former_version_keeps_its_samples(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  """It left no note, but sizes that it had kept."""
  begun = of(data, None)
  (run := tmp_path / "run").mkdir()
  found = of(data, tmp_path / "other")
  assert found.digest() == begun.digest()
  restore(data, tmp_path)
  said: list[str] = []
  assert of(data, run, said, resumed=True).digest() == begun.digest()
  assert ["a former version has begun this run" in line for line in said] == [True]
  assert list(run.glob("unusable-*.npz"))


def test_a_run_that_begins_anew_has_no_notes_of_before(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  """Of a later epoch, or of validation, say, which it has not measured yet."""
  run = tmp_path / "run"
  of(data, run)
  stale = run / "unusable-0123456789abcdef.npz"
  stale.write_bytes(b"")
  of(data, run, resumed=True)
  assert stale.exists()
  of(data, run)
  assert not stale.exists()
  assert len(list(run.glob("unusable-*"))) == 1


def test_a_refused_resume_keeps_no_sizes(data: config_lib.DataConfig, tmp_path: Path) -> None:
  """So restoring the pictures is enough."""
  run = tmp_path / "run"
  restore(data, tmp_path)
  begun = of(data, run)
  picture(data).rename(tmp_path / "away.png")
  for file in kept.beside(data.path).glob("lengths-*"):
    file.unlink()
  with pytest.raises(ConfigError, match="not measured as when this run began"):
    of(data, run, resumed=True)
  restore(data, tmp_path)
  assert of(data, run, resumed=True).digest() == begun.digest()


def test_a_note_that_the_disk_does_not_give_is_an_error(
  data: config_lib.DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  of(data, tmp_path / "run")
  real = storage.DISK.content

  def content(path: Path) -> bytes:
    if path.name.startswith("unusable-"):
      raise OSError(errno.EIO, "Input/output error", str(path))
    return real(path)

  monkeypatch.setattr(storage.DISK, "content", content)
  with pytest.raises(OSError, match="unusable-"):
    of(data, tmp_path / "run", resumed=True)


def test_a_resumed_run_measures_again_what_it_has_not_read_yet(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  """Another source, as allowed, of which an earlier run has kept sizes."""
  of(data, tmp_path / "earlier")
  restore(data, tmp_path)
  (run := tmp_path / "run").mkdir()
  (run / "unusable-0123456789abcdef.npz").write_bytes(b"of another source")
  assert usable(of(data, run, resumed=True)) == COUNT


def test_a_damaged_note_of_what_a_run_began_with_is_made_anew(
  data: config_lib.DataConfig, tmp_path: Path
) -> None:
  begun = of(data, tmp_path / "run")
  (path,) = (tmp_path / "run").glob("unusable-*.npz")
  whole = path.read_bytes()
  path.write_bytes(whole[:40])
  assert of(data, tmp_path / "run", resumed=True).digest() == begun.digest()
  assert path.read_bytes() == whole


def together(
  count: int, measure: Callable[[lengths.Hosts], measured.Measured]
) -> list[measured.Measured]:
  """Runs `measure` as each of several processes, which wait for each other in `gather`."""
  barrier, texts = threading.Barrier(count, timeout=60), [""] * count
  found: dict[int, measured.Measured] = {}

  def run(index: int) -> None:
    def gather(text: str, name: str) -> list[str]:
      texts[index] = text
      barrier.wait()
      every = list(texts)
      barrier.wait()
      return every

    found[index] = measure(lengths.Hosts(index, count, gather))

  threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [found[index] for index in range(count)]


@pytest.mark.parametrize("known", ["by all", "by one", "differently", "for other reasons"])
def test_hosts_agree(
  data: config_lib.DataConfig,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  known: str,
) -> None:
  """Each host has its own disk; they measure anew unless all know the same."""
  monkeypatch.setattr(lengths, "CHUNK", 4)
  monkeypatch.setattr(kept, "SMALL", 1 << 20)  # so that sizes are kept in the folder of each
  runs = [tmp_path / f"host-{index}" for index in range(3)]
  said: list[list[str]] = [[], [], []]
  for run in runs[: {"by one": 1}.get(known, 3)]:
    of(data, run)
  if known == "differently":
    (file,) = runs[1].glob("lengths-*.npz")
    other = measured.Measured.load(file)
    assert other
    other.lengths[1] -= 1
    other.save(file)
  elif known == "for other reasons":
    (file,) = runs[1].glob("lengths-*.npz")
    other = measured.Measured.load(file)
    assert other
    other.errors.update(dict.fromkeys(other.errors, "truncated"))
    other.save(file)
  found = together(3, lambda hosts: of(data, runs[hosts.index], said[hosts.index], hosts=hosts))
  whole = of(data, None)
  for one in found:
    assert (one.digest(), one.errors) == (whole.digest(), whole.errors)
  lines = [line for line in said[0] if "measured" in line]
  assert ("again" in lines[0]) == (known in ("by all", "for other reasons"))
  held = [measured.Measured.load(next(run.glob("lengths-*.npz"))) for run in runs]
  assert {one.digest() for one in held if one} == {whole.digest()}


def test_hosts_that_see_one_folder_write_once(
  data: config_lib.DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A bucket takes about one write of an object in a second."""
  written: list[str] = []
  real = kept.save

  def save(path: Path, values: Any) -> None:
    kind = path.name.partition("-")[0]
    written.extend([kind] if kind in ("lengths", "unusable") else [])
    real(path, values)

  monkeypatch.setattr(kept, "save", save)
  together(4, lambda hosts: of(data, tmp_path / "run", hosts=hosts))
  assert sorted(written) == ["lengths", "unusable"]
  restore(data, tmp_path)
  (one, *_) = together(4, lambda hosts: of(data, tmp_path / "other", hosts=hosts))
  assert usable(one) == COUNT
  assert sorted(written) == ["lengths"] * 2 + ["unusable"] * 2


def test_sizes_are_sent_and_joined_without_loss() -> None:
  rng = np.random.default_rng(0)
  whole = measured.Measured.empty(11)
  whole.fill(range(11), [(int(n), int(n) + 1, 1, "") for n in rng.integers(1, 99, 11)])
  whole.fill([4, 7], [(0, 0, 0, "gone"), (0, 0, 0, "broken")])
  shares = [np.array([0, 1, 2, 3, 8]), np.array([4, 5, 6, 7, 9, 10])]
  joined = measured.Measured.empty(11)
  joined.fill([4], [(0, 0, 0, "of before")])
  joined.join([whole.text(share) for share in shares], shares)
  assert (joined.digest(), json.dumps(joined.errors)) == (whole.digest(), json.dumps(whole.errors))
