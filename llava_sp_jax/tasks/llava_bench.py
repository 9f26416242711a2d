"""LLaVA-Bench in the wild (scripts/v1_5/eval/llavabench.sh): a judge compares with GPT-4."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import (
  LONG,
  Benchmark,
  Rules,
  answered,
  judged,
  ratio,
  served,
  settled,
  texts,
)
from llava_sp_jax.tasks.judge import Ask, Judge, Reviews
from llava_sp_jax.tasks.scoring import plain_number
from llava_sp_jax.tasks.task import Item, Predictions, Scores

ASKED, CONTEXT, REFERENCE = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"
CATEGORIES = ("conv", "detail", "complex")
BEST = 10.0  # the highest score that the rule allows
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
# The rule of llava/eval/table/rule.json, equal for the three categories. Scores depend on its exact
# words.
RULE = (
  "We would like to request your feedback on the performance of two AI assistants in response to "
  "the user question displayed above. The user asks the question on observing an image. For your "
  "reference, the visual content in the image is represented with a few sentences describing the "
  "image. \nPlease rate the helpfulness, relevance, accuracy, level of details of their responses. "
  "Each assistant receives an overall score on a scale of 1 to 10, where a higher score indicates "
  "better overall performance.\nPlease first output a single line containing only two values "
  "indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a "
  "space.\nIn the subsequent line, please provide a comprehensive explanation of your evaluation, "
  "avoiding any potential bias and ensuring that the order in which the responses were presented "
  "does not affect your judgment."
)


def pair(review: str) -> tuple[float, float] | None:
  """Returns the two scores, from 0 to 10, in the first line of a review; None for any other text.

  Spaces or commas separate the scores.
  """
  scores = [plain_number(word) for word in review.split("\n")[0].replace(",", " ").split(" ")]
  match scores:
    case [float(first), float(second)] if 0 <= first <= BEST and 0 <= second <= BEST:
      return first, second
  return None


class LlavaBench(Benchmark):
  """Implements LLaVA-Bench; without a judge there is no score, and only the answers are written."""

  name = "llava_bench"
  homes = ("llava-bench-in-the-wild",)
  needed = (ASKED, CONTEXT, REFERENCE)
  options = ("protocol", "judge", "reviews")
  protocols: ClassVar = {
    "llava": Rules("100 x the mean of the judge's scores / the mean of GPT-4's answers'", LONG)
  }

  def __init__(
    self,
    folder: str | Path,
    protocol: str = "llava",
    judge: Judge | None = None,
    reviews: str | Path | None = None,
  ):
    """Finds the files of the benchmark.

    Args:
      folder: the folder of the benchmark, or a root above it.
      protocol: a name of `protocols`.
      judge: grades the answers; LLaVA uses gpt-4-0314 or later. None: there is no score.
      reviews: a file that caches the judge's replies (None: none).
    """
    super().__init__(folder, protocol)
    self._judge = Reviews(judge, reviews) if judge else None
    self.protocol += f"; judge {self._judge.name}" if self._judge else "; no judge"

  def items(self) -> list[Item]:
    """Returns the questions, with GPT-4's answers as ground truths and captions for the judge."""
    captions = {str(r.get("image")): r.get("caption") for r in self._truths(CONTEXT)}
    reference = {str(r.get("question_id")): r.get("text") for r in self._truths(REFERENCE)}
    rows = self.rows(ASKED, ("question_id", "image", "text", "category"))
    items = []
    for row in rows:
      caption = _joined(captions.get(row["image"]))
      truth = reference.get(str(row["question_id"]))
      problems = (
        (
          ""
          if files.is_text(truth)
          else f"no answer that is understood in {REFERENCE}: {truth!r:.40}"
        ),
        ("" if caption.strip() else f"no caption of the image {row['image']} in {CONTEXT}"),
        (
          ""
          if row["category"] in CATEGORIES
          else f"the category {row['category']!r:.40} is none of {', '.join(CATEGORIES)}"
        ),
      )
      items.append(
        Item(
          id=str(row["question_id"]),
          question=row["text"],
          images=(self.folder / "images" / row["image"],),
          kind=row["category"],
          truth=truth,
          extra={"question_id": row["question_id"], "caption": caption},
          problem="; ".join(filter(None, problems)),
        )
      )
    return settled(items, self.folder / ASKED)

  def _truths(self, name: str) -> list[dict[str, Any]]:
    return files.read_truths(self.folder / name)

  def ask(self, item: Item, text: str) -> Ask:
    """Returns the request of LLaVA's eval_gpt_review_bench.py to grade the answer `text`."""
    prompt = (
      f"[Context]\n{item.extra['caption']}\n\n[Question]\n{item.question}\n\n"
      f"[Assistant 1]\n{item.truth}\n\n[End of Assistant 1]\n\n"
      f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )
    return Ask(prompt=prompt, system=SYSTEM, max_tokens=1024, temperature=0.2)

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the ratio of the mean scores of the model and of GPT-4, in percent.

    Rounds as summarize_gpt_review.py does: the means to three decimals, then the ratio to one. A
    review that failed or does not hold two scores counts as `unjudged` (in the original as -1 for
    both). The verdict on a single answer is its score divided by that of GPT-4's answer, at most 1.
    """
    if not self._judge:
      return served(items, predictions, "a judge: give one to have a score")
    pairs: dict[str, list[tuple[float, float]]] = {}
    reviews: list[dict[str, Any]] = []
    verdicts = {}
    for item, text in answered(items, predictions):
      review = self._judge(self.ask(item, text), pair)
      scores = None if review.error else pair(review.text)
      if scores:
        pairs.setdefault("all", []).append(scores)
        pairs.setdefault(item.kind, []).append(scores)
        verdicts[item.id] = {"score": min(1.0, ratio(scores[1], scores[0])), "judged": scores}
      reviews.append({"id": item.id, "scores": scores, "text": review.text, "error": review.error})
    by_kind = {}
    for kind in ("all", *sorted({item.kind for item in items})):
      graded = pairs.get(kind, [])
      first, second = (round(ratio(sum(p[i] for p in graded), len(graded)), 3) for i in (0, 1))
      asked = sum(kind in ("all", item.kind) for item in items)
      by_kind[kind] = {
        "score": round(ratio(second, first) * 100, 1),
        "reference": first,
        "model": second,
        "items": len(graded),
        "asked": asked,
      }
    unjudged = sum(review["scores"] is None for review in reviews)
    figures = {"unjudged": unjudged, "judge": self._judge.name, "reviews": reviews}
    metric = "score relative to GPT-4's answers, %"
    return judged(by_kind["all"]["score"], metric, by_kind, figures, verdicts)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `llava_bench_answers.jsonl` for LLaVA's review script.

    Writes "" for a missing answer, since the script matches questions and answers by line.
    """
    rows = (
      {
        "question_id": i.extra["question_id"],
        "prompt": i.question,
        "text": text,
        "answer_id": i.id,
        "model_id": "llava_sp_jax",
        "metadata": {},
      }
      for i, text in texts(items, predictions)
    )
    return [files.write_lines(folder / "llava_bench_answers.jsonl", rows)]


def _joined(caption: Any) -> str:
  """Returns a caption, or a list of its lines, as one text; "" for anything else."""
  lines = caption if isinstance(caption, list) else [caption]
  return "\n".join(lines) if all(isinstance(line, str) for line in lines) else ""
