"""The table of mutations fits the source, and what repeats them judges rightly."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY


def load() -> ModuleType:
  """scripts/mutations.py, which is no module of the package."""
  spec = importlib.util.spec_from_file_location("mutations", REPOSITORY / "scripts/mutations.py")
  assert spec
  assert spec.loader
  module = importlib.util.module_from_spec(spec)
  sys.modules["mutations"] = module  # dataclasses look their module up
  spec.loader.exec_module(module)
  return module


mutations = load()
SITES = mutations.sites()
# The least number of sites in each file of them.
ROOMS = {
  "data": 21,
  "models": 20,
  "train": 23,
  "eval": 23,
  "convert": 10,
  "infer": 15,
  "plan": 7,
  "checkpoint": 4,
  "sharding": 4,
}


def test_every_room_has_its_sites() -> None:
  counts = {room: sum(site.room == room for site in SITES) for room in ROOMS}
  assert {site.room for site in SITES} == set(ROOMS)
  assert all(counts[room] >= least for room, least in ROOMS.items())
  assert len({mutations.key(site) for site in SITES}) == len(SITES)
  assert len({(site.file, site.hurts) for site in SITES}) == len(SITES)


@pytest.mark.parametrize("room", ROOMS)
def test_every_site_is_a_line_of_the_source(room: str) -> None:
  """Exactly once, and what it becomes is Python; its tests are there."""
  for site in (s for s in SITES if s.room == room):
    line = site.line()
    text = (REPOSITORY / site.path).read_text()
    assert site.old.splitlines()[0] in text.splitlines()[line - 1]
    changed = site.apply(text)
    assert changed != text
    ast.parse(changed)
    assert site.tests
    for test in site.tests:
      file, _, name = test.partition("::")
      found = (REPOSITORY / "tests" / file).read_text()
      assert f"def {name}(" in found or not name, test


def site(old: str = "return 1", new: str = "return 2") -> object:
  return mutations.Site("data", "config.py", old, new, ("test_x.py",), "a number")


def package(root: Path, text: str) -> None:
  (root / mutations.PACKAGE).mkdir()
  (root / mutations.PACKAGE / "config.py").write_text(text)


@pytest.mark.parametrize(("text", "count"), [("pass", 0), ("return 1\nreturn 1", 2)])
def test_a_site_that_no_longer_fits_says_so(tmp_path: Path, text: str, count: int) -> None:
  package(tmp_path, text)
  with pytest.raises(mutations.SiteError, match=rf"data.toml: .*config.py has .* {count} times"):
    site().line(tmp_path)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
  ("code", "printed", "wanted"),
  [
    (0, "1 passed", ("not noticed", "")),
    (1, "x\nFAILED tests/a.py::b - assert\n1 failed", ("noticed", "tests/a.py::b")),
    (2, "ERROR tests/a.py - SyntaxError", ("noticed", "tests/a.py")),
    (1, "no end within 9 s", ("noticed", "no end within 9 s")),
  ],
)
def test_how_a_run_of_tests_is_judged(code: int, printed: str, wanted: tuple[str, str]) -> None:
  assert mutations.judge(code, printed) == wanted


@pytest.mark.parametrize(("code", "printed"), [(5, "no tests ran"), (4, "usage"), (1, "a warning")])
def test_what_decides_nothing_is_an_error(code: int, printed: str) -> None:
  with pytest.raises(RuntimeError, match=f"pytest ended with {code}"):
    mutations.judge(code, printed)


def test_a_file_is_changed_while_its_tests_run_and_put_back(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  package(tmp_path, "def f():\n  return 1\n")
  file, seen = tmp_path / mutations.PACKAGE / "config.py", []

  def tests(root: Path, names: object, *options: str) -> tuple[int, str]:
    seen.append((file.read_text(), file.stat().st_mtime, options))
    return 1, "FAILED tests/test_x.py::f"

  monkeypatch.setattr(mutations, "run_tests", tests)
  record = mutations.attempt(site(), tmp_path, 1e9)
  assert seen == [("def f():\n  return 2\n", 1e9, ("-x",))]
  assert file.read_text() == "def f():\n  return 1\n"
  assert (record.line, record.outcome, record.by) == (2, "noticed", "tests/test_x.py::f")
  survivor = mutations.Record(
    **{**vars(record), "outcome": "not noticed", "by": "", "file": "x.py"}
  )
  page = mutations.markdown([record, survivor], "abc")
  assert "Of 2 single-line changes" in page
  assert "notices 1 (50.0%) at abc" in page
  assert "| data | 1 | 2 |" in page
  assert "| `x.py:2` | a number |" in page


DRIVER = """
import sys
sys.path.insert(0, {scripts!r})
if __name__ == "__main__":
  import pathlib
  import mutations
  print(mutations.run_tests(pathlib.Path({root!r}), ["test_x.py"])[0])
"""


@pytest.mark.parametrize(("value", "code"), [(1, 0), (2, 1)])
def test_tests_run_with_the_package_of_their_copy(tmp_path: Path, value: int, code: int) -> None:
  root = tmp_path / "copy"
  root.mkdir()
  package(root, f"VALUE = {value}\n")
  (root / mutations.PACKAGE / "__init__.py").write_text("")
  (root / "tests").mkdir()
  (root / "tests/test_x.py").write_text(
    "from llava_sp_jax import config\n\n\ndef test_value():\n  assert config.VALUE == 1\n"
  )
  driver = tmp_path / "driver.py"
  driver.write_text(DRIVER.format(scripts=str(REPOSITORY / "scripts"), root=str(root)))
  done = subprocess.run([sys.executable, driver], capture_output=True, text=True, check=True)
  assert done.stdout.split() == [str(code)], done.stderr


def test_records_of_sites_that_are_gone_are_left_out(tmp_path: Path) -> None:
  known = SITES[0]
  line = known.line()
  values = {
    "room": known.room,
    "file": known.file,
    "line": line,
    "old": known.old,
    "new": known.new,
    "hurts": known.hurts,
    "outcome": "noticed",
    "by": "x",
    "seconds": 1.0,
  }
  gone = {**values, "old": "nothing of the kind"}
  (tmp_path / "m.json").write_text(json.dumps({"figures": [values, gone]}))
  found = mutations.read(tmp_path / "m", SITES)
  assert list(found) == [mutations.key(known)]
  mutations.write(tmp_path / "m", found)
  assert len(json.loads((tmp_path / "m.json").read_text())["figures"]) == 1
  assert mutations.read(None, SITES) == {}


def test_the_copy_is_the_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  tree, copy = tmp_path / "tree", tmp_path / "copy"
  tree.mkdir()
  for name in ("kept.py", "new.py", "ignored.txt", ".gitignore"):
    (tree / name).write_text("ignored.txt\n")
  for command in (["init", "-q"], ["add", "kept.py", ".gitignore"]):
    subprocess.run(["git", *command], cwd=tree, check=True)
  monkeypatch.setattr(mutations, "REPOSITORY", tree)
  mutations.copy_tree(copy)
  assert sorted(p.name for p in copy.iterdir()) == [".gitignore", "kept.py", "new.py"]
