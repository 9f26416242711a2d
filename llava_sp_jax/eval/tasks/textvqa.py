"""TextVQA, validation (scripts/v1_5/eval/textvqa.sh): soft accuracy, with or without OCR tokens.

With the OCR tokens of LLaVA's file in the prompt, LLaVA-1.5 scores some 13 points higher than
without: the two are protocols of their own.
"""

from __future__ import annotations

from typing import Any, ClassVar

from llava_sp_jax.eval import files
from llava_sp_jax.eval.benchmark import (
  LMMS_LONG,
  LOADER,
  SHORT,
  Benchmark,
  Rules,
  numbered,
  settled,
)
from llava_sp_jax.eval.scoring import vqa_accuracy, vqa_normal
from llava_sp_jax.eval.task import Item

ASKED = "llava_textvqa_val_v051_ocr.jsonl"
TRUTHS = "TextVQA_0.5.1_val.json"
OCR = "Reference OCR token:"


def asked(prompt: str) -> str:
  """The question within a prompt of LLaVA's file. Raises: ValueError for another form.

  Two lines: the question first; three lines with the OCR tokens in one: the question is the first,
  or the second after leading tokens; "OCR tokens: ... Question: ... Short answer:" of old files.
  """
  lines = prompt.split("\n")
  if prompt.startswith("OCR tokens: ") and "Question: " in prompt:
    return prompt.split("Question: ", 1)[1].split(" Short answer:")[0]
  if f"{OCR} " in prompt and len(lines) == 3:
    return lines[1] if prompt.startswith(OCR) else lines[0]
  if len(lines) == 2:
    return lines[0]
  raise ValueError(f"expected a question, {OCR!r} and a request in lines, found {prompt!r}")


def without_ocr(row: dict[str, Any]) -> str:
  return f"{asked(row['text'])}\n{SHORT}"


def capitalised(row: dict[str, Any]) -> str:
  return f"{row['truth']['question'].capitalize()}\n{SHORT}"


def capitalised_ocr(row: dict[str, Any]) -> str:
  tokens = ", ".join(row["truth"].get("ocr_tokens", ()))
  return f"{row['truth']['question'].capitalize()}\n{OCR} {tokens}\n{SHORT}"


def _answers(row: dict[str, Any]) -> bool:
  match row["answers"]:
    case [str(), *others]:
      return all(isinstance(other, str) for other in others)
  return False


class TextVqa(Benchmark):
  """An answer is matched to its truth by image and question in small letters, as LLaVA does."""

  name = "textvqa"
  homes = ("textvqa",)
  needed = (ASKED, TRUTHS)
  protocols: ClassVar = {
    "llava": Rules("with OCR tokens, VQA soft accuracy", LOADER),
    "llava_no_ocr": Rules("without OCR tokens, VQA soft accuracy", LOADER, prompt=without_ocr),
    "lmms": Rules("without OCR tokens, small letters after a capital, VQA soft accuracy", LMMS_LONG,
                  prompt=capitalised),
    "lmms_ocr": Rules("with the annotation's OCR tokens, small letters after a capital, VQA soft "
                      "accuracy", LMMS_LONG, prompt=capitalised_ocr),
  }  # fmt: skip

  def items(self) -> list[Item]:
    path = self.folder / TRUTHS
    data = files.read_json(path).get("data", [])
    files.check_rows(
      path, ((f"data[{i}]", row) for i, row in enumerate(data)), ("image_id", "question", "answers")
    )
    truths = {(row["image_id"], row["question"].lower()): row for row in data}
    rows, items, problems = self.rows(ASKED), [], []
    for row, key in zip(rows, numbered(rows), strict=True):
      try:
        truth = truths[row["question_id"], asked(row["text"]).lower()]
      except (KeyError, ValueError) as error:
        problems.append(f"{key}: {error}")
        continue
      items.append(
        Item(
          id=key,
          question=self.question({**row, "truth": truth}),
          images=(self.folder / "train_images" / row["image"],),
          kind=row.get("category", "default"),
          truth=truth["answers"],
          extra={"question_id": row["question_id"]},
          problem=""
          if _answers(truth)
          else f"no list of human answers, but {truth['answers']!r:.80}",
        )
      )
    if problems:
      raise files.BenchmarkError(
        f"{self.folder / ASKED}: {len(problems)} questions have no annotation in {path.name}: "
        f"{'; '.join(problems[: files.SHOWN])}. Fetch both files again."
      )
    return settled(items, path)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    return {"score": vqa_accuracy(text, item.truth), "read": vqa_normal(text)}
