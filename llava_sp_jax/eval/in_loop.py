"""Evaluates a benchmark between the steps of a training run, on text that the model generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import limits, storage
from llava_sp_jax.convert import places
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.eval import identity, run
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.pretrained import Pretrained, as_computed
from llava_sp_jax.models.parameters import Params
from llava_sp_jax.results import predictions, tables
from llava_sp_jax.results.predictions import Record
from llava_sp_jax.tasks import catalog
from llava_sp_jax.tasks.task import Task

FOLDER = "evaluate"  # in the run folder; has one result folder for each evaluated step


class _Stopped(Exception):  # noqa: N818
  """Reports that the run was asked to stop during an evaluation."""


class InLoop:
  """Evaluates a run as `config.evaluate` says; called by `training.loop.train`."""

  def __init__(self, config: config_lib.Config, workdir: str | Path):
    """Opens the benchmark that `config.evaluate` names; results go below the run folder `workdir`.

    Raises: ConfigError for settings that do not fit, and a benchmark without a score;
      FileNotFoundError for data that are missing.
    """
    settings = config.evaluate
    limits.check(config)
    self._config, self._settings = config, settings
    self._folder = storage.place(workdir) / FOLDER
    make = catalog.find("evaluate.task", settings.task)
    self._task: Task = make(settings.data)
    items = self._task.items()[: settings.limit or None]
    if not items or self._task.score(items, {}).headline is None:
      what = "a server scores it" if items else f"no questions in {settings.data}"
      raise config_lib.ConfigError(f"evaluate.task {settings.task}: no score to log ({what})")
    self._tokenizer = Tokenizer(places.tokenizer(config.data.tokenizer))
    self._engine: Engine | None = None  # kept, so that only the first evaluation compiles

  def due(self, number: int, last: bool) -> bool:
    """Returns whether the model is evaluated after step `number`; `last` if the run ends with it."""
    return last or number % self._settings.every == 0

  def __call__(
    self, number: int, params: Params, fingerprint: str, going: Callable[[], bool]
  ) -> dict[str, float]:
    """Evaluates the parameters of a step, and writes answers and page to `evaluate/step-NUMBER`.

    All processes compute the answers together; process 0 alone scores and writes them.

    Args:
      number: the step.
      params: all parameters, as training holds them.
      fingerprint: the fingerprint of the frozen base.
      going: returns False when the run was asked to stop; polled after every answer.

    Returns: `eval_score` (the headline), `eval_answered`, and `eval_score/KIND` of each kind; {}
      when asked to stop, and in all processes but the first.
    """
    loaded = Pretrained(
      self._config, as_computed(self._config, params), self._tokenizer, number, fingerprint
    )
    if self._engine is None:
      place = jax.tree.leaves(loaded.params)[0].sharding  # uses the mesh of training
      self._engine = Engine(
        loaded, self._settings.batch_size, self._task.generation, getattr(place, "mesh", None)
      )
    else:
      self._engine.load(loaded)
    model = identity.ModelIdentity.of(loaded, str(self._folder.parent))
    if jax.process_index() == 0:
      return self._scored(self._engine, number, model, going)
    for _ in self._engine.as_ready(()):
      going()
    return {}

  def _scored(
    self, engine: Engine, number: int, model: identity.ModelIdentity, going: Callable[[], bool]
  ) -> dict[str, float]:
    out = self._folder / f"step-{number}"
    storage.of(out).remove(out)  # left by a step that a resumed run repeats

    def each(line: Record) -> None:
      if not going():
        raise _Stopped

    try:
      run.ask(self._task, engine, out, self._settings.limit, model, predictions.Part(), each=each)
    except _Stopped:
      print(f"step {number}: asked to stop; the evaluation is left out", flush=True)
      return {}
    scores = run.finish(self._task, out, self._settings.limit)
    metric = tables.figure(scores)
    kinds = {
      f"eval_score/{kind}": row[metric]
      for kind, row in scores.by_kind.items()
      if metric in row and kind != "all"
    }
    score = {} if scores.headline is None else {"eval_score": scores.headline}
    return {**score, "eval_answered": scores.answered, **kinds}
