"""Every format gives the same batches, the same quarantine and the same fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import kept, lengths, measured, pipeline, sample_file, sources
from llava_sp_jax.data.anyres import Reader
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.data.usable import Usable
from tests.conftest import ConfigMaker
from tests.data.every_format import BROKEN, GONE, SILENT, WRITERS, rewritten, table, write_json
from tests.data.mixed import COUNT, TILE, assert_same, make

STEPS = 7  # beyond an epoch


def opened(data: config_lib.DataConfig) -> sources.Source:
  return sources.of(data, Reader(data, TILE))


def run(data: config_lib.DataConfig, folder: Path) -> tuple[list[dict[str, Any]], Quarantine]:
  quarantine = Quarantine(folder / "quarantine.jsonl")
  batches = make(data, quarantine=quarantine)
  return [next(batches) for _ in range(STEPS)], quarantine


def test_every_format_is_tried() -> None:
  assert {*WRITERS, "tfds"} == set(sources.SOURCES)


@pytest.mark.parametrize("kind", WRITERS)
def test_batches_quarantine_and_resume_are_those_of_the_json_list(
  tiny_config: ConfigMaker, tmp_path: Path, kind: str
) -> None:
  data = write_json(tiny_config, tmp_path).data
  same = rewritten(data, kind, tmp_path / "other")
  source, other = opened(data), opened(same)
  assert len(other) == len(source) == COUNT + 3
  assert other.fingerprint() == source.fingerprint()
  wanted, bad = run(data, tmp_path / "a")
  found, also_bad = run(same, tmp_path / "b")
  for batch, again in zip(wanted, found, strict=True):
    assert_same(batch, again)
    np.testing.assert_array_equal(*(pipeline.marks(b[pipeline.SAMPLES]) for b in (batch, again)))
  for index in range(COUNT + 3):
    assert (index in bad) == (index in also_bad) == (index in (BROKEN, GONE, SILENT))
  later = make(same)
  later.seek(4)
  assert_same(next(later), wanted[4])
  if kind != "llava_json":  # the bytes of the files, not pictures that were encoded again
    for i in range(COUNT):
      ours, theirs = (s.pictures(s[i]) for s in (source, other))
      assert [picture.data() for picture in ours] == [picture.data() for picture in theirs]


def _sizes(source: sources.Source, out: Any) -> None:
  out.put([source.sizes(source[i]) for i in range(COUNT)])


@pytest.mark.guard
@pytest.mark.parametrize("kind", WRITERS)
def test_a_source_can_be_sent_to_another_process(
  tiny_config: ConfigMaker, tmp_path: Path, kind: str
) -> None:
  source = opened(rewritten(write_json(tiny_config, tmp_path).data, kind, tmp_path / "other"))
  wanted = [source.sizes(source[i]) for i in range(COUNT)]
  context = multiprocessing.get_context("spawn")
  out = context.Queue()
  process = context.Process(target=_sizes, args=(source, out))
  process.start()
  assert out.get(timeout=100) == wanted
  process.join()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_fingerprint_tells_samples_apart(
  tiny_config: ConfigMaker, tmp_path: Path, kind: str
) -> None:
  data = write_json(tiny_config, tmp_path).data
  path = Path(data.path)
  samples = json.loads(path.read_text())
  found = {opened(rewritten(data, kind, tmp_path / "0")).fingerprint()}
  samples[3], samples[4] = samples[4], samples[3]
  path.write_text(json.dumps(samples))
  found.add(opened(rewritten(data, kind, tmp_path / "1")).fingerprint())
  samples[3]["conversations"][1]["value"] += "!"
  path.write_text(json.dumps(samples))
  found.add(opened(rewritten(data, kind, tmp_path / "2")).fingerprint())
  assert len(found) == 3


# Formats of one file, one folder of tars, ..: what is wrong with a copy -> what the error says.
def _other_columns(folder: Path) -> Path:
  pyarrow.parquet.write_table(pa.table({"text": ["a"], "image": ["b"]}), folder / "x.parquet")
  return folder / "x.parquet"


def _plain_bytes(folder: Path) -> Path:
  rows = {"conversations": [[{"from": "human", "value": "a"}]], "image": [b"jpg"]}
  pyarrow.parquet.write_table(pa.table(rows), folder / "x.parquet")
  return folder / "x.parquet"


def _two_schemas(folder: Path) -> Path:
  rows = table([], folder)
  pyarrow.parquet.write_table(rows, folder / "a.parquet")
  pyarrow.parquet.write_table(rows.drop_columns(["id"]), folder / "b.parquet")
  return folder


def _no_rows(folder: Path) -> Path:
  pyarrow.parquet.write_table(table([], folder), folder / "x.parquet")
  return folder


def _no_table(folder: Path) -> Path:
  (folder / "x.parquet").write_text("no table")
  return folder


def _shuffled(folder: Path) -> Path:
  state = {"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}
  (folder / "state.json").write_text(json.dumps(state))
  return folder


def _no_files(folder: Path) -> Path:
  (folder / "state.json").write_text("{}")
  return folder


def _tar_cut_at(folder: Path, more: int) -> Path:
  """A tar of one member without what follows byte `more` behind it."""
  (folder / "x.txt").write_bytes(bytes(5000))
  with tarfile.open(folder / "x.tar", "w") as tar:
    tar.add(folder / "x.txt", "a.json")
    end = tar.offset
  (folder / "x.tar").write_bytes((folder / "x.tar").read_bytes()[: end + more])
  return folder


def _torn_tar(folder: Path) -> Path:
  return _tar_cut_at(folder, -1000)


def _tar_without_an_end(folder: Path) -> Path:
  return _tar_cut_at(folder, 0)


def _empty_tar(folder: Path) -> Path:
  tarfile.open(folder / "x.tar", "w").close()
  return folder / "x.tar"


WRONG = {
  _other_columns: r"x.parquet has columns text, image; expected conversations or messages",
  _plain_bytes: r"column image is binary; expected names of files",
  _two_schemas: r"b.parquet has columns images, conversations, but a.parquet id, images, conv",
  _no_rows: r"holds no rows",
  _no_table: r"cannot be read \(",
  _shuffled: r"flatten_indices",
  _no_files: r"state.json names no data files",
  _torn_tar: r"x.tar: cannot be read as a tar \(unexpected end of data\)",
  _tar_without_an_end: r"x.tar: cannot be read as a tar \(no end mark\)",
  _empty_tar: r"holds no samples; expected members KEY.json",
  lambda folder: folder: r"a folder without samples; expected one of: a folder of llava-sp data",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_data_that_cannot_be_opened_are_one_line(wrong: Any, tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match=WRONG[wrong]) as raised:
    sources.open_path(str(wrong(tmp_path)), "", lambda image: image)
  assert "\n" not in str(raised.value)
  assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("path", ["x" * 5000, "x\0y", "gone.json", "gone/"])
def test_a_path_that_is_not_there_is_one_line(path: str) -> None:
  with pytest.raises(FileNotFoundError, match=r"^data\.path: no file .*; expected a JSON list"):
    sources.open_path(path, "", lambda image: image)


def test_members_of_a_tar_that_are_no_sample_cost_theirs(tmp_path: Path) -> None:
  names = ("a.json", "a.png", "b.png", "c.json", "c.mp4", "d.json", "e.json", "e.txt", "d.json")
  texts = {"d.json": b"{", "e.json": b'{"id": 5}'}
  with tarfile.open(tmp_path / "x.tar", "w") as tar:
    for name in names:
      (tmp_path / "part").write_bytes(texts.get(name, b'{"id": 1}'))
      tar.add(tmp_path / "part", name)
  found = sources.open_path(str(tmp_path / "x.tar"), "", lambda image: image)
  a, b, c, d, e, again = (found[i] for i in range(len(found)))
  assert a == {"id": 1, "images": ["a.png"]}
  assert e == {"id": 5}
  assert all(isinstance(bad, SampleError) for bad in (b, c, d, again))
  assert str(b) == "x.tar: b has 0 members .json, expected one"
  assert str(c) == "x.tar: c.mp4 is not read; expected .json and pictures"
  assert str(d).startswith("x.tar, d.json is not JSON")


@pytest.mark.parametrize("kind", ["llava_json", "parquet", "webdataset"])
def test_what_a_pass_finds_is_kept_beside_data_that_are_not_small(
  tiny_config: ConfigMaker, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A second start reads no sample to find them, and measures none."""
  data = rewritten(write_json(tiny_config, tmp_path).data, kind, tmp_path / "other")
  make(data, folder=tmp_path / "a")
  assert not kept.beside(data.path).exists()
  assert len(list((tmp_path / "a").glob("lengths-*.npz"))) == 1
  monkeypatch.setattr(kept, "SMALL", 3)
  sample_file._read.cache_clear()
  fingerprint = opened(data).fingerprint()
  wanted = next(make(data, folder=tmp_path / "b"))
  assert not (tmp_path / "b").exists()
  names = {path.name.partition("-")[0] for path in kept.beside(data.path).iterdir()}
  assert "lengths" in names
  assert names & {"samples", "content"}
  sample_file._read.cache_clear()
  monkeypatch.setattr(lengths.Lengths, "_measure", lambda *_: pytest.fail("measured again"))
  monkeypatch.setattr("llava_sp_jax.data.content.written", lambda _: pytest.fail("read again"))
  assert opened(data).fingerprint() == fingerprint
  used = Usable(tmp_path / "b", resumed=True)
  assert_same(next(make(data, folder=tmp_path / "b", usable=used)), wanted)


def test_a_folder_that_cannot_be_written_keeps_sizes_in_the_run(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  data = write_json(tiny_config, tmp_path).data
  monkeypatch.setattr(kept, "SMALL", 3)
  kept.beside(data.path).write_text("in its way")
  make(data, folder=tmp_path / "run")
  assert len(list((tmp_path / "run").glob("lengths-*.npz"))) == 1


def test_hosts_measure_shares(tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: Any) -> None:
  data = write_json(tiny_config, tmp_path).data
  monkeypatch.setattr(lengths, "CHUNK", 4)
  tokenizer = Tokenizer(data.tokenizer)
  whole = lengths.Lengths(opened(data), tokenizer, data, TILE, 0, Quarantine()).measured(0)
  shares: list[str] = []
  looked: list[set[str]] = []

  class OthersWaitError(Exception):
    """The other processes have not measured yet."""

  def of(index: int) -> measured.Measured | None:
    source, seen = opened(data), set[str]()
    looked.append(seen)
    real = source.sizes
    monkeypatch.setattr(source, "sizes", lambda s: seen.add(s["id"]) or real(s))

    def gather(text: str, name: str) -> list[str]:
      if name == "lengths are known":
        return [text] * 3
      if name == "lengths are kept":
        return [""] * 3
      shares.append(text)
      if len(shares) < 3:
        raise OthersWaitError
      return shares

    hosts = lengths.Hosts(index, 3, gather)
    args = (source, tokenizer, data, TILE, 0, Quarantine())
    with contextlib.suppress(OthersWaitError):
      return lengths.Lengths(*args, hosts=hosts).measured(0)
    return None

  assert [of(0), of(1)] == [None, None]
  found = of(2)
  assert found is not None
  assert looked[0] == {"0", "1", "2", "3", "12", "13", "14", "15"}
  assert looked[1] == {"4", "5", "6", "7", "broken", "gone"}
  assert found.errors == whole.errors
  for name in measured.SIZES:
    np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_a_file_that_changes_while_it_is_read_ends_the_run(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  data = dataclasses.replace(write_json(tiny_config, tmp_path).data, packing="none")
  batches = make(data)
  text = Path(data.path).read_text()
  Path(data.path).write_text(" " + text)
  with pytest.raises(RuntimeError, match="has changed since its samples were found; start again"):
    next(batches)
