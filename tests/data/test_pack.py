"""`llava-sp data pack`: what it writes, what it leaves when it is stopped, and what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_sp_jax import cli
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import decode, pack, packed, sources
from llava_sp_jax.data.failure import SampleError
from tests.conftest import ConfigMaker
from tests.data.every_format import BROKEN, GONE, SILENT, write_json
from tests.data.mixed import COUNT


@pytest.fixture
def folder(tiny_config: ConfigMaker, tmp_path: Path) -> Path:
  """With train.json and its pictures."""
  write_json(tiny_config, tmp_path)
  return tmp_path


def opened(path: Path) -> sources.Source:
  return sources.open_path(str(path), str(path.parent), lambda image: image)


def test_the_command_packs_and_says_what_it_left_out(
  folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  out = folder / "out"
  assert cli.main(["data", "pack", str(folder / "train.json"), str(out)]) == 0
  said = capsys.readouterr().out
  # broken.png has a header that can be read, and is stored as it is
  assert f"{COUNT + 3} samples, 5 images" in said
  assert f"2 samples cannot be used ({out / 'quarantine.jsonl'})" in said
  lines = (out / "quarantine.jsonl").read_text().splitlines()
  assert [json.loads(line)["index"] for line in lines] == [GONE, SILENT]
  names = {"index.json", "quarantine.jsonl"}
  shards = {"samples-00000.array_record", "images-00000.array_record"}
  assert {path.name for path in out.iterdir()} == names | shards
  found = opened(out)
  stored = found.pictures(found[BROKEN])[0].data()
  assert stored == (folder / "broken.png").read_bytes()


def test_an_image_that_was_missing_is_still_missing(folder: Path) -> None:
  """`llava-sp check` counts it in the same table."""
  pack.write(opened(folder / "train.json"), folder / "out", "train.json")
  (folder / "gone.png").write_bytes((folder / "1.png").read_bytes())  # too late
  found = opened(folder / "out")
  with pytest.raises(decode.MissingImageError, match=r"gone\.png: no such file"):
    found.sizes(found[GONE])


def test_measuring_opens_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  source = opened(folder / "train.json")
  wanted = [source.sizes(source[i]) for i in range(COUNT)]
  pack.write(source, folder / "out", "train.json")
  for name in ("read_size", "picture", "read_bytes"):
    monkeypatch.setattr(decode, name, lambda *_: pytest.fail("opened"))
  found = opened(folder / "out")
  shutil.move(folder / "out" / "images-00000.array_record", folder / "elsewhere")
  assert [found.sizes(found[i]) for i in range(COUNT)] == wanted


def test_a_packed_folder_packs_again_to_the_same(folder: Path) -> None:
  pack.write(opened(folder / "train.json"), folder / "a", "train.json")
  pack.write(opened(folder / "a"), folder / "b", "train.json", shard_bytes=3000)
  a, b = opened(folder / "a"), opened(folder / "b")
  assert len(list((folder / "b").glob("images-*.array_record"))) > 1
  assert (a.fingerprint(), a.former_fingerprint()) == (b.fingerprint(), b.former_fingerprint())
  for i in range(len(a)):
    assert a[i] == b[i] if isinstance(a[i], dict) else str(a[i]) == str(b[i])
  for i in range(COUNT):
    assert [p.data() for p in a.pictures(a[i])] == [p.data() for p in b.pictures(b[i])]


def test_a_line_that_is_no_json_keeps_its_place_and_its_reason(folder: Path) -> None:
  samples = json.loads((folder / "train.json").read_text())
  lines = [json.dumps(samples[0]), '{"id": ', json.dumps(samples[1]), "[1, 2]"]
  (folder / "x.jsonl").write_text("\n".join(lines))
  source = opened(folder / "x.jsonl")
  made = pack.write(source, folder / "out", "x.jsonl")
  assert (made.samples, made.bad) == (4, 2)
  found = opened(folder / "out")
  assert isinstance(found[1], SampleError)
  assert str(found[1]) == str(source[1])
  assert found.fingerprint() == source.fingerprint()
  assert found[3] == [1, 2]


def test_a_pack_that_is_stopped_leaves_nothing_that_reads_as_whole(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As by ctrl-C; and as by a kill, behind which the unfinished folder stays and is begun anew."""

  def stop(counts: pack.Counts) -> None:
    if counts.samples == 9:
      raise KeyboardInterrupt

  source, out = opened(folder / "train.json"), folder / "out"
  with pytest.raises(KeyboardInterrupt):
    pack.write(source, out, "train.json", shard_bytes=1000, progress=stop)
  assert not out.exists()
  with monkeypatch.context() as patch:
    patch.setattr("llava_sp_jax.folders._empty", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
      pack.write(source, out, "train.json", shard_bytes=1000, progress=stop)
  part = folder / "out.part"
  assert list(part.glob("images-*.array_record"))
  with pytest.raises(ConfigError, match=r"no index.json, so llava-sp data pack was interrupted"):
    opened(part)
  pack.write(source, out, "train.json")
  assert not part.exists()
  assert len(opened(out)) == COUNT + 3


def _cut(out: Path) -> None:
  shard = out / "images-00000.array_record"
  shard.write_bytes(shard.read_bytes()[:-1])


def _change(text: str, to: str) -> Callable[[Path], object]:
  def change(out: Path) -> None:
    index = out / "index.json"
    index.write_text(index.read_text().replace(text, to))

  return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
  "a shard is cut": (_cut, r"images-00000.array_record has [\d,]+ bytes, expected "),
  "a shard is gone": (lambda out: (out / "samples-00000.array_record").unlink(), "is missing"),
  "a later version": (_change('"version": 1', '"version": 9'), "version '9'; expected|version 9; "),
  "a torn index": (_change('"records"', '"recs"'), r"index.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, kind: str) -> None:
  pack.write(opened(folder / "train.json"), folder / "out", "train.json")
  damage, message = DAMAGE[kind]
  damage(folder / "out")
  with pytest.raises(ConfigError, match=rf"^data.path: .*out.*({message})"):
    opened(folder / "out")


def test_a_record_that_is_damaged_costs_its_sample(folder: Path) -> None:
  pack.write(opened(folder / "train.json"), folder / "out", "train.json")
  shard = folder / "out" / "images-00000.array_record"
  content = bytearray(shard.read_bytes())
  picture = (folder / "1.png").read_bytes()
  content[content.index(picture) + 30] ^= 1
  shard.write_bytes(content)
  found = opened(folder / "out")
  bad = [i for i in range(COUNT) if any("1.png" in p.name for p in found.pictures(found[i]))]
  for i in bad:
    with pytest.raises(SampleError, match=r"1\.png.*(checksum|hash|corrupt|invalid)|orrupt"):
      found.images(found[i])
  assert len(found.images(found[2])) == 1


def test_wrong_arguments_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
  out = folder / "out"
  for more, message in (
    (["--shard-mb", "0"], "--shard-mb: expected a whole number from 1"),
    (["--source", "csv"], "unknown 'csv'; known: arrow"),
    (["--image-folder", str(folder / "no")], "no folder"),
  ):
    assert cli.main(["data", "pack", str(folder / "train.json"), str(out), *more]) == 1
    assert message in capsys.readouterr().err
  out.mkdir()
  (out / "mine").write_text("")
  assert cli.main(["data", "pack", str(folder / "train.json"), str(out)]) == 1
  assert "exists and holds mine; name a new folder" in capsys.readouterr().err
  (folder / "none.json").write_text('[{"id": 1}, {"id": 2}]')
  assert cli.main(["data", "pack", str(folder / "none.json"), str(folder / "new")]) == 1
  assert "none of the first 2 samples can be used" in capsys.readouterr().err
  assert not (folder / "new").exists()


def test_a_disk_that_is_full_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(pack._Shards, "_opened", lambda self: _Full())
  with pytest.raises(pack.PackError, match=r"cannot be written \(No space left on device\)"):
    pack.write(opened(folder / "train.json"), folder / "out", "train.json")
  assert not (folder / "out").exists()
  assert packed.fits(folder / "out") is False


class _Full:
  def write(self, record: bytes) -> None:
    raise RuntimeError("No space left on device")
