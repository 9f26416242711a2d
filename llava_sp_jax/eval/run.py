"""Runs a task through the engine: writes predictions as they arrive, then scores and a page."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import storage
from llava_sp_jax.eval import identity
from llava_sp_jax.infer.engine import Answer, Engine, Request
from llava_sp_jax.progress import Progress
from llava_sp_jax.results import compare as compare_lib
from llava_sp_jax.results import interval, page, predictions
from llava_sp_jax.results import scores as scores_lib
from llava_sp_jax.results.predictions import Part, Record
from llava_sp_jax.results.scores import BenchmarkScores, Unscored
from llava_sp_jax.tasks.task import EvalError, Item, Scores, Task

SUBMISSION = "submission"  # the folder of files for an official server


@dataclasses.dataclass(frozen=True)
class Unfinished:
  """Counts the answers of a benchmark while those of other parts are missing."""

  part: str  # the part that is done, such as 0/2
  answered: int  # questions with an answer, or a failure, in the result folder
  missing: int  # questions that other parts have to ask


def run(
  task: Task,
  engine: Engine,
  out: str | Path,
  limit: int = 0,
  model: identity.ModelIdentity | None = None,
  part: Part | None = None,
  retry: bool = False,
  compare: str | Path = "",
  each: Callable[[Record], None] | None = None,
) -> BenchmarkScores | Unfinished:
  """Answers every item, and writes `predictions.jsonl`, `scores.json` and `index.html` to `out`.

  Does not ask items again that `out` has answers to. An item without an answer (e.g. its image
  cannot be read) is counted in `failures`; scores state the number of answers that they are taken
  over.

  Args:
    task: the benchmark.
    engine: answers the questions.
    out: the result folder.
    limit: asks only the first `limit` items (0: all).
    model: identifies the model in the results (None: that of the engine).
    part: the share of this process (None: `Part(process, processes)`).
    retry: asks items again whose answer failed, e.g. after missing images were restored.
    compare: the result folder of another run on the same data, with which the page compares ("":
      none).
    each: called with every line of predictions.jsonl after it is written (None: prints progress).

  Returns: the scores, or Unfinished while answers of other parts are missing.
  Raises: EvalError for a `limit` below 0, an `out` with answers of other settings, a `compare` that
    is not a result on this data, or a package that is missing.
  """
  if compare:
    compare_lib.check(identity.asked(task), storage.place(compare))
  unfinished = ask(task, engine, out, limit, model, part, retry, each)
  return unfinished or finish(task, out, limit, compare)


def ask(
  task: Task,
  engine: Engine,
  out: str | Path,
  limit: int = 0,
  model: identity.ModelIdentity | None = None,
  part: Part | None = None,
  retry: bool = False,
  each: Callable[[Record], None] | None = None,
) -> Unfinished | None:
  """Answers the items of a part, and writes `predictions.jsonl`; `finish` scores them.

  The arguments are those of `run`.

  Returns: None when all items have an answer or a failure, Unfinished while other parts lack some.
  Raises: EvalError for a `limit` below 0, an `out` with answers of other settings, or a package
    that is missing.
  """
  if limit < 0:
    raise EvalError(f"limit: expected 0 (all questions) or more, found {limit}")
  check(task)
  folder = storage.place(out)
  part = part or Part(jax.process_index(), jax.process_count())
  model = model or identity.ModelIdentity.of(engine.pretrained)
  about = {"checkpoint": model.checkpoint, "step": model.step}
  predictions.check_settings(folder, identity.settings(task, engine, model), about)
  items = questions(task)[: limit or None]
  places = {item.id: place for place, item in enumerate(items)}
  found = predictions.read(folder)
  pending = [
    item
    for item in part.choose(items)
    if item.id not in found or (retry and found[item.id]["error"])
  ]
  if len(pending) < len(items) and found:
    print(f"{folder}: {len(found)} questions are answered already", flush=True)
  if retry:
    engine.forget()  # the engine remembers images that it could not read
  with predictions.PredictionWriter(folder, part) as writer:
    started, before = time.monotonic(), counts(engine)
    _ask(task, engine, pending, places, writer, each or Scored(len(pending)))
    session = {
      "part": str(part),
      "asked": len(pending),
      "seconds": time.monotonic() - started,
      "engine": {k: n - before[k] for k, n in counts(engine).items()},
    }
    predictions.append(folder / part.named("sessions"), session)
  missing = len(_missing(items, predictions.read(folder)))
  return Unfinished(str(part), len(items) - missing, missing) if missing else None


def check(task: Task, compare: str | Path = "") -> None:
  """Checks, before questions are asked, what scoring will need afterwards.

  Raises: EvalError for a `compare` that is not a result on this data, or a package that is missing.
  """
  if compare:
    compare_lib.check(identity.asked(task), storage.place(compare))
  try:
    getattr(task, "check_submission", lambda: None)()  # an optional member
  except ModuleNotFoundError as error:
    raise EvalError(str(error)) from None


def questions(task: Task) -> list[Item]:
  """Returns the items of a task. Raises: EvalError when an id is not a text, or two are equal."""
  items = task.items()
  counts = Counter(item.id if isinstance(item.id, str) else repr(item.id) for item in items)
  odd = [key for key, count in counts.items() if count > 1]
  odd += [repr(item.id) for item in items if not isinstance(item.id, str)]
  if odd:
    raise EvalError(
      f"{task.name}: ids that are not texts, or appear more than once: "
      f"{', '.join(odd[:3])}; an answer is found by its item's id"
    )
  return items


def counts(engine: Engine) -> dict[str, int]:
  """Returns {name: count} of what an engine has done since it was made (`infer.counts.Counts`)."""
  return dataclasses.asdict(engine.counts)


def _ask(
  task: Task,
  engine: Engine,
  items: Sequence[Item],
  places: Mapping[str, int],
  writer: predictions.PredictionWriter,
  each: Callable[[Record], None],
) -> None:
  """Asks items, and writes their answers as they arrive.

  `places` maps an item's id to its index among all items. It seeds the sampling of an answer, so
  that a part or a resumed run samples the same.
  """
  requests = (Request(item.question, item.images, number=places[item.id]) for item in items)
  answers: Any = engine.as_ready(requests)
  with contextlib.closing(answers):  # stops the engine's threads on an error
    for index, answer in answers:
      line = record(task, items[index], answer)
      writer.write(line)
      each(line)


def record(task: Task, item: Item, answer: Answer) -> Record:
  """Returns the line of predictions.jsonl for an answer, with the task's verdict on it."""
  return {
    "id": item.id,
    "question": item.question,
    "images": list(predictions.image_names(item)),
    "kind": item.kind,
    "truth": item.truth,
    "text": answer.text,
    "error": answer.error,
    "margin": round(answer.margin, 4) if math.isfinite(answer.margin) else None,
    "verdict": {} if answer.error else _verdict(task, item, answer.text),
  }


def _verdict(task: Task, item: Item, text: str) -> dict[str, Any]:
  """Returns the task's verdict on an answer, or `problem`: why the item cannot be scored."""
  return {"problem": item.problem} if item.problem else task.verdict(item, text)


class Scored:
  """Prints progress: how many questions are answered, and the mean score so far."""

  def __init__(self, total: int):
    """Starts at 0 of `total` questions."""
    self._progress = Progress(total, "questions")
    self._failed = self._judged = 0
    self._sum = 0.0

  def __call__(self, line: Record) -> None:
    self._failed += bool(line["error"])
    if "score" in line["verdict"]:
      self._judged += 1
      self._sum += line["verdict"]["score"]
    mean = [f"mean score {self._sum / self._judged:.4f}"] if self._judged else []
    failed = [f"{self._failed} failed"] if self._failed else []
    last = self._progress.done + 1 == self._progress.total
    self._progress.add(1, "  ".join(mean + failed), last)


def _missing(items: Sequence[Item], records: Mapping[str, Record]) -> list[str]:
  return [item.id for item in items if item.id not in records]


def finish(
  task: Task, out: str | Path, limit: int = 0, compare: str | Path = ""
) -> BenchmarkScores:
  """Merges the answers of all parts in `out`, scores them, and writes scores.json and index.html.

  `limit` is that of `ask`. `compare` is the result folder of another run ("": none).

  Raises: EvalError when questions were not asked yet, or the folder is of another task.
  """
  folder = storage.place(out)
  saved = predictions.read_settings(folder)
  _same_task(task, folder, saved["settings"])
  everything = questions(task)
  items = everything[: limit or None]
  with predictions.locked(folder):
    records = predictions.read(folder)
    if missing := _missing(items, records):
      raise EvalError(
        f"{folder}: {len(missing)} of {len(items)} questions were not asked yet "
        f"({', '.join(missing[:3])}, ...); run the parts that are missing, then merge again"
      )
    result = task.score(items, predictions.as_predictions(records[i.id] for i in items))
    result = _without_empty_headline(result)
    chosen = [_updated(task, item, records[item.id], result) for item in items]
    predictions.put_in_order(folder, everything, records | {r["id"]: r for r in chosen})
    flips = compare_lib.compare(folder, storage.place(compare)) if compare else None
    scores = _score(task, folder, items, chosen, result, saved, len(everything), flips)
    scores_lib.write(folder / scores_lib.FILE, scores)
    page.write(folder, scores, chosen, {item.id: item.images for item in items}, flips)
  return scores


def _without_empty_headline(result: Scores) -> Scores:
  """Removes the headline if nothing was scored: 0.0 over no answers is not a result."""
  total = result.by_kind["all"]
  if result.headline is None or total["items"]:
    return result
  why = f"no score: none of {total['asked']} questions has an answer that can be scored"
  return dataclasses.replace(result, headline=None, metric=why)


def _same_task(task: Task, folder: Path, there: Mapping[str, Any]) -> None:
  lines = [
    f"{k}: {v!r} here, {there.get(k)!r} there"
    for k, v in identity.asked(task).items()
    if v != there.get(k)
  ]
  if lines:
    raise EvalError(f"{folder} holds answers to another task: " + "; ".join(lines))


def _updated(task: Task, item: Item, record: Record, result: Scores) -> Record:
  """Updates kind, ground truth and verdict of a record, which may be newer than the answer."""
  verdict = {} if record["error"] else _verdict(task, item, record["text"])
  verdict |= result.verdicts.get(item.id, {})
  return {**record, "kind": item.kind, "truth": item.truth, "verdict": verdict}


def _score(
  task: Task,
  folder: Path,
  items: list[Item],
  records: list[Record],
  result: Scores,
  saved: Mapping[str, Any],
  whole: int,
  flips: compare_lib.Flips | None,
) -> BenchmarkScores:
  """Returns the scores of answers; `whole` is the number of all questions of the task."""
  answers = predictions.as_predictions(records)
  judged = [r for r in records if not r["error"] and "score" in r["verdict"]]
  sessions, torn = predictions.read_sessions(folder)
  engine: Counter[str] = Counter()
  for session in sessions:
    engine.update(session["engine"])
  store, upload = storage.of(folder), folder / SUBMISSION
  store.make(upload)
  made = store.scratch(upload)
  try:
    files = task.submission(items, answers, made)
  except ModuleNotFoundError as error:  # the answers are on disk already
    raise EvalError(f"{error}; then the same command, or --merge, scores them") from None
  store.upload(made, upload)
  if not files:
    made.rmdir()
  asked_with = saved["settings"]
  return BenchmarkScores(
    task=task.name,
    protocol=task.protocol,
    variant=getattr(task, "variant", {}),
    headline=result.headline,
    metric=result.metric,
    by_kind=result.by_kind,
    figures=result.figures,
    interval=interval.bootstrap(
      [float(r["verdict"]["score"]) for r in judged],
      [" ".join(r["images"]) or r["id"] for r in judged],
    ),
    asked=len(records),
    answered=sum(not r["error"] for r in records),
    failures=tuple(Unscored(r["id"], r["error"]) for r in records if r["error"]),
    left_out=tuple(Unscored(item.id, item.problem) for item in items if item.problem),
    checkpoint=saved["about"].get("checkpoint"),
    step=saved["about"].get("step"),
    data_hash=asked_with["data_hash"],
    **{name: asked_with.get(name) for name in scores_lib.SETTINGS},
    engine={**engine, **_ratio(engine)},
    sessions=len(sessions),
    sessions_damaged=torn or None,
    seconds=round(math.fsum(session["seconds"] for session in sessions), 1),
    submission=tuple(f"{SUBMISSION}/{path.relative_to(made)}" for path in files),
    questions=whole,
    compared=flips.counts() if flips else None,
  )


def _ratio(engine: Mapping[str, int]) -> dict[str, float]:
  """Returns encoder calls for each distinct image: 1 if none is encoded twice."""
  with contextlib.suppress(KeyError, ZeroDivisionError):
    return {"encoder_calls_per_image": engine["encoder_calls"] / engine["distinct_images"]}
  return {}
