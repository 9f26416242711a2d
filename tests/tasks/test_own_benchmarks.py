"""Benchmarks that users bring as a class of a file, and the command's tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax import cli
from llava_sp_jax.config import ConfigError
from llava_sp_jax.eval import run
from llava_sp_jax.results import predictions
from llava_sp_jax.tasks import catalog
from llava_sp_jax.tasks.task import EvalError
from tests.eval.scripted import Scripted

OWN = """
from llava_sp_jax.tasks.easy_vqa import EasyVqa

class Louder(EasyVqa):
  name = "louder"
  protocol = "exact match in capitals"

  def verdict(self, item, text):
    return {"score": float(text.strip().upper() == item.truth.upper())}

class Nothing:
  name = "nothing"
"""


def test_a_class_of_a_file_is_a_task(tmp_path: Path, tiny_data: Path) -> None:
  path = tmp_path / "own.py"
  path.write_text(OWN)
  task = catalog.find("--task", f"{path}:Louder")(tiny_data)
  assert task.verdict(task.items()[0], task.items()[0].truth.upper()) == {"score": 1.0}


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("own.py:Other", "no class 'Other'; it has EasyVqa, Louder, Nothing"),
    ("own.py:Nothing", "no task: without generation, items"),
    ("gone.py:Louder", "no file gone.py"),
    ("broken.py:Louder", "broken.py ends with ZeroDivisionError: division by zero"),
    ("other", "--task: unknown 'other'; known: easy_vqa"),
  ],
)
def test_what_is_no_task_is_said(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
  monkeypatch.chdir(tmp_path)
  Path("own.py").write_text(OWN)
  Path("broken.py").write_text("1 / 0\n")
  with pytest.raises(ConfigError, match=said):
    catalog.find("--task", name)


def test_the_list_names_all_tasks_and_protocols(capsys: pytest.CaptureFixture[str]) -> None:
  assert cli.main(["eval", "--list"]) == 0
  printed = capsys.readouterr().out
  for name, task in catalog.TASKS.items():
    assert f"| {name} |" in printed
    for protocol in getattr(task, "protocols", {}):
      assert f"| {protocol} |" in printed


def test_several_tasks_end_in_one_table(
  run_folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """And a comparison says its result; a task of a file stands beside those of the package."""
  (tmp_path / "own.py").write_text(OWN)
  arguments = [
    "eval",
    f"--task=easy_vqa,{tmp_path}/own.py:Louder",
    f"--data={tiny_data}",
    "--limit=3",
  ]
  first = tmp_path / "first"
  assert cli.main([*arguments, f"--checkpoint={run_folder}", f"--out={first}"]) == 0
  printed = capsys.readouterr().out
  table = (first / "scores.md").read_text()
  assert table in printed
  assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| easy_vqa", "| louder"]
  assert cli.main([*arguments, "--merge", f"--out={first}", f"--compare={first}"]) == 0
  assert (
    f"Against {first}/easy_vqa, of 3 questions that both answered: 0 fixed, 0 broken, 0 in other "
    "words"
  ) in capsys.readouterr().out


MINE = """
from pathlib import Path
from llava_sp_jax.tasks.task import Item, Scores
from llava_sp_jax.infer.generation import Generation

class Base:
  name, protocol, generation = "mine", "exact", Generation(max_new_tokens=2)
  def __init__(self, folder): pass
  def items(self): return [Item("a", "q", (Path("0.png"),), "k", "yes")]
  def data_hash(self): return "h"
  def verdict(self, item, text): return {"score": 1.0}
  def score(self, items, predictions): return Scores(1.0, "m", {"all": {"items": 1, "asked": 1}})
  def submission(self, items, predictions, folder): return []

class Mine(Base):
"""


@pytest.mark.parametrize(
  ("body", "said"),
  [
    ("def __init__(self): pass", "__init__ ends with TypeError: "),
    (
      "def __init__(self, folder): {}['x']",
      r"__init__ ends with KeyError: 'x' \(mine.py, line 16\)",
    ),
    (
      "def items(self): return None",
      "items ends with TypeError: 'NoneType' object is not iterable",
    ),
    ("def items(self): return ['a']", r"\[0\] is 'a', expected a tasks.task.Item"),
    ("def items(self): return [Item('a', None, (), 'k', 1)]", "question None, expected str"),
    (
      "def items(self): return [Item('a', 'q', 'x.png', 'k', 1)]",
      r"images 'x.png', expected a tuple",
    ),
    (
      "def items(self): return [Item('a', 'q', (), 'k', {1})]",
      "the truth cannot be written as JSON",
    ),
    ("def data_hash(self): return b'h'", "data_hash ends with TypeError: it returned b'h'"),
    (
      "def verdict(self, item, text): return 1 / 0",
      "verdict ends with ZeroDivisionError: .*line 16",
    ),
    (
      "def verdict(self, item, text): return {'score': float('nan')}",
      "score nan, expected a finite",
    ),
    ("def verdict(self, item, text): return {'x': Mine}", "it cannot be written as JSON"),
    (
      "def score(self, items, predictions): return 0.5",
      "it returned 0.5, expected a tasks.task.Sc",
    ),
    (
      "def score(self, items, predictions): return Scores(1.0, 'm', {})",
      r"by_kind\['all'\] is None",
    ),
    (
      "def score(self, items, predictions): raise RuntimeError('x')",
      "score ends with RuntimeError",
    ),
    ("def submission(self, items, predictions, folder): return [Path('/x')]", "expected paths in"),
    ("name = '../x'", "name '../x', expected a text that can name a folder"),
    ("protocol = None", "protocol None, expected a text"),
    ("options = 3", "options 3, expected a tuple of names"),
    ("generation = None", "generation None, expected an infer.Generation"),
  ],
)
def test_what_goes_wrong_in_it_is_one_line(
  tiny_data: Path, tmp_path: Path, body: str, said: str
) -> None:
  """And no answer is written with a verdict that nobody can read afterwards."""
  path = tmp_path / "mine.py"
  path.write_text(f"{MINE}  {body}\n")
  with pytest.raises(EvalError, match=rf"mine.py:Mine: .*{said}") as caught:
    run.run(catalog.find("--task", f"{path}:Mine")(tiny_data), Scripted(), tmp_path / "out")
  assert "\n" not in str(caught.value)
  for file in (tmp_path / "out").glob("predictions.jsonl"):
    predictions.read_file(file)


def test_items_may_come_one_by_one(tiny_data: Path, tmp_path: Path) -> None:
  path = tmp_path / "mine.py"
  path.write_text(f"{MINE}  def items(self): yield from Base.items(self)\n")
  task = catalog.find("--task", f"{path}:Mine")(tiny_data)
  assert run.run(task, Scripted(), tmp_path / "out").headline == 1.0
