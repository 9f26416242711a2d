"""POPE (scripts/v1_5/eval/pope.sh): is an object there, three splits; F1 of "yes"."""

from __future__ import annotations

import collections
from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import LOADER, Benchmark, Rules, answered, ratio, settled
from llava_sp_jax.tasks.scoring import pope_answer
from llava_sp_jax.tasks.task import Item, Predictions, Scores

ASKED = "llava_pope_test.jsonl"
LABELS = "coco/coco_pope_{}.json"
SPLITS = ("adversarial", "popular", "random")


def measures(pairs: list[tuple[str, str]]) -> dict[str, float]:
  """Counts and ratios of (answer, truth); an empty denominator gives 0.0, where the original stops
  with ZeroDivisionError."""
  count = collections.Counter((a if a == "yes" else "no", t) for a, t in pairs)
  tp, fp = count["yes", "yes"], count["yes", "no"]
  tn, fn = count["no", "no"], count["no", "yes"]
  precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
  return {
    "TP": tp,
    "FP": fp,
    "TN": tn,
    "FN": fn,
    "accuracy": ratio(tp + tn, len(pairs)),
    "precision": precision,
    "recall": recall,
    "f1": ratio(2 * precision * recall, precision + recall),
    "yes_ratio": ratio(tp + fp, len(pairs)),
  }


def measures_lmms(pairs: list[tuple[str, str]]) -> dict[str, float]:
  """lmms-eval's: an answer is exactly yes or no, anything else is wrong in the accuracy and left
  out of recall; its yes ratio is that of the truths."""
  count = collections.Counter(pairs)
  tp, fp, fn = count["yes", "yes"], count["yes", "no"], count["no", "yes"]
  precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
  return {
    "accuracy": ratio(sum(a == t for a, t in pairs), len(pairs)),
    "precision": precision,
    "recall": recall,
    "f1": ratio(2 * precision * recall, precision + recall),
    "yes_ratio": ratio(sum(t == "yes" for _, t in pairs), len(pairs)),
  }


class Pope(Benchmark):
  """Labels stand in the order of a split's questions, as LLaVA's scorer pairs them; an image that
  is not the label's is an error here."""

  name = "pope"
  homes = ("pope",)
  needed = (ASKED, *(LABELS.format(split) for split in SPLITS))
  protocols: ClassVar = {
    "llava": Rules(
      "no/not/No in the first sentence is no, else yes; mean F1 of three splits",
      LOADER,
      pope_answer,
    ),
    "lmms": Rules(
      "exactly yes or no without case; F1 over all three splits together",
      LOADER,
      lambda text: text.lower().strip(),
    ),
  }

  def items(self) -> list[Item]:
    rows = self.rows(ASKED, ("question_id", "image", "text", "category"))
    truths: dict[str, Any] = {}
    for split in SPLITS:
      path = self.folder / LABELS.format(split)
      labels = files.read_truths(path)
      mine = [row for row in rows if row["category"] == split]
      if len(labels) != len(mine):
        raise files.BenchmarkError(
          f"{path}: {len(labels)} labels for {len(mine)} questions of {ASKED}; expected the same "
          "number in the same order. Fetch the version that docs/benchmarks.md names."
        )
      for row, label in zip(mine, labels, strict=True):
        if label.get("image", row["image"]) != row["image"]:
          raise files.BenchmarkError(
            f"{path}: the label for question {row['question_id']} is of {label['image']}, expected "
            f"{row['image']} as in {ASKED}. Fetch the version that docs/benchmarks.md names."
          )
        truths[row["question_id"]] = label.get("label")
    if strange := {row["category"] for row in rows} - set(SPLITS):
      raise files.BenchmarkError(f"{self.folder / ASKED}: unknown category {sorted(strange)}")
    items = [
      Item(
        id=str(row["question_id"]),
        question=row["text"],
        images=(self.folder / "val2014" / row["image"],),
        kind=row["category"],
        truth=truths[row["question_id"]],
        problem=""
        if truths[row["question_id"]] in ("yes", "no")
        else f"the label {truths[row['question_id']]!r:.40} is neither 'yes' nor 'no'",
      )
      for row in rows
    ]
    return settled(items, self.folder / ASKED)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    read = self.rules.read(text)
    return {"score": float(read == item.truth), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    measure = measures_lmms if self.lmms else measures
    by_kind: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({item.kind for item in items})):
      mine = [item for item in items if kind in ("all", item.kind)]
      pairs = [(self.rules.read(text), i.truth) for i, text in answered(mine, predictions)]
      by_kind[kind] = {**measure(pairs), "items": len(pairs), "asked": len(mine)}
    if self.lmms:
      return Scores(by_kind["all"]["f1"], "F1 over all splits", by_kind)
    splits = [row["f1"] for kind, row in by_kind.items() if kind != "all"]
    of = "the splits" if len(splits) == len(SPLITS) else f"{len(splits)} of {len(SPLITS)} splits"
    return Scores(ratio(sum(splits), len(splits)), f"mean F1 of {of}", by_kind)
