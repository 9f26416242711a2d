"""VizWiz, test (scripts/v1_5/eval/vizwiz.sh): EvalAI scores the submission."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import LMMS_LONG, LOADER, Benchmark, Rules, served, unique
from llava_sp_jax.tasks.scoring import vqa_normal
from llava_sp_jax.tasks.task import Item, Predictions, Scores, text_of

ASKED = "llava_test.jsonl"
SERVER = "https://eval.ai/web/challenges/challenge-page/1911"
HINT = "\nWhen the provided information is insufficient"  # LLaVA adds it to questions


def capitalized(row: dict[str, Any]) -> str:
  """Capitalizes the question like lmms-eval: a capital first, then lower case; not the hint."""
  question, hint, rest = row["text"].partition(HINT)
  result: str = question.capitalize() + hint + rest
  return result


class VizWiz(Benchmark):
  """Implements VizWiz; LLaVA's questions contain a hint ("... respond with 'Unanswerable'")."""

  name = "vizwiz"
  homes = ("vizwiz",)
  needed = (ASKED,)
  protocols: ClassVar = {
    "llava": Rules("answers normalised as EvalAI does", LOADER),
    "lmms": Rules(
      "as llava; the question in small letters after a capital", LMMS_LONG, prompt=capitalized
    ),
  }

  def items(self) -> list[Item]:
    """Returns the questions, without ground truths, which only the server has."""
    items = [
      Item(
        id=str(row["question_id"]),
        question=self.question(row),
        images=(self.folder / "test" / row["image"],),
        kind=row.get("category", "default"),
        truth=None,
        extra={"image": row["image"]},
      )
      for row in self.rows(ASKED)
    ]
    return unique(items, self.folder / ASKED)

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns how many questions were answered and asked, without a headline: the server scores."""
    return served(items, predictions, SERVER)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `vizwiz_answers.json`, like scripts/convert_vizwiz_for_submission.py.

    It is a list of {image, answer}. Writes "" for a missing answer, as for VQAv2 (the original
    fails); the scores count how many questions were answered.
    """
    answers = [
      {"image": item.extra["image"], "answer": vqa_normal(text_of(predictions, item) or "")}
      for item in items
    ]
    return [files.write_json(folder / "vizwiz_answers.json", answers)]
