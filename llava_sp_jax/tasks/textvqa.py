"""TextVQA, validation (scripts/v1_5/eval/textvqa.sh): soft accuracy, with or without OCR tokens.

With the OCR tokens of LLaVA's file in the prompt, LLaVA-1.5 scores about 13 points higher than
without, so the two are separate protocols.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import (
  LMMS_LONG,
  LOADER,
  SHORT,
  Benchmark,
  Rules,
  numbered,
  settled,
)
from llava_sp_jax.tasks.scoring import HUMANS, vqa_accuracy, vqa_normal
from llava_sp_jax.tasks.task import Item

ASKED = "llava_textvqa_val_v051_ocr.jsonl"
TRUTHS = "TextVQA_0.5.1_val.json"
OCR = "Reference OCR token:"


def asked(prompt: str) -> str:
  """Returns the question within a prompt of LLaVA's file.

  Knows three forms: two lines, of which the first is the question; three lines, with OCR tokens
  before or after the question; and "OCR tokens: ... Question: ... Short answer:" of old files.

  Raises: ValueError for any other form.
  """
  lines = prompt.split("\n")
  if prompt.startswith("OCR tokens: ") and "Question: " in prompt:
    return prompt.split("Question: ", 1)[1].split(" Short answer:")[0]
  if f"{OCR} " in prompt and len(lines) == 3:
    return lines[1] if prompt.startswith(OCR) else lines[0]
  if len(lines) == 2:
    return lines[0]
  raise ValueError(f"expected a question, {OCR!r} and a request in lines, found {prompt!r:.80}")


def without_ocr(row: dict[str, Any]) -> str:
  """Returns the question of a row and a request for a short answer, without OCR tokens."""
  return f"{row['asked']}\n{SHORT}"


def capitalized(row: dict[str, Any]) -> str:
  """Returns lmms-eval's prompt without OCR tokens: the question with a capital, then lower case."""
  return f"{row['truth']['question'].capitalize()}\n{SHORT}"


def capitalized_ocr(row: dict[str, Any]) -> str:
  """Returns lmms-eval's prompt with the annotation's OCR tokens."""
  given = row["truth"].get("ocr_tokens")
  tokens = ", ".join(map(str, given if isinstance(given, list) else ()))
  return f"{row['truth']['question'].capitalize()}\n{OCR} {tokens}\n{SHORT}"


def _answers(truth: dict[str, Any]) -> bool:
  match truth.get("answers"):
    case list(answers):
      return len(answers) >= HUMANS and all(isinstance(answer, str) for answer in answers)
  return False


def _key(image: Any, question: str) -> tuple[str, str]:
  return str(image), question.lower()


class TextVqa(Benchmark):
  """Implements TextVQA; finds ground truths by image and lower-cased question, like LLaVA."""

  name = "textvqa"
  homes = ("textvqa",)
  needed = (ASKED, TRUTHS)
  protocols: ClassVar = {
    "llava": Rules("with OCR tokens, VQA soft accuracy", LOADER),
    "llava_no_ocr": Rules("without OCR tokens, VQA soft accuracy", LOADER, prompt=without_ocr),
    "lmms": Rules("without OCR tokens, small letters after a capital, VQA soft accuracy", LMMS_LONG,
                  prompt=capitalized),
    "lmms_ocr": Rules("with the annotation's OCR tokens, small letters after a capital, VQA soft "
                      "accuracy", LMMS_LONG, prompt=capitalized_ocr),
  }  # fmt: skip

  def items(self) -> list[Item]:
    """Returns the questions, with the human answers as ground truths."""
    path = self.folder / TRUTHS
    truths, rows = self._truths(path), self.rows(ASKED)
    items = [self._item(row, key, truths) for row, key in zip(rows, numbered(rows), strict=True)]
    return settled(items, path)

  def _truths(self, path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads the annotations by image and question. Raises: BenchmarkError for another format."""
    match files.read_json(path):
      case {"data": list(data)}:
        found = [r for r in data if isinstance(r, dict) and isinstance(r.get("question"), str)]
        return {_key(row.get("image_id"), row["question"]): row for row in found}
    raise files.BenchmarkError(f"{path}: expected a list of annotations under data")

  def _item(
    self, row: dict[str, Any], key: str, truths: dict[tuple[str, str], dict[str, Any]]
  ) -> Item:
    question, problem = row["text"], ""
    try:
      question = asked(row["text"])
    except ValueError as error:
      problem = str(error)
    truth = truths.get(_key(row["question_id"], question), {})
    if not problem and not truth:
      problem = f"no annotation of this image and question in {TRUTHS}"
    if not problem and not _answers(truth):
      problem = f"no list of {HUMANS} or more human answers, but {truth.get('answers')!r:.80}"
    return Item(
      id=key,
      question=self.question({**row, "asked": question, "truth": {"question": question, **truth}}),
      images=(self.folder / "train_images" / row["image"],),
      kind=row.get("category", "default"),
      truth=truth.get("answers"),
      extra={"question_id": row["question_id"]},
      problem=problem,
    )

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns VQA's soft accuracy of an answer, from 0 to 1; `read` is the normalized answer."""
    return {"score": vqa_accuracy(text, item.truth), "read": vqa_normal(text)}
