"""POPE (scripts/v1_5/eval/pope.sh): asks whether an object is in the image; F1 of "yes"."""

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
  """Returns counts and ratios over pairs (answer, ground truth).

  These are TP, FP, TN, FN, accuracy, precision, recall, f1 and yes_ratio. A ratio with denominator
  0 is 0.0 (the original raises ZeroDivisionError).
  """
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
  """Returns the ratios of lmms-eval over pairs (answer, ground truth).

  An answer other than exactly "yes" or "no" is wrong in the accuracy, and ignored in precision and
  recall. The yes ratio is that of the ground truths, not of the answers.
  """
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
  """Implements POPE, with its three splits of questions.

  Matches labels to the questions of a split by their order, like LLaVA's scorer, and checks that
  their images are equal.
  """

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
    """Returns the questions of all splits. Raises: BenchmarkError for labels that do not match."""
    rows = self.rows(ASKED, ("question_id", "image", "text", "category"))
    truths: dict[str, Any] = {}
    for split in SPLITS:
      path = self.folder / LABELS.format(split)
      labels = files.read_truths(path)
      members = [row for row in rows if row["category"] == split]
      if len(labels) != len(members):
        raise files.BenchmarkError(
          f"{path}: {len(labels)} labels for {len(members)} questions of {ASKED}; expected the "
          "same number in the same order. Fetch the version that docs/benchmarks.md names."
        )
      for row, label in zip(members, labels, strict=True):
        if label.get("image", row["image"]) != row["image"]:
          raise files.BenchmarkError(
            f"{path}: the label for question {row['question_id']} is of {label['image']}, expected "
            f"{row['image']} as in {ASKED}. Fetch the version that docs/benchmarks.md names."
          )
        truths[row["question_id"]] = label.get("label")
    if unknown := {row["category"] for row in rows} - set(SPLITS):
      raise files.BenchmarkError(f"{self.folder / ASKED}: unknown category {sorted(unknown)}")
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
    """Returns score 1 if the answer reads as the ground truth, else 0; `read` is what was read."""
    read = self.rules.read(text)
    return {"score": float(read == item.truth), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the mean F1 of the splits, or with protocol `lmms` the F1 over all questions."""
    measure = measures_lmms if self.lmms else measures
    by_kind: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({item.kind for item in items})):
      members = [item for item in items if kind in ("all", item.kind)]
      pairs = [(self.rules.read(text), i.truth) for i, text in answered(members, predictions)]
      by_kind[kind] = {**measure(pairs), "items": len(pairs), "asked": len(members)}
    if self.lmms:
      return Scores(by_kind["all"]["f1"], "F1 over all splits", by_kind)
    splits = [row["f1"] for kind, row in by_kind.items() if kind != "all"]
    of = "the splits" if len(splits) == len(SPLITS) else f"{len(splits)} of {len(SPLITS)} splits"
    return Scores(ratio(sum(splits), len(splits)), f"mean F1 of {of}", by_kind)
