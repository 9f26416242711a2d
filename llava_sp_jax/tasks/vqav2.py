"""VQAv2, test-dev (scripts/v1_5/eval/vqav2.sh): EvalAI scores the submission."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import LMMS_SHORT, LOADER, Benchmark, Rules, served, unique
from llava_sp_jax.tasks.scoring import vqa_normal
from llava_sp_jax.tasks.task import Item, Predictions, Scores

ASKED = "llava_vqav2_mscoco_test-dev2015.jsonl"
WHOLE = "llava_vqav2_mscoco_test2015.jsonl"
SERVER = "https://eval.ai/web/challenges/challenge-page/830"


class VqaV2(Benchmark):
  """Implements VQAv2: asks test-dev, and submits an answer, possibly empty, to all of test2015."""

  name = "vqav2"
  homes = ("vqav2",)
  needed = (ASKED, WHOLE)
  protocols: ClassVar = {
    "llava": Rules("answers normalised as EvalAI does, all of test2015 listed", LOADER),
    "lmms": Rules("as llava with at most 16 tokens; only the asked are listed", LMMS_SHORT),
  }

  def items(self) -> list[Item]:
    """Returns the questions of test-dev, without ground truths, which only the server has."""
    images = self.folder / "test2015"
    items = [
      Item(
        id=str(row["question_id"]),
        question=row["text"],
        images=(images / row["image"],),
        kind=row.get("category", "default"),
        truth=None,
        extra={"question_id": row["question_id"]},
      )
      for row in self.rows(ASKED)
    ]
    return unique(items, self.folder / ASKED)

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns how many questions were answered and asked, without a headline: the server scores."""
    return served(items, predictions, SERVER)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `vqav2_answers.json`, like scripts/convert_vqav2_for_submission.py.

    It is [{question_id, answer}] in the order of test2015, with "" for a missing answer. With
    protocol `lmms` it has only the questions that were asked.
    """
    listed = [i.extra["question_id"] for i in items]
    if not self.lmms:
      listed = [row["question_id"] for row in self.rows(WHOLE, ("question_id",))]
    found = {k: vqa_normal(p.text) for k, p in predictions.items() if not p.error}
    answers = [{"question_id": q, "answer": found.get(str(q), "")} for q in listed]
    return [files.write_json(folder / "vqav2_answers.json", answers)]
