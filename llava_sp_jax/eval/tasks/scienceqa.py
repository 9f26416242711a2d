"""ScienceQA, test (scripts/v1_5/eval/sqa.sh): letters; the headline is the accuracy with images."""

from __future__ import annotations

from typing import Any, ClassVar

from llava_sp_jax.eval import files
from llava_sp_jax.eval.benchmark import (
  LETTER,
  LMMS_SHORT,
  LONG,
  Benchmark,
  Rules,
  answered,
  ratio,
  settled,
)
from llava_sp_jax.eval.scoring import sqa_letter, sqa_letter_lmms
from llava_sp_jax.eval.task import Item, Predictions, Scores, mean_by_kind

ASKED = "llava_test_CQM-A.json"
LETTERS = "ABCDE"


def of_llava(row: dict[str, Any]) -> str:
  return row["conversations"][0]["value"].replace("<image>", "").strip() + f"\n{LETTER}"


def of_lmms(row: dict[str, Any]) -> str:
  problem = row["problem"]
  hint = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
  options = "\n".join(f"{x}. {c}" for x, c in zip(LETTERS, _choices(problem), strict=False))
  return f"{hint}{problem['question']}\n{options}\n{LETTER}"


def _asks(row: dict[str, Any]) -> bool:
  match row["conversations"]:
    case [{"value": str()}, *_]:
      return True
  return False


def _choices(problem: dict[str, Any]) -> list[Any]:
  return problem["choices"] if isinstance(problem["choices"], list) else []


def _answered(problem: dict[str, Any]) -> bool:
  match problem:
    case {"choices": list(choices), "answer": int(answer)}:
      return 0 <= answer < min(len(choices), len(LETTERS))
  return False


class ScienceQa(Benchmark):
  """LLaVA asks the whole test split, lmms-eval's scienceqa_img only what has an image."""

  name = "scienceqa"
  homes = ("scienceqa",)
  needed = (ASKED, "problems.json", "pid_splits.json")
  protocols: ClassVar = {
    "llava": Rules("X, `X. ...` or one `The answer is X.`; all of the test split, unanswered is "
                   "wrong; the headline takes questions with an image", LONG, sqa_letter, of_llava),
    "lmms": Rules("X or `X....`; only questions with an image", LMMS_SHORT, sqa_letter_lmms,
                  of_lmms),
  }  # fmt: skip

  def items(self) -> list[Item]:
    path = self.folder / ASKED
    rows = files.read_json(path, list)
    files.check_rows(path, ((f"[{i}]", r) for i, r in enumerate(rows)), ("id", "conversations"))
    problems = files.read_json(self.folder / "problems.json")
    split = files.read_json(self.folder / "pid_splits.json").get("test", [])
    if different := sorted({str(row["id"]) for row in rows} ^ set(split)):
      raise files.BenchmarkError(
        f"{path}: {len(different)} questions are here or in the test split of pid_splits.json but "
        f"not in both: {', '.join(different[: files.SHOWN])}. Fetch both files again."
      )
    files.check_rows(
      self.folder / "problems.json",
      ((key, problems.get(key)) for key in split),
      ("question", "choices", "answer"),
    )
    unasked = [str(row["id"]) for row in rows if not _asks(row)]
    files.refuse(path, unasked, "conversations that begin with a value")
    items = []
    for row in rows:
      problem, image = problems[str(row["id"])], row.get("image")
      if self.lmms and not image:
        continue
      items.append(
        Item(
          id=str(row["id"]),
          question=self.question({**row, "problem": problem}),
          images=(self.folder / "images" / "test" / image,) if image else (),
          kind="image" if image else "text",
          truth=LETTERS[problem["answer"]] if _answered(problem) else None,
          extra={"choices": len(_choices(problem)), "subject": problem.get("subject", "")},
          problem="" if _answered(problem)
          else f"the answer {problem['answer']!r:.40} is none of at most 5 choices",
        )
      )  # fmt: skip
    return settled(items, path)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """`index`: the choice that was read, -1 where none was or it lies beyond the choices."""
    read = self.rules.read(text)
    letters = list(LETTERS[: item.extra["choices"]])
    index = letters.index(read) if read in letters else -1
    right = read == item.truth if self.lmms else LETTERS[index] == item.truth and index >= 0
    return {"score": float(right), "read": read, "index": index}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """As the original: over all questions an unanswered one is wrong; among those with an image it
    is not counted (it knows an image by the prompt that an answer repeats)."""
    by_kind = mean_by_kind(items, predictions, self.verdict)
    if not self.lmms:
      by_kind["all"] = mean_by_kind(items, predictions, self.verdict, missing=0.0)["all"]
    subjects: dict[str, list[float]] = {}
    for item, text in answered(items, predictions):
      if item.extra["subject"]:
        right = self.verdict(item, text)["score"]
        subjects.setdefault(f"subject {item.extra['subject']}", []).append(right)
    figures = {name: ratio(sum(values), len(values)) for name, values in sorted(subjects.items())}
    headline = by_kind["image"]["accuracy"] if "image" in by_kind else 0.0
    return Scores(headline, "accuracy on questions with an image", by_kind, figures)
