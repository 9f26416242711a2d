"""The notebook of examples/: what it holds, and its cells on a tiny run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "examples/what_the_tokens_look_at.ipynb"
RUN, DATA = '"runs/easy_vqa/pooling-0/finetune"', '"data/easy_vqa"'  # of the demo
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_cells_compile_and_name_the_demo_alone() -> None:
  for code in CODE:
    compile(code, NOTEBOOK.name, "exec")
  assert [sum(code.count(name) for code in CODE) for name in (RUN, DATA)] == [1, 1]


def test_it_was_executed_from_top_to_bottom() -> None:
  cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert {output["output_type"] for output in outputs} <= {
    "stream",
    "display_data",
    "execute_result",
  }
  assert "stderr" not in {output.get("name") for output in outputs}
  assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5


def test_it_holds_nothing_of_the_machine_that_executed_it() -> None:
  assert NOTEBOOK.stat().st_size < 1_000_000
  pictures = re.compile(r'"image/png": "[^"]*"')
  text = pictures.sub("", NOTEBOOK.read_text())
  assert not re.search(r"(?<![\w.])/(?:home|root|tmp|usr|work|opt|Users)\b", text)


@pytest.mark.guard  # compiles the model in four ways
def test_its_cells_run_on_a_tiny_model(
  run_folder: Path,
  tiny_data: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  matplotlib = pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  drawn: list[int] = []
  monkeypatch.setattr(plt, "show", lambda: drawn.append(len(plt.gcf().axes)))
  monkeypatch.chdir(NOTEBOOK.parent)
  names: dict[str, object] = {}
  for code in CODE:
    exec(code.replace(RUN, f'"{run_folder}"').replace(DATA, f'"{tiny_data}"'), names)
  plt.close("all")
  assert drawn == [12, 14, 24, 3]  # six tokens and a patch
  table = capsys.readouterr().out
  assert re.search(r"^nothing +[\d.]+%( +0\.00){3}$", table, re.M)
  assert re.search(r"^all spatial +[\d.]+%( +-?[\d.]+|nan){3}$", table, re.M)
