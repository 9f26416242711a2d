"""What docs/evaluation.md shows works as it stands there (its command lines: tests/test_documents.py)."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tools import evaluate
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "evaluation.md").read_text()


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.mark.guard
def test_the_lines_of_python(
  run_folder: Path,
  tiny_data: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:
  """Exactly those lines, in a folder with the run and the data at the paths that they name."""
  (code,) = blocks("python")
  monkeypatch.chdir(tmp_path)
  for path, target in (("data/easy_vqa", tiny_data), ("runs/finetune", run_folder)):
    Path(path).parent.mkdir()
    Path(path).symlink_to(target)
  exec(compile(code, "docs/evaluation.md", "exec"), {})
  scores = json.loads(Path("results/scores.json").read_text())
  assert capsys.readouterr().out.splitlines()[-1] == str(scores["headline"])
  assert scores["answered"] == 12
  assert scores["generation"]["max_new_tokens"] == TASKS["easy_vqa"].generation.max_new_tokens
  assert Path("results/index.html").is_file()


def test_the_script_behind_the_promise_counts_no_errors_as_equal(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  """Without images every way "answers" alike: nothing."""
  path = REPOSITORY / "scripts" / "batch_invariance.py"
  spec = importlib.util.spec_from_file_location("batch_invariance", path)
  assert spec
  assert spec.loader
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  rows = [[0, [5], 0.5, True, ""], [1, [7], 0.1, False, ""]]
  monkeypatch.setattr(script, "child", lambda *_: rows)
  monkeypatch.setattr("sys.argv", ["x", "--checkpoint=x", "--data=x"])
  script.main()
  assert "2 processes: 0 of 2 answers changed" in capsys.readouterr().out
  rows[1] = [1, [], 0.0, False, "image 1.png: no such file"]
  with pytest.raises(
    SystemExit, match=r"1 of 2 questions have no answer, question 1: image 1\.png"
  ):
    script.main()


def test_every_option_that_the_page_names_is_there() -> None:
  known = evaluate.parser().format_help()
  own = {
    flag for text in re.findall(r"`(--[^`]*)`", PAGE) for flag in re.findall(r"--[a-z-]+", text)
  }
  assert len(own) > 15
  assert not [flag for flag in own if flag not in known]
