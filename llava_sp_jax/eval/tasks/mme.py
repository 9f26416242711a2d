"""MME (scripts/v1_5/eval/mme.sh): yes or no, two questions an image; accuracy and accuracy+."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.eval import files
from llava_sp_jax.eval.benchmark import (
  LMMS_SHORT,
  LOADER,
  SHORT,
  Benchmark,
  Rules,
  answered,
  numbered,
  ratio,
  settled,
  texts,
)
from llava_sp_jax.eval.scoring import mme_answer, mme_answer_lmms
from llava_sp_jax.eval.task import Item, Predictions, Scores

ASKED = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
POINTS = 200  # of a subtask
YES_NO = " Please answer yes or no."
PARTS = {
  "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                 "landmark", "artwork", "OCR"),
  "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                "code_reasoning"),
}  # fmt: skip


class Mme(Benchmark):
  """Truths are the release's own text files, found by image and question as LLaVA's
  convert_answer_to_mme.py finds them."""

  name = "mme"
  homes = ("MME",)
  needed = (ASKED, RELEASE)
  protocols: ClassVar = {
    "llava": Rules("yes or no within the first four letters; subtask score = accuracy + accuracy+ "
                   "(both questions of an image), in %", LOADER, mme_answer),
    "lmms": Rules("as llava; stripped, without periods, y and n count, at most 16 tokens",
                  LMMS_SHORT, mme_answer_lmms, lambda row: row["text"].replace(YES_NO, "")),
  }  # fmt: skip

  def _answers(self) -> list[Path]:
    """Text files of questions and answers: beside the images, or in a folder of their own."""
    root = self.folder / RELEASE
    return sorted([*root.glob("*/questions_answers_YN/*.txt"), *root.glob("*/*.txt")])

  def hashed(self) -> list[Path]:
    return [self.folder / ASKED, *self._answers()]

  def items(self) -> list[Item]:
    truths: dict[tuple[str, str, str], str] = {}
    strange: dict[tuple[str, str], str] = {}  # (category, image's stem): what is not understood
    problems = []
    for path in self._answers():
      category = path.relative_to(self.folder / RELEASE).parts[0]
      for line in files.read_text(path).strip().split("\n"):
        question, tab, answer = line.strip().partition("\t")
        if not tab or answer.lower() not in ("yes", "no"):
          said = f"expected a question, a tab and Yes or No, found {line!r:.80}"
          strange[category, path.stem] = f"{path.name}: {said}"
        truths[category, path.stem, question] = answer
    rows, items = self.rows(ASKED), []
    for row, key in zip(rows, numbered(rows), strict=True):
      category, name = row["question_id"].split("/")[0], row["question_id"].split("/")[-1]
      plain = row["text"].replace(SHORT, "").strip()
      forms = (plain,) if YES_NO.strip() in plain else (plain + YES_NO, f"{plain} {YES_NO}")
      stem = name.split(".")[0]
      found = [form for form in forms if (category, stem, form) in truths]
      problem = strange.get((category, stem), "")  # of one question: the pair cannot be scored
      if not found and problem:
        found = [forms[0]]
      if not found:
        problems.append(f"{ASKED}: {key}: no answer to {forms[0]!r} in {RELEASE}/{category}")
        continue
      items.append(
        Item(
          id=key,
          question=self.question(row),
          images=(self.folder / RELEASE / row["image"],),
          kind=category,
          truth=truths.get((category, stem, found[0]), ""),
          extra={"pair": row["question_id"], "file": f"{stem}.txt", "line": found[0]},
          problem=problem,
        )
      )
    if problems:
      raise files.BenchmarkError(
        f"{self.folder}: {len(problems)} problems: {'; '.join(problems[: files.SHOWN])}. "
        "Fetch the release and LLaVA's eval.zip again."
      )
    return settled(items, self.folder / RELEASE)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    read = self.rules.read(text)
    return {"score": float(read == item.truth.lower()), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Headline: perception (of 2000), the sum of its subtasks' scores; cognition (of 800) and the
    total are figures. Pairs belong together by their image; a pair of which one answer is missing
    is not right (the original needs all answers, in order)."""
    by_kind: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({item.kind for item in items})):
      mine = [item for item in items if kind in ("all", item.kind)]
      right: dict[str, list[float]] = {}
      for item, text in answered(mine, predictions):
        right.setdefault(item.extra["pair"], []).append(self.verdict(item, text)["score"])
      count = sum(map(len, right.values()))
      accuracy = ratio(sum(map(sum, right.values())), count)
      plus = ratio(sum(sum(pair) == 2 for pair in right.values()), len(right))
      by_kind[kind] = {
        "accuracy": accuracy, "accuracy_plus": plus, "score": 100 * accuracy + 100 * plus,
        "items": count, "asked": len(mine),
      }  # fmt: skip
    parts = {
      part: sum(by_kind[kind]["score"] for kind in kinds if kind in by_kind)
      for part, kinds in PARTS.items()
    }
    figures = {**parts, "total": sum(parts.values())}
    most = POINTS * sum(kind in by_kind for kind in PARTS["perception"])  # 2000 for all of them
    return Scores(parts["perception"], f"perception score (of {most})", by_kind, figures)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """`mme/<subtask>.txt` for the official calculation.py: file, question, truth, answer by tabs;
    blanks for tabs and line ends within an answer, which its reader would stumble on; "" where there
    is none, since it takes lines two by two."""
    lines: dict[str, list[str]] = {}
    for item, text in texts(items, predictions):
      fields = (item.extra["file"], item.extra["line"], item.truth, " ".join(text.split()))
      lines.setdefault(item.kind, []).append("\t".join(fields) + "\n")
    (folder / "mme").mkdir(parents=True, exist_ok=True)
    for kind, rows in lines.items():
      (folder / "mme" / f"{kind}.txt").write_text("".join(rows), encoding="utf-8")
    return [folder / "mme" / f"{kind}.txt" for kind in lines]
