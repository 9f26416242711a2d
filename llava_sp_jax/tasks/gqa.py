"""GQA, test-dev balanced (scripts/v1_5/eval/gqa.sh): exact match, as in GQA's eval.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import (
  LMMS_SHORT,
  LOADER,
  Benchmark,
  Rules,
  answered,
  ratio,
  served,
  settled,
  texts,
)
from llava_sp_jax.tasks.scoring import plain_match
from llava_sp_jax.tasks.task import Item, Predictions, Scores, file_hash, mean_by_kind

ASKED = "llava_gqa_testdev_balanced.jsonl"
TRUTHS = "testdev_balanced_questions.json"
PLACES = tuple(f"data/{below}{TRUTHS}" for below in ("", "questions1.2/", "questions/"))


def _understood(truth: Any) -> bool:
  match truth:
    case {"answer": answer, "types": {"structural": str()}}:
      return files.is_text(answer)
  return False


def gqa_text(text: str) -> str:
  """Lower-cases and strips final periods, as LLaVA's scripts/convert_gqa_for_eval.py does."""
  return text.rstrip(".").lower()


class Gqa(Benchmark):
  """Implements GQA.

  Scores answers if the file of ground truths, `testdev_balanced_questions.json`, exists (in data/,
  data/questions1.2/ or data/questions/). Otherwise there is no score, and only the predictions for
  GQA's eval.py are written.
  """

  name = "gqa"
  homes = ("gqa",)
  needed = (ASKED,)
  protocols: ClassVar = {
    "llava": Rules("lower case, without periods at the end, then equal", LOADER, gqa_text),
    "lmms": Rules("equal without case and punctuation, at most 16 tokens", LMMS_SHORT),
  }

  def _truths(self) -> Path | None:
    return files.first_of(self.folder, PLACES)

  def items(self) -> list[Item]:
    """Returns the questions, with their ground truths if the file of those exists."""
    rows, path = self.rows(ASKED), self._truths()
    truths: dict[str, dict[str, Any]] = files.read_json(path) if path else {}
    items = []
    for row in rows:
      given = truths.get(str(row["question_id"]))
      truth = given if _understood(given) else None
      kind = truth["types"]["structural"] if truth else row.get("category", "default")
      items.append(
        Item(
          id=str(row["question_id"]),
          question=row["text"],
          images=(self.folder / "data" / "images" / row["image"],),
          kind=kind,
          truth=truth["answer"] if truth else None,
          extra={"semantic": truth["types"].get("semantic")} if truth else {},
          problem=f"no truth that is understood in {path.name}: {given!r:.80}"
          if path and not truth
          else "",
        )
      )
    return settled(items, path or self.folder / ASKED)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns score 1 for an exact match, else 0; {} without a ground truth."""
    if item.truth is None or item.problem:
      return {}
    if self.lmms:
      return {"score": float(plain_match(text, item.truth))}
    read = self.rules.read(text)
    return {"score": float(read == item.truth), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the accuracy, overall and by kind; no score without the file of ground truths.

    `figures` holds eval.py's `binary` and `open` (questions of structure `query`), the means by
    semantic type, and the hash of that file.
    """
    if all(item.truth is None for item in items):
      more = f"; with {TRUTHS} in {self.folder / 'data'}, --merge scores it here"
      return served(items, predictions, f"GQA's eval.py{more}")
    by_kind = mean_by_kind(items, predictions, self.verdict)
    groups: dict[str, list[float]] = {"binary": [], "open": []}
    for item, text in answered(items, predictions):
      right = self.verdict(item, text)["score"]
      groups["open" if item.kind == "query" else "binary"].append(right)
      groups.setdefault(f"semantic {item.extra['semantic']}", []).append(right)
    figures: dict[str, Any] = {name: ratio(sum(v), len(v)) for name, v in groups.items()}
    if truths := self._truths():
      figures["truths_hash"] = file_hash(truths)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind, figures)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `testdev_balanced_predictions.json`: [{questionId, prediction}] for GQA's eval.py.

    Writes "" for a missing answer, since eval.py refuses a file without an answer to each question.
    """
    rows = [
      {"questionId": item.id, "prediction": gqa_text(text)}
      for item, text in texts(items, predictions)
    ]
    return [files.write_json(folder / "testdev_balanced_predictions.json", rows)]
