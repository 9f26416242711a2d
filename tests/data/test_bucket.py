"""Data in a bucket: the same batches, to the bit, as from a disk; what is missing; what fails once."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import array_record, kept, pack, packed, pipeline, sources
from llava_sp_jax.data.decode import MissingImageError
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.quarantine import Quarantine
from tests.conftest import ConfigMaker
from tests.data.every_format import BROKEN, GONE, SILENT, WRITERS, rewritten, write_json
from tests.data.mixed import COUNT, assert_same, make
from tests.object_store import UNRELIABLE

STEPS = 7  # beyond an epoch
QUICK = ("packed", "webdataset")  # formats of the default suite: they are read by ranges


def put(here: Path, address: str) -> str:
  """Copies a file or folder to an address in the bucket, and returns the address."""
  there = storage.place(address)
  if here.is_file():
    storage.of(there).put(there, here.read_bytes())
  else:
    storage.of(there).upload(here, there)
  return address


def moved(data: config_lib.DataConfig, address: str) -> config_lib.DataConfig:
  """The settings for the same samples and pictures in the bucket."""
  name = Path(data.path).name
  return dataclasses.replace(
    data,
    path=put(Path(data.path), f"{address}/{name}"),
    image_folder=put(Path(data.image_folder), f"{address}/images"),
  )


@pytest.mark.parametrize(
  "kind",
  [pytest.param(kind, marks=[pytest.mark.guard] * (kind not in QUICK)) for kind in WRITERS],
)
def test_batches_are_those_from_a_disk(
  tiny_config: ConfigMaker,
  tmp_path: Path,
  bucket: str,
  kind: str,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """In every format; also where results are kept beside the data, which is in the bucket, too."""
  here = rewritten(write_json(tiny_config, tmp_path).data, kind, tmp_path / "other")
  there = moved(here, f"{bucket}/{tmp_path.name}")
  wanted_bad, bad = Quarantine(), Quarantine()
  wanted, found = make(here, quarantine=wanted_bad), make(there, quarantine=bad)
  for _ in range(STEPS):
    assert_same(next(found), next(wanted))
  assert [i in bad for i in range(COUNT + 3)] == [i in wanted_bad for i in range(COUNT + 3)]
  assert all(i in bad for i in (BROKEN, GONE, SILENT))
  again = make(there)
  again.seek(4)
  wanted.seek(4)
  assert_same(next(again), next(wanted))
  monkeypatch.setattr(kept, "SMALL", 3)
  make(there, folder=tmp_path / "run")
  names = {path.name.partition("-")[0] for path in kept.beside(storage.place(there.path)).iterdir()}
  assert "lengths" in names
  assert not (tmp_path / "run").exists()


def test_a_mixture_of_a_disk_and_a_bucket(
  tiny_config: ConfigMaker, tmp_path: Path, bucket: str
) -> None:
  here = write_json(tiny_config, tmp_path).data
  near = rewritten(here, "packed", tmp_path / "other")
  there = moved(near, f"{bucket}/{tmp_path.name}")
  made = []
  for number, second in enumerate((near, there)):
    parts = {"one": here, "two": second}
    file = tmp_path / f"mixture-{number}.json"
    values = {
      name: {"path": part.path, "image_folder": part.image_folder, "weight": 1}
      for name, part in parts.items()
    }
    file.write_text(json.dumps(values))
    made.append(make(dataclasses.replace(here, mixture=str(file), path="", image_folder="")))
  for _ in range(STEPS):
    assert_same(*map(next, made))


def test_a_picture_that_is_missing_costs_its_sample(tmp_path: Path, bucket: str) -> None:
  folder = storage.place(f"{bucket}/{tmp_path.name}")
  storage.of(folder).put(folder / "small.png", b"no picture")
  path = put_json(tmp_path, ["gone.png", "small.png"])
  source = sources.open_path(str(path), str(folder), lambda image: image)
  with pytest.raises(MissingImageError, match=rf"^image {folder}/gone.png: no such file$"):
    source.images(source[0])
  with pytest.raises(MissingImageError, match="no such file"):
    source.sizes(source[0])
  with pytest.raises(SampleError, match=rf"^image {folder}/small.png: cannot be decoded"):
    source.sizes(source[1])
  with pytest.raises(FileNotFoundError, match=r"^data.image_folder: no folder 'gs:"):
    sources.open_path(str(path), f"{bucket}/nothing", lambda image: image)


def put_json(folder: Path, images: list[str]) -> Path:
  path = folder / "x.json"
  turns = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
  path.write_text(json.dumps([{"image": name, "conversations": turns} for name in images]))
  return path


def test_what_is_missing_is_one_line(tiny_config: ConfigMaker, tmp_path: Path, bucket: str) -> None:
  with pytest.raises(FileNotFoundError, match=r"^data.path: no file 'gs://bucket/gone.json'"):
    sources.open_path(f"{bucket}/gone.json", "", lambda image: image)
  data = rewritten(write_json(tiny_config, tmp_path).data, "packed", tmp_path / "other")
  there = f"{bucket}/{tmp_path.name}/packed"
  put(Path(data.path), there)
  images = sorted(storage.place(there).glob("images-*"))
  images[1].unlink()
  with pytest.raises(ConfigError, match=r"images-00001.array_record is missing, expected [\d,]+ b"):
    sources.open_path(there, "", lambda image: image)


def test_records_are_read_by_ranges(tmp_path: Path) -> None:
  """Across borders of blocks, in their order and not; sizes from 0 to several blocks."""
  rng = np.random.default_rng(0)
  for kind in (packed.SAMPLES, packed.IMAGES):
    sizes = [0, 1, 5, 65000, 65536, 65600, 200_000, *rng.integers(0, 9000, 200).tolist()]
    wanted = [os.urandom(size) for size in sizes]
    shards = pack._Shards(tmp_path, kind, 1 << 30)
    for record in wanted:
      shards.write(record)
    shards.close()
    found = array_record.ArrayRecord(tmp_path / shards.done[0]["file"])
    assert len(found) == len(wanted)
    for number in (*range(len(wanted)), *rng.permutation(len(wanted)).tolist()):
      assert found[number] == wanted[number]
    begun = [found.begin(number) for number in range(len(wanted))]
    assert [wait() for wait in begun] == wanted


def test_only_what_is_read_in_order_is_read_ahead(tmp_path: Path) -> None:
  """Records in a shuffled order cost their own bytes, though some follow each other by chance."""
  shards = pack._Shards(tmp_path, packed.IMAGES, 1 << 30)
  for _ in range(200):
    shards.write(os.urandom(20_000))
  shards.close()
  counted = []
  for order in (range(200), np.random.default_rng(0).permutation(200).tolist()):
    found = array_record.ArrayRecord(tmp_path / shards.done[0]["file"])
    file, reads = found._file, list[int]()

    def begin_at(start: int, count: int, file: Any = file, reads: list[int] = reads) -> Any:
      reads.append(count)
      return file.begin_at(start, count)

    found._file = dataclasses.replace(file, begin_at=begin_at)
    for number in order:
      found[number]
    counted.append((len(reads), sum(reads)))
    reads.clear()
    for wait in [found.begin(number) for number in order]:  # in any order
      wait()
    assert len(reads) == 200
    assert sum(reads) < 1.1 * 200 * 20_100
  (in_order, ordered_bytes), (shuffled, shuffled_bytes) = counted
  assert in_order < 20
  assert shuffled == 200
  assert ordered_bytes < 2 * 200 * 20_000
  assert shuffled_bytes < 1.1 * 200 * 20_100


@pytest.mark.parametrize("damage", ["short", "not one", "in the list", "in a record"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
  shards = pack._Shards(tmp_path, packed.IMAGES, 1 << 30)
  for _ in range(9):
    shards.write(bytes(70_000))
  shards.close()
  path = tmp_path / shards.done[0]["file"]
  content = bytearray(path.read_bytes())
  if damage == "short":
    content = content[:-70_000]
  elif damage == "not one":
    content = bytearray(200_000)
  elif damage == "in a record":
    content[64 + 24] = 0  # the type of the first chunk
  else:
    content[-65536 + 24 + 40 + 3] ^= 1
  path.write_bytes(content)
  named = r"images-00000\.array_record: "
  with pytest.raises(array_record.ArrayRecordError, match=named) as e:
    array_record.ArrayRecord(path)[0]
  with pytest.raises(array_record.ArrayRecordError, match=named):
    array_record.ArrayRecord(path).begin(0)()
  assert ("record 0 is damaged" in str(e.value)) == (damage == "in a record")


@pytest.mark.guard
def test_reads_that_fail_once_are_repeated(
  tiny_config: ConfigMaker, tmp_path: Path, bucket: str
) -> None:
  """The first read of each range fails; no sample is lost."""
  here = rewritten(write_json(tiny_config, tmp_path).data, "packed", tmp_path / "other")
  there = moved(here, f"{bucket}/{UNRELIABLE}/{tmp_path.name}")
  wanted, found = make(here), make(there)
  for _ in range(2):
    assert_same(next(found), next(wanted))


def test_few_samples_are_copied_and_many_read_by_ranges(
  tiny_config: ConfigMaker, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  here = rewritten(write_json(tiny_config, tmp_path).data, "packed", tmp_path / "other")
  there = moved(here, f"{bucket}/{tmp_path.name}")
  index = json.loads((Path(here.path) / packed.INDEX).read_text())
  size = sum(shard["bytes"] for shard in index[packed.SAMPLES])
  ranged: list[Path] = []

  class Seen(array_record.ArrayRecord):
    def __init__(self, path: Path):
      super().__init__(path)
      ranged.append(path)

  monkeypatch.setattr(packed, "ArrayRecord", Seen)
  for copied, kinds in ((size, {"images"}), (size - 1, {"samples", "images"})):
    ranged.clear()
    monkeypatch.setattr(packed, "COPIED", copied)
    wanted, found = make(here), make(there)
    for _ in range(STEPS):
      assert_same(next(found), next(wanted))
    assert {path.name.partition("-")[0] for path in ranged} == kinds


def test_a_copy_that_fails_is_an_error_at_the_start(
  tiny_config: ConfigMaker, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """And no part of it stays on the disk."""
  here = rewritten(write_json(tiny_config, tmp_path).data, "packed", tmp_path / "other")
  there = moved(here, f"{bucket}/{tmp_path.name}")
  parts: list[Path] = []

  def full(names: list[str], to: list[str]) -> None:
    parts.extend(map(Path, to))
    parts[0].write_bytes(b"a part")
    raise OSError(errno.ENOSPC, "No space left on device", to[0])

  store: Any = storage.of(storage.place(there.path))
  monkeypatch.setattr(store._files, "get", full)
  with pytest.raises(OSError, match=r"No space left on device.*samples-00000"):
    sources.open_path(there.path, "", lambda image: image)
  assert parts
  assert not parts[0].parent.exists()


def test_rows_ahead_are_loaded_by_many_threads(
  tiny_config: ConfigMaker, tmp_path: Path, bucket: str
) -> None:
  """Of data in a bucket only."""
  here = write_json(tiny_config, tmp_path).data
  batches: Any = make(here)
  assert batches._far is None
  there = moved(here, f"{bucket}/{tmp_path.name}")
  for threads, readers in ((1, pipeline.READERS), (99, pipeline.MOST_READERS)):
    assert make(dataclasses.replace(there, threads=threads))._far.threads == readers
