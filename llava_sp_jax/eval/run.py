"""Runs a task through the engine: predictions as they come, then scores and a page to look at."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from llava_sp_jax import __version__
from llava_sp_jax.checkpoints import fingerprints
from llava_sp_jax.infer.engine import Answer, Engine, Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.progress import Progress
from llava_sp_jax.results import compare as compare_lib
from llava_sp_jax.results import interval, page, predictions
from llava_sp_jax.results.predictions import Part, Record
from llava_sp_jax.tasks.task import EvalError, Item, Scores, Task

SCORES, SUBMISSION = "scores.json", "submission"

# Of `config.data`: what a question and its pictures become before the model reads them.
INPUTS = (
  "template", "image_aspect", "image_fit", "image_resample", "grid_pinpoints", "patch_merge",
  "image_mean", "image_std",
)  # fmt: skip
# Of `config.model`: how fast it computes, or what only training reads; all else decides answers.
NO_MATTER = ("frozen_dtype", "scan_unroll", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
  """Which model answered: its folder, its step, a hash of all that was loaded, and its settings."""

  checkpoint: str
  step: int
  base: str  # fingerprint of the frozen base, as the run keeps it
  loaded: str  # fingerprint of every parameter as it computes: frozen base and trained part
  # What it makes of a question beside its parameters: {"inputs", "model"}, JSON-able.
  reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, pretrained: Pretrained, folder: str = "") -> ModelIdentity:
    with jax.default_device(_host()):  # a whole stack of layers may not fit beside a model
      loaded = fingerprints.fingerprint(flatten_dict(pretrained.params, sep="/"))
    return cls(folder, pretrained.step, pretrained.fingerprint, loaded, reads(pretrained))


def reads(pretrained: Pretrained) -> dict[str, Any]:
  """`inputs` (template, tokenizer, pictures) and `model` (sizes, dtype) that answers depend on."""
  config, model = pretrained.config, dataclasses.asdict(pretrained.config.model)
  return {
    "inputs": {
      **{name: getattr(config.data, name) for name in INPUTS},
      "tokenizer": pretrained.tokenizer.fingerprint()[:16],
    },
    "model": {name: value for name, value in model.items() if name not in NO_MATTER},
  }


def _host() -> Any:
  """The CPU as a device, where JAX was not told to leave it out."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None


def run(
  task: Task,
  engine: Engine,
  out: str | Path,
  limit: int = 0,
  model: ModelIdentity | None = None,
  part: Part | None = None,
  retry: bool = False,
  compare: str | Path = "",
  each: Callable[[Record], None] | None = None,
) -> dict[str, Any]:
  """Answers every item, writes `predictions.jsonl`, `scores.json` and `index.html` in `out`.

  What `out` already answers is not asked again. An item without an answer (an image that cannot be
  read) is counted in `failures`, and scores say over how many answers they were taken.

  Args:
    limit: only the first so many items; 0 for all.
    model: what scores say of the model; from the engine's own when not given.
    part: the share of this process; `Part(process, processes)` when not given.
    retry: asks again what has no answer, as after images were put back.
    compare: the result folder of another run on the same data; the page shows what flipped.
    each: called with every line of predictions.jsonl when it is written; prints progress if not given.

  Returns: the scores; `{"part", "answered", "missing"}` while other parts are not there yet.
  Raises: EvalError for a `limit` below 0, when `out` holds answers made with other settings, and
    see `check`.
  """
  if limit < 0:
    raise EvalError(f"limit: expected 0 (all questions) or more, found {limit}")
  check(task, compare)
  folder = Path(out)
  part = part or Part(jax.process_index(), jax.process_count())
  model = model or ModelIdentity.of(engine.pretrained)
  about = {"checkpoint": model.checkpoint, "step": model.step}
  predictions.check_settings(folder, settings(task, engine, model), about)
  items = questions(task)[: limit or None]
  places = {item.id: place for place, item in enumerate(items)}
  found = predictions.read(folder)
  mine = [
    item
    for item in part.choose(items)
    if item.id not in found or (retry and found[item.id]["error"])
  ]
  if len(mine) < len(items) and found:
    print(f"{folder}: {len(found)} questions are answered already", flush=True)
  if retry:
    engine.forget()  # it would remember which images it could not read
  with predictions.PredictionWriter(folder, part) as writer:
    started, before = time.monotonic(), counts(engine)
    _ask(task, engine, mine, places, writer, each or Scored(len(mine)))
    session = {
      "part": str(part),
      "asked": len(mine),
      "seconds": time.monotonic() - started,
      "engine": {k: n - before[k] for k, n in counts(engine).items()},
    }
    predictions.append(folder / part.named("sessions"), session)
  missing = len(_missing(items, predictions.read(folder)))
  if missing:
    return {"part": str(part), "answered": len(items) - missing, "missing": missing}
  return finish(task, folder, limit, compare)


def check(task: Task, compare: str | Path = "") -> None:
  """What scoring will need, so that nobody learns of it when all is answered.

  Raises: EvalError for a `compare` that is no result on this data, or a package that is not there.
  """
  if compare:
    compare_lib.check(asked(task), Path(compare))
  try:
    getattr(task, "check_submission", lambda: None)()  # no member that every task must have
  except ModuleNotFoundError as error:
    raise EvalError(str(error)) from None


def questions(task: Task) -> list[Item]:
  """The items of a task. Raises: EvalError when an id is no text, or two are the same."""
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


def settings(task: Task, engine: Engine, model: ModelIdentity) -> dict[str, Any]:
  """What an answer depends on; the batch, the mesh and the hosts are not among it."""
  return {
    **asked(task),
    "fingerprint": {"base": model.base, "loaded": model.loaded},
    **model.reads,
    "generation": dataclasses.asdict(engine.generation),
    "version": __version__,
  }


def asked(task: Task) -> dict[str, str]:
  """Which questions, by which rule. A judge reads answers and makes none: one may be given later."""
  rule = task.protocol.partition("; judge ")[0].removesuffix("; no judge")
  return {"task": task.name, "protocol": rule, "data_hash": task.data_hash()}


def counts(engine: Engine) -> dict[str, int]:
  """What the engine has counted since it was made."""
  return dataclasses.asdict(engine.counts)


def _ask(
  task: Task,
  engine: Engine,
  items: Sequence[Item],
  places: Mapping[str, int],
  writer: predictions.PredictionWriter,
  each: Callable[[Record], None],
) -> None:
  """`places` in the whole set: by them samples are drawn, so a part or a resumed run draws the same."""
  requests = (Request(item.question, item.images, number=places[item.id]) for item in items)
  answers: Any = engine.as_ready(requests)
  with contextlib.closing(answers):  # its workers end with us
    for index, answer in answers:
      line = record(task, items[index], answer)
      writer.write(line)
      each(line)


def record(task: Task, item: Item, answer: Answer) -> Record:
  """One line of predictions.jsonl."""
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
  """What the task says of an answer; with `problem`, why nobody can say whether it is right."""
  return {"problem": item.problem} if item.problem else task.verdict(item, text)


class Scored:
  """Tells how many questions are answered, and how well so far."""

  def __init__(self, total: int):
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


def finish(task: Task, out: str | Path, limit: int = 0, compare: str | Path = "") -> dict[str, Any]:
  """Scores what a folder's parts have answered: merges them, writes all that `run` writes.

  Raises: EvalError when questions were not asked yet, or the task is another one.
  """
  folder = Path(out)
  saved = predictions.read_settings(folder)
  _same_task(task, folder, saved["settings"])
  everything = questions(task)
  items = everything[: limit or None]
  with predictions.alone(folder):
    records = predictions.read(folder)
    if missing := _missing(items, records):
      raise EvalError(
        f"{folder}: {len(missing)} of {len(items)} questions were not asked yet "
        f"({', '.join(missing[:3])}, ...); run the parts that are missing, then merge again"
      )
    result = _told(task.score(items, predictions.as_predictions(records[i.id] for i in items)))
    chosen = [_known(task, item, records[item.id], result) for item in items]
    predictions.put_in_order(folder, everything, records | {r["id"]: r for r in chosen})
    flips = compare_lib.compare(folder, Path(compare)) if compare else None
    scores = _score(task, folder, items, chosen, result, saved) | {"questions": len(everything)}
    if flips:
      scores["compared"] = flips.counts()
    predictions.replace(folder / SCORES, json.dumps(scores, indent=2) + "\n")
    page.write(folder, scores, chosen, {item.id: item.images for item in items}, flips)
  return scores


def _told(result: Scores) -> Scores:
  """Scores without a headline where nothing was scored: 0.0 over no answers is no result."""
  total = result.by_kind["all"]
  if result.headline is None or total["items"]:
    return result
  why = f"no score: none of {total['asked']} questions has an answer that can be scored"
  return dataclasses.replace(result, headline=None, metric=why)


def _same_task(task: Task, folder: Path, there: Mapping[str, Any]) -> None:
  lines = [
    f"{k}: {v!r} here, {there.get(k)!r} there" for k, v in asked(task).items() if v != there.get(k)
  ]
  if lines:
    raise EvalError(f"{folder} holds answers to another task: " + "; ".join(lines))


def _known(task: Task, item: Item, record: Record, result: Scores) -> Record:
  """A record with what is known by now: a judge or the truths may have come after the answer."""
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
) -> dict[str, Any]:
  answers = predictions.as_predictions(records)
  judged = [r for r in records if not r["error"] and "score" in r["verdict"]]
  sessions, torn = predictions.read_sessions(folder)
  engine: Counter[str] = Counter()
  for session in sessions:
    engine.update(session["engine"])
  upload = folder / SUBMISSION
  upload.mkdir(exist_ok=True)
  try:
    files = task.submission(items, answers, upload)
  except ModuleNotFoundError as error:  # the answers are safe
    raise EvalError(f"{error}; then the same command, or --merge, scores them") from None
  if not files:
    upload.rmdir()
  return {
    "task": task.name,
    "protocol": task.protocol,
    "variant": getattr(task, "variant", {}),
    **{k: v for k, v in dataclasses.asdict(result).items() if k != "verdicts"},
    "interval": interval.bootstrap(
      [float(r["verdict"]["score"]) for r in judged],
      [" ".join(r["images"]) or r["id"] for r in judged],
    ),
    "asked": len(records),
    "answered": sum(not r["error"] for r in records),
    "failures": [{"id": r["id"], "error": r["error"]} for r in records if r["error"]],
    "left_out": [{"id": item.id, "error": item.problem} for item in items if item.problem],
    **saved["about"],
    **{k: v for k, v in saved["settings"].items() if k not in ("task", "protocol")},
    "engine": {**engine, **_ratio(engine)},
    "sessions": len(sessions),
    **({"sessions_damaged": torn} if torn else {}),
    "seconds": round(math.fsum(session["seconds"] for session in sessions), 1),
    "submission": [str(path.relative_to(folder)) for path in files],
  }


def _ratio(engine: Mapping[str, int]) -> dict[str, float]:
  """Encoder calls for each distinct image: 1 when none is encoded twice."""
  with contextlib.suppress(KeyError, ZeroDivisionError):
    return {"encoder_calls_per_image": engine["encoder_calls"] / engine["distinct_images"]}
  return {}
