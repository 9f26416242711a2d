"""Output folders: nothing that a command did not make is removed; a killed command runs again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sp_jax import folders, locks
from tests.conftest import REPOSITORY

WAYS = (folders.new, folders.renamed)


def contents(folder: Path) -> dict[str, str]:
  return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_a_folder_that_is_free_is_written(tmp_path: Path, way: type, there: str) -> None:
  out = tmp_path / "a" / "out"
  if there != "nothing":
    out.mkdir(parents=True)
  with way(out, "convert") as place:
    (place / "x").write_text("1")
  assert contents(tmp_path) == {"a/out/x": "1"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("held", ["config.json", ".hidden", "deep/er"])
def test_what_another_made_stays(tmp_path: Path, way: type, held: str) -> None:
  out = tmp_path / "out"
  (out / held).parent.mkdir(parents=True)
  (out / held).write_text("theirs")
  with (
    pytest.raises(folders.FolderError, match=f"out: exists and holds {held.split('/')[0]}; name"),
    way(out, "convert"),
  ):
    pytest.fail("it may not be written")
  assert contents(tmp_path) == {f"out/{held}": "theirs"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_broken_link_is_no_folder(tmp_path: Path, way: type, link: bool) -> None:
  out = tmp_path / "out"
  if link:
    out.symlink_to(tmp_path / "gone")
  else:
    out.write_text("theirs")
  with pytest.raises(folders.FolderError, match="exists and is no folder"), way(out, "convert"):
    pytest.fail("it may not be written")
  assert os.path.lexists(out)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_the_unfinished_name_is_not_removed(tmp_path: Path) -> None:
  part = tmp_path / f"out{folders.PART}"
  part.mkdir()
  (part / "mine").write_text("keep")
  with (
    pytest.raises(folders.FolderError, match=r"out\.part: exists and holds mine"),
    folders.renamed(tmp_path / "out", "export"),
  ):
    pytest.fail("it may not be written")
  assert (part / "mine").read_text() == "keep"


# Writes argv[2] as argv[1] says and is killed in the middle.
KILLED = """
import os, signal, sys
from pathlib import Path
from llava_sp_jax import folders
with getattr(folders, sys.argv[1])(Path(sys.argv[2]), sys.argv[3]) as place:
  (place / "x").mkdir()
  (place / "x" / "old").write_text("half")
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["new", "renamed"])
def test_a_killed_command_runs_again_and_another_is_refused(tmp_path: Path, way: str) -> None:
  out = tmp_path / "out"
  code = [sys.executable, "-c", KILLED, way, str(out), "convert"]
  assert subprocess.run(code, cwd=REPOSITORY, check=False).returncode == -9
  left = contents(tmp_path)
  assert any(name.endswith("x/old") for name in left)
  again = folders.new if way == "new" else folders.renamed
  with (
    pytest.raises(folders.FolderError, match="left unfinished by `llava-sp convert`"),
    again(out, "merge"),
  ):
    pytest.fail("it may not be written")
  assert contents(tmp_path) == left
  makes = {"makes": ("x",)} if way == "new" else {}
  with again(out, "convert", **makes) as place:  # type: ignore[operator]
    (place / "y").write_text("whole")
  assert contents(tmp_path) == {"out/y": "whole"}


@pytest.mark.parametrize("way", WAYS)
def test_two_at_once_are_refused(tmp_path: Path, way: type) -> None:
  out = tmp_path / "out"
  with way(out, "convert") as place:
    (place / "x").write_text("1")
    with (
      pytest.raises(locks.LockError, match=f"in use by llava-sp convert .process {os.getpid()} on"),
      way(out, "convert"),
    ):
      pytest.fail("it may not be written")
  assert contents(tmp_path) == {"out/x": "1"}


def write_and_fail(way: type, out: Path) -> None:
  with way(out, "convert") as place:
    (place / "x").write_text("1")
    raise OSError("disk full")


def test_after_an_error_the_same_command_goes_on(tmp_path: Path) -> None:
  out = tmp_path / "out"
  for way in reversed(WAYS):
    with pytest.raises(OSError, match="full"):
      write_and_fail(way, out)
  with folders.new(out, "convert", makes=("x",)) as place:
    assert contents(place).keys() == {folders.MARK, locks.FILE}
    (place / "y").write_text("2")
  assert contents(tmp_path) == {"out/y": "2"}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_before_anything_is_written_leaves_nothing(tmp_path: Path, way: type) -> None:
  with pytest.raises(ZeroDivisionError), way(tmp_path / "a/out", "convert"):
    raise ZeroDivisionError
  assert not list(tmp_path.iterdir())


def test_a_mark_that_was_torn_is_an_empty_folder(tmp_path: Path) -> None:
  (tmp_path / folders.MARK).write_text('{"comm')
  with folders.new(tmp_path, "merge"):
    pass
  assert contents(tmp_path) == {}


def test_names_aside_are_free_ones(tmp_path: Path) -> None:
  for content in "abc":
    (tmp_path / "9").write_text(content)
    folders.rename_aside(tmp_path / "9", tmp_path / "aside")
  assert contents(tmp_path) == {"aside/9": "a", "aside/9-2": "b", "aside/9-3": "c"}


def test_a_bucket_is_refused_where_only_a_disk_will_do() -> None:
  assert folders.local("runs/x") == Path("runs/x")
  with pytest.raises(folders.FolderError, match="gs://b/x: this can be written to a local folder"):
    folders.local("gs://b/x")
