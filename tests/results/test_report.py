"""The report of a training: its pictures, and what they show where nothing was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp_jax.eval import run
from llava_sp_jax.results import gallery, predictions, report
from llava_sp_jax.tasks.benchmark import served
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.task import Item, Predictions, Scores
from tests.eval.scripted import Scripted


def test_a_report_of_what_a_server_scores(
  run_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
  """No bars, since there is no figure; answers without a verdict are shown."""

  class Server(EasyVqa):
    def verdict(self, item: Item, text: str) -> dict[str, Any]:
      return {}

    def score(self, items: list[Item], predictions: Predictions) -> Scores:
      return served(items, predictions, "a server")

  run.run(Server(tiny_data), Scripted(), tmp_path / "out")
  records = predictions.read_file(tmp_path / "out" / predictions.FILE)
  assert len(gallery.mixed(records, 24)) == 12
  page = report.write([str(run_folder)], str(tmp_path / "out"), str(tmp_path / "report"))
  assert page.startswith("# easy_vqa: scored by a server\n")
  assert sorted(path.name for path in (tmp_path / "report").glob("*.png")) == [
    "answers.png",
    "loss.png",
  ]
  assert "accuracy.png" not in page
  assert "(answers.png)" in page
  for record in records:
    record["images"] = ["sha256:0"]  # as MMBench's, which stand in its own file
  assert not report.answer_sheet(records, tmp_path / "none.png")


def test_the_sheet_shows_some_mistakes_and_no_image_twice() -> None:
  rows: list[dict[str, Any]] = [
    {"id": i, "images": [str(i // 2)], "verdict": {"score": float(i % 3 > 0)}} for i in range(120)
  ]
  chosen = gallery.mixed(rows, 24)
  assert len(chosen) == 24
  assert sum(gallery.is_right(r) is False for r in chosen) == 6
  assert len(gallery.mixed(rows[:2], 24)) == 2
