"""ScienceQA, test (scripts/v1_5/eval/sqa.sh): multiple choice; accuracy on those with an image."""

from __future__ import annotations

from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import (
  LETTER,
  LMMS_SHORT,
  LONG,
  Benchmark,
  Rules,
  answered,
  ratio,
  settled,
)
from llava_sp_jax.tasks.scoring import sqa_letter, sqa_letter_lmms
from llava_sp_jax.tasks.task import Item, Predictions, Scores, mean_by_kind

ASKED = "llava_test_CQM-A.json"
TRUTHS, SPLITS = "problems.json", "pid_splits.json"
LETTERS = "ABCDE"


def of_llava(row: dict[str, Any]) -> str:
  """Returns LLaVA's question of a row: the text of its file, and a request for a letter."""
  result: str = row["conversations"][0]["value"].replace("<image>", "").strip() + f"\n{LETTER}"
  return result


def of_lmms(row: dict[str, Any]) -> str:
  """Returns lmms-eval's question of a row: hint, question, options, and a request for a letter."""
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
  choices = problem.get("choices")
  return choices if isinstance(choices, list) else []


def _problem(problem: dict[str, Any]) -> str:
  """Returns why an answer to this question cannot be scored; "" if it can."""
  if absent := [key for key in ("question", "choices", "answer") if key not in problem]:
    return f"without {', '.join(absent)} in {TRUTHS}"
  choices, answer = _choices(problem), problem["answer"]
  if not choices or not all(isinstance(choice, str) for choice in choices):
    return f"choices that are not understood: {problem['choices']!r:.80}"
  most = min(len(choices), len(LETTERS))
  if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < most:
    return f"the answer {answer!r:.40} is none of 0 to {most - 1}, its choices"
  return ""


class ScienceQa(Benchmark):
  """Implements ScienceQA.

  Asks the whole test split with protocol `llava`, and only questions with an image with `lmms`,
  like lmms-eval's scienceqa_img.
  """

  name = "scienceqa"
  homes = ("scienceqa",)
  needed = (ASKED, TRUTHS, SPLITS)
  protocols: ClassVar = {
    "llava": Rules(
      "X, `X. ...` or one `The answer is X.`; all of the test split, unanswered is "
      "wrong; the headline takes questions with an image",
      LONG,
      sqa_letter,
      of_llava,
    ),
    "lmms": Rules(
      "X or `X....`; only questions with an image", LMMS_SHORT, sqa_letter_lmms, of_lmms
    ),
  }

  def items(self) -> list[Item]:
    """Returns the questions. Raises: BenchmarkError for files that do not match each other."""
    path = self.folder / ASKED
    rows = files.read_json(path, list)
    files.check_rows(path, [(f"[{i}]", r) for i, r in enumerate(rows)], ("id", "conversations"))
    unasked = [str(row["id"]) for row in rows if not _asks(row)]
    files.refuse(path, unasked, "conversations that begin with a value")
    truths = files.read_json(self.folder / TRUTHS)
    split = files.read_json(self.folder / SPLITS).get("test")
    if not isinstance(split, list):
      raise files.BenchmarkError(f"{self.folder / SPLITS}: expected a list of questions under test")
    if different := sorted({str(row["id"]) for row in rows} ^ set(map(str, split))):
      raise files.BenchmarkError(
        f"{path}: {len(different)} questions are here or in the test split of {SPLITS} but "
        f"not in both: {', '.join(different[: files.SHOWN])}. Fetch both files again."
      )
    asked = [row for row in rows if row.get("image") or not self.lmms]
    return settled([self._item(row, truths.get(str(row["id"]))) for row in asked], path)

  def _item(self, row: dict[str, Any], told: Any) -> Item:
    truth, image = told if isinstance(told, dict) else {}, row.get("image")
    problem = _problem(truth)
    asked = self.rules.prompt or of_llava
    return Item(
      id=str(row["id"]),
      question=(of_llava if problem else asked)({**row, "problem": truth}),
      images=(self.folder / "images" / "test" / image,) if image else (),
      kind="image" if image else "text",
      truth=None if problem else LETTERS[truth["answer"]],
      extra={"choices": len(_choices(truth)), "subject": truth.get("subject", "")},
      problem=problem,
    )

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns the score, 0 or 1, the letter that was read, and in `index` its choice (-1: none)."""
    read = self.rules.read(text)
    letters = list(LETTERS[: item.extra["choices"]])
    index = letters.index(read) if read in letters else -1
    right = read == item.truth if self.lmms else LETTERS[index] == item.truth and index >= 0
    return {"score": float(right), "read": read, "index": index}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the accuracy on questions with an image; `figures` has it by subject.

    As in the original, an unanswered question is wrong in the accuracy over all questions (protocol
    `llava`), and is not counted in the accuracy on questions with an image (the original detects an
    image by the prompt that is stored with an answer).
    """
    by_kind = mean_by_kind(items, predictions, self.verdict)
    if not self.lmms:
      by_kind["all"] = mean_by_kind(items, predictions, self.verdict, missing=0.0)["all"]
    subjects: dict[str, list[float]] = {}
    for item, text in answered(items, predictions):
      if item.extra["subject"]:
        right = self.verdict(item, text)["score"]
        subjects.setdefault(f"subject {item.extra['subject']}", []).append(right)
    figures = {name: ratio(sum(values), len(values)) for name, values in sorted(subjects.items())}
    if "image" not in by_kind:
      return Scores(None, "no score: no question has an image", by_kind, figures)
    headline = by_kind["image"]["accuracy"]
    return Scores(headline, "accuracy on questions with an image", by_kind, figures)
