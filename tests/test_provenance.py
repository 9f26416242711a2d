"""A figure belongs to its commit: stamps, hashes of sources, and the list of results."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import provenance
from tests.conftest import REPOSITORY

SOURCE = '''"""What it is."""

import os  # for later


def f(x):
  """Returns twice `x`.

  At length.
  """
  return 2 * x  # not 3
'''


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("What it is.", "Something else."), ("# for later", ""), ("At length.", "At\n\n  length."),
    ("# not 3", "# but 2"), ("\n\n\ndef", "\n\ndef"),
  ],
)  # fmt: skip
def test_comments_and_docstrings_do_not_count(old: str, new: str) -> None:
  assert old in SOURCE
  assert provenance.bare(SOURCE.replace(old, new)) == provenance.bare(SOURCE)


@pytest.mark.parametrize(
  ("old", "new"), [("2 * x", "3 * x"), ("import os", "import re"), ("f(x)", "f(x, y=1)")]
)
def test_what_is_computed_counts(old: str, new: str) -> None:
  assert provenance.bare(SOURCE.replace(old, new)) != provenance.bare(SOURCE)
  kept = provenance.bare('x = \'a # b\'\ny = """not a docstring"""\n')
  assert "a # b" in kept
  assert "not a docstring" in kept


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ('def f(): "doc"', 'def g(): "doc"'),
    ('def f():\n  "doc"; x = g()', 'def f():\n  "doc"; x = h()'),
    ('x = \'\'\'a\n\nb\'\'\'', 'x = \'\'\'a\nb\'\'\''),
    ('x = \'\'\'a \nb\'\'\'', 'x = \'\'\'a\nb\'\'\''),
  ],
)  # fmt: skip
def test_code_beside_docstrings_and_blanks_in_literals_count(old: str, new: str) -> None:
  assert provenance.bare(old) != provenance.bare(new)


def test_one_thread_at_a_time_reads_syntax(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  """Two that do it at once can end with CPython 3.11's `AST constructor recursion depth mismatch`."""
  inside = []

  def bare(source: str) -> str:
    inside.append(provenance.PARSING.locked())
    return source

  monkeypatch.setattr(provenance, "bare", bare)
  (tmp_path / "a.py").write_text("x = 1\n")
  provenance.fingerprint(tmp_path / "a.py")
  assert inside == [True]


def test_older_figures_keep_their_stamp_beside_new_ones(here: Path) -> None:
  out = here / "docs/results/speed"
  provenance.write(out, [1])
  first = json.loads(out.with_suffix(".json").read_text())["record"]
  (here / "code/a.py").write_text(SOURCE.replace("2 * x", "3 * x"))
  assert provenance.read(out, None) == [1]
  assert provenance.read(out, None, current=True) is None
  provenance.write(out, [1, 2], beside=True)
  held = json.loads(out.with_suffix(".json").read_text())
  assert held == {"record": first, "figures": [1, 2]}
  provenance.write(out, [2])
  assert provenance.read(out, None, current=True) == [2]
  out.with_suffix(".json").write_text("[3]")
  assert provenance.read(out, None) == [3], "as it was written before there were stamps"
  assert provenance.named(here / "7b-0.5", "json").name == "7b-0.5.json"


def git(folder: Path, *arguments: str) -> None:
  named = ["-c", "user.name=x", "-c", "user.email=x@y"]
  subprocess.run(["git", *named, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
  """A repository with one source, one result and its table."""
  (tmp_path / "docs/results").mkdir(parents=True)
  (tmp_path / "code").mkdir()
  (tmp_path / "code/a.py").write_text(SOURCE)
  (tmp_path / provenance.TABLE).write_text(
    '[groups]\nall = ["code"]\n[speed]\ncommand = "python speed.py"\nminutes = 1\n'
    'sources = ["group:all"]\n'
  )
  git(tmp_path, "init", "-q")
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "-qm", "x")
  return tmp_path


def test_a_result_carries_its_stamp(clone: Path) -> None:
  out = clone / "docs/results/speed"
  provenance.write(out, {"x": 1.5}, root=clone)
  held = json.loads(out.with_suffix(".json").read_text())
  stamp = held["record"]
  assert provenance.read(out, None) == held["figures"] == {"x": 1.5}
  assert list(stamp["files"]) == ["code/a.py"]
  assert stamp["sources"] == provenance.digest(stamp["files"])
  assert len(stamp["commit"]) == 10, "results themselves do not make a tree another"
  assert {"python", "jax", "jaxlib", "flax"} <= set(stamp["versions"])
  assert stamp["command"]
  assert stamp["machine"]
  assert stamp["when"].endswith("UTC")
  (clone / "code/a.py").write_text(SOURCE.replace("2 * x", "3 * x"))
  assert provenance.commit(clone).endswith("+")
  assert provenance.fingerprints(["code"], clone) != stamp["files"]
  assert provenance.read(clone / "nothing", 3) == 3


def test_what_changed_while_figures_were_made_is_not_their_source(
  clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  source = clone / "code/a.py"
  monkeypatch.setattr(provenance, "AT_START", {source: provenance.written(source)})
  before = provenance.stamp(["code"], root=clone)
  os.utime(source, ns=(0, provenance.written(source) + 1))
  after = provenance.stamp(["code"], root=clone)
  assert before["files"] == provenance.fingerprints(["code"], clone)
  assert after["files"] == {"code/a.py": "changed while it ran"}
  assert after["sources"] != before["sources"]


def test_every_source_is_watched() -> None:
  watched = {
    path for row in provenance.table().values() for path in provenance.files(row["sources"])
  }
  assert watched == set(provenance.AT_START)


def test_a_source_that_is_not_there_is_an_error(clone: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"code/b\.py: a source of a result"):
    provenance.files(["code/b.py"], clone)


@pytest.fixture
def here(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The clone in place of this repository."""
  monkeypatch.setattr(provenance, "REPOSITORY", clone)
  for name in ("table", "fingerprints", "stamp", "write", "read", "commit", "sources_of"):
    function = getattr(provenance, name)
    root = (*(function.__defaults__ or ())[:-1], clone)
    monkeypatch.setattr(function, "__defaults__", root)
  return clone


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
  monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
  import results

  return results


def test_the_list_tells_what_is_older(
  results: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  provenance.write(here / "docs/results/speed", {"x": 1.5})
  monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
  assert results.main() == 0
  assert "speed: current" in capsys.readouterr().out
  (here / "code/b.py").write_text("x = 1\n")
  assert results.main() == 1
  said = capsys.readouterr().out
  assert "speed: older than its sources" in said
  assert "changed since: code/b.py" in said
  assert "python speed.py    (1 min)" in said


def test_a_canary_confirms_sources_that_were_rewritten(
  results: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (here / "canary.py").write_text("import runpy; print(runpy.run_path('code/a.py')['f'](2))\n")
  file = here / provenance.TABLE
  file.write_text(file.read_text() + 'canary = "python canary.py"\n')
  out = here / "docs/results/speed"
  provenance.write(out, {"x": 1.5})
  table = provenance.table()
  before = (here / "code/a.py").read_text()
  (here / "code/a.py").write_text(before.replace("2 * x", "x + x"))
  with pytest.raises(SystemExit, match="no canary was kept of the sources that made it"):
    results.confirm("speed", table)
  (here / "code/a.py").write_text(before)
  assert results.confirm("speed", table) == 0, "it is current: the canary is kept"
  (here / "code/a.py").write_text(before.replace("2 * x", "x + x"))
  assert results.state("speed", table["speed"])[0] == results.OLDER
  assert results.confirm("speed", table) == 0
  assert results.state("speed", table["speed"])[0] == results.CURRENT
  (here / "code/a.py").write_text(before.replace("2 * x", "3 * x"))
  assert results.confirm("speed", table) == 1
  assert "computes something else now" in capsys.readouterr().out
  assert results.state("speed", table["speed"])[0] == results.OLDER
  held = json.loads(out.with_suffix(".json").read_text())
  held["confirmed"]["versions"]["jax"] = "0.0.1"
  out.with_suffix(".json").write_text(json.dumps(held))
  with pytest.raises(SystemExit, match="bits differ between them"):
    results.confirm("speed", table)


def test_every_row_of_the_table_is_whole() -> None:
  for name, row in provenance.table().items():
    assert {"command", "sources", "minutes"} <= set(row), name
    assert provenance.files(row["sources"]), name
    assert row["minutes"] > 0


def test_every_command_of_the_table_writes_its_record() -> None:
  """It names the record, or its program writes there unless told otherwise."""
  for name, row in provenance.table().items():
    record, words = (provenance.RESULTS / name).as_posix(), shlex.split(row["command"])
    programs = [REPOSITORY / word for word in words if word.endswith(".py")]
    by_default = any(
      f'default="{record}"' in text or f'default=Path("{record}")' in text
      for text in (program.read_text() for program in programs)
    )
    assert record in words or by_default, name


def test_every_record_under_results_is_in_the_table(results: Any) -> None:
  names = {path.stem for path in (REPOSITORY / provenance.RESULTS).glob("*.json")}
  assert names <= set(provenance.table())
  for name in names:
    for record in results.records(name):
      keys = {"commit", "sources", "files", "versions", "machine", "command", "when"}
      assert keys <= set(record), name
      assert provenance.digest(record["files"]) == record["sources"], name


def test_the_table_is_read_by_every_python() -> None:
  text = (REPOSITORY / provenance.TABLE).read_text()
  assert set(tomllib.loads(text)) == {"groups", *provenance.table()}
