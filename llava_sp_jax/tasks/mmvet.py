"""MM-Vet (scripts/v1_5/eval/mmvet.sh): GPT-4 grades answers, as a judge or on MM-Vet's server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

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
from llava_sp_jax.tasks.task import Item, Predictions, Scores, file_hash

ASKED = "llava-mm-vet.jsonl"
# Places of the extracted release: mm-vet.zip contains a folder mm-vet, LLaVA's script reads from
# mm-vet, and its docs/Evaluation.md names mmvet.
RELEASES = ("", "mm-vet/", "../mmvet/", "../mmvet/mm-vet/")
TRUTHS, IMAGES = (
  tuple(f"{place}{name}" for place in RELEASES) for name in ("mm-vet.json", "images")
)
SERVER = "MM-Vet's evaluator (huggingface.co/spaces/whyu/MM-Vet_Evaluator), or a judge"
REASON = (  # lmms-eval's pre_prompt
  "First please perform reasoning, and think step by step to provide best answer to the following "
  "question: \n\n"
)
_MEME = (
  "Can you explain this meme? | This meme is poking fun at the fact that the names of the "
  "countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its "
  "beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is "
  "saying that the person has trust issues because the names of these countries do not accurately "
  "represent their landscapes. | "
)
# The grader's prompt of MM-Vet (arXiv 2308.02490; mm-vet_evaluator.py of yuweihao/MM-Vet). Scores
# depend on its exact words. lmms-eval's differs in the head of the table.
PROMPT = (
  "Compare the ground truth and prediction from AI models, to give a correctness score for the "
  "prediction. <AND> in the ground truth means it is totally right only when all elements in the "
  "ground truth are present in the prediction, and <OR> means it is totally right when any one "
  "element in the ground truth is present in the prediction. The correctness score is 0.0 (totally "
  "wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the "
  "last space of the correctness score.\n"
  "{head} | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
  "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
  "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
  "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
  "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
  "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
  f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, "
  "Iceland is not very icy and Greenland isn't very green. | 0.4\n"
  f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's "
  "names. Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in "
  "ice and snow. The text 'This is why I have trust issues' is a playful way to suggest that these "
  "contradictions can lead to distrust or confusion. The humor in this meme is derived from the "
  "unexpected contrast between the names of the countries and their actual physical "
  "characteristics. | 1.0\n"
)


@dataclasses.dataclass(frozen=True)
class Grader:
  """Defines how a protocol asks the grader and reads its reviews."""

  head: str  # of the first column of the prompt's table
  end: str  # follows the prediction
  again: str  # follows `end` from the second attempt on
  temperatures: tuple[float, ...]  # of each attempt to get a grade
  max_tokens: int
  read: Callable[[str], str]  # prepares a review for `grade`


GRADERS = {
  "llava": Grader(
    "\nQuestion",
    " | ",
    "\nPredict the correctness of the answer (digit): ",
    (0.0, 0.0, 0.5, 1.0, 1.5),
    3,
    str,
  ),
  "lmms": Grader("gpt_query_prompt", " |", "", (0.0, 0.5, 1.0, 1.5), 128, str.strip),
}


def grade(review: str) -> float | None:
  """Returns the first word of a review as a number from 0 to 1; None for any other word."""
  value = plain_number(review.split(" ")[0])
  return value if value is not None and 0.0 <= value <= 1.0 else None


def _understood(truth: Any) -> TypeGuard[dict[str, Any]]:
  match truth:
    case {"question": str(), "answer": answer, "capability": list(names)}:
      return files.is_text(answer) and all(isinstance(name, str) for name in names)
  return False


class MmVet(Benchmark):
  """Implements MM-Vet; only a judge needs the ground truths (`mm-vet.json` of the release)."""

  name = "mmvet"
  homes = ("mm-vet", "mmvet")
  needed = (ASKED,)
  options = ("protocol", "judge", "reviews")
  protocols: ClassVar = {
    "llava": Rules("100 x the mean of the grader's scores from 0 to 1", LONG),
    "lmms": Rules(
      "as llava, with a request to reason before the question",
      LONG,
      prompt=lambda row: REASON + row["text"],
    ),
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
      judge: grades the answers; MM-Vet uses gpt-4-0613. None: there is no score.
      reviews: a file that caches the judge's replies (None: none).

    Raises: FileNotFoundError when files are missing; with a judge, also the ground truths.
    """
    super().__init__(folder, protocol)
    self._grader = GRADERS[protocol]
    self._judge = Reviews(judge, reviews) if judge else None
    self._truths = files.first_of(self.folder, TRUTHS)
    if judge and not self._truths:
      files.need(self.folder, TRUTHS[:1], "the judge compares with it; it is in MM-Vet's release")
    self.protocol += f"; judge {self._judge.name}" if self._judge else "; no judge"

  def items(self) -> list[Item]:
    """Returns the questions, with their ground truths if the file of those exists."""
    rows = self.rows(ASKED)
    truths = files.read_json(self._truths) if self._truths else {}
    images = files.first_of(self.folder, IMAGES) or self.folder / IMAGES[0]
    items = []
    for row in rows:
      given = truths.get(f"v1_{row['question_id']}")
      truth: dict[str, Any] = given if _understood(given) else {}
      items.append(
        Item(
          id=f"v1_{row['question_id']}",
          question=self.question(row),
          images=(images / row["image"],),
          kind="+".join(sorted(truth.get("capability", ["default"]))),
          truth=truth.get("answer"),
          extra={"asked": truth.get("question"), "capability": truth.get("capability", [])},
          problem=f"no truth that is understood in {self._truths.name}: {given!r:.80}"
          if self._truths and not truth
          else "",
        )
      )
    return settled(items, self._truths or self.folder / ASKED)

  def ask(self, item: Item, text: str, turn: int = 0) -> Ask:
    """Returns the request to grade the answer `text`; `turn` counts the attempts from 0."""
    how = self._grader
    truth = item.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{PROMPT.format(head=how.head)}\n{item.extra['asked']} | {truth} | {text}{how.end}"
    return Ask(
      prompt=prompt + (how.again if turn else ""),
      max_tokens=how.max_tokens,
      temperature=how.temperatures[turn],
      turn=turn,
    )

  def _grade(self, review: str) -> float | None:
    return grade(self._grader.read(review))

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the mean of the grades in percent, overall and by kind.

    `figures` has the means by capability, all reviews, and the hash of the file of ground truths.
    An answer without a grade after all attempts counts as `unjudged` (in the original as 0.0).
    """
    if not self._judge:
      return served(items, predictions, SERVER)
    reviews: list[dict[str, Any]] = []
    grades: dict[str, float] = {}
    for item, text in answered(items, predictions):
      for turn in range(len(self._grader.temperatures)):
        review = self._judge(self.ask(item, text, turn), self._grade)
        value = None if review.error else self._grade(review.text)
        reviews.append({"id": item.id, "score": value, "text": review.text, "error": review.error})
        if value is not None:
          grades[item.id] = value
        if value is not None or review.error:  # a failed call was repeated by the endpoint already
          break
    groups: dict[str, list[Item]] = {"all": items}
    capabilities = sorted({c for item in items for c in item.extra["capability"]})
    for kind in sorted({item.kind for item in items} - {"all"}):
      groups[kind] = [item for item in items if item.kind == kind]
    tables = {
      name: {"score": 100 * ratio(sum(got), len(got)), "items": len(got), "asked": len(members)}
      for name, members in groups.items()
      if (got := [grades[i.id] for i in members if i.id in grades]) is not None
    }
    figures: dict[str, Any] = {}
    for name in capabilities:
      got = [grades[i.id] for i in items if name in i.extra["capability"] and i.id in grades]
      figures[f"capability {name}"] = {"score": 100 * ratio(sum(got), len(got)), "items": len(got)}
    unjudged = len(answered(items, predictions)) - len(grades)
    figures |= {"unjudged": unjudged, "judge": self._judge.name, "reviews": reviews}
    if self._truths:
      figures["truths_hash"] = file_hash(self._truths)
    verdicts = {key: {"score": value} for key, value in grades.items()}
    return judged(tables["all"]["score"], "mean grade, %", tables, figures, verdicts)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `mmvet_answers.json`: {"v1_<id>": answer}, as scripts/convert_mmvet_for_eval.py does.

    Writes "" for a missing answer, since MM-Vet's evaluator needs an answer to each question.
    """
    rows = {item.id: text for item, text in texts(items, predictions)}
    return [files.write_json(folder / "mmvet_answers.json", rows, indent=2)]
