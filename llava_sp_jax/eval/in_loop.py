"""Scores a benchmark between the steps of a training run, by the text that the model generates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import limits
from llava_sp_jax.convert import places
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.eval import run
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.pretrained import Pretrained, as_computed
from llava_sp_jax.results import predictions, tables
from llava_sp_jax.results.predictions import Record
from llava_sp_jax.tasks import catalog
from llava_sp_jax.tasks.task import Task

FOLDER = "evaluate"  # in the run folder; one folder of results for each step


class _Stopped(Exception):  # noqa: N818
  """The run was asked to stop in the middle of an evaluation."""


class InLoop:
  """What `config.evaluate` says: the evaluator of `training.loop.train`."""

  def __init__(self, config: config_lib.Config, workdir: str | Path):
    """Opens the benchmark. Raises: ConfigError, FileNotFoundError, before anything is computed."""
    settings = config.evaluate
    limits.check(config)
    self._config, self._settings = config, settings
    self._folder = Path(workdir) / FOLDER
    make = catalog.find("evaluate.task", settings.task)
    self._task: Task = make(settings.data)
    items = self._task.items()[: settings.limit or None]
    if not items or self._task.score(items, {}).headline is None:
      what = "a server scores it" if items else f"no questions in {settings.data}"
      raise config_lib.ConfigError(f"evaluate.task {settings.task}: no score to log ({what})")
    self._tokenizer = Tokenizer(places.tokenizer(config.data.tokenizer))
    self._engine: Engine | None = None  # kept, so that only the first evaluation compiles

  def due(self, number: int) -> bool:
    """Whether step `number` is followed by an evaluation."""
    return number % self._settings.every == 0 or number == self._config.train.steps

  def __call__(
    self, number: int, params: Any, fingerprint: str, going: Callable[[], bool]
  ) -> dict[str, float]:
    """`eval_score` (the headline), `eval_answered`, and `eval_score/KIND` of each kind.

    The answers and their page are in `evaluate/step-NUMBER` of the run. Empty when asked to stop,
    and in all processes but the first: they compute its answers with it.
    """
    loaded = Pretrained(
      self._config, as_computed(self._config, params), self._tokenizer, number, fingerprint
    )
    if self._engine is None:
      place = jax.tree.leaves(loaded.params)[0].sharding  # on the devices where training has them
      self._engine = Engine(
        loaded, self._settings.batch_size, self._task.generation, getattr(place, "mesh", None)
      )
    else:
      self._engine.load(loaded)
    model = run.ModelIdentity.of(loaded, str(self._folder.parent))
    if jax.process_index() == 0:
      return self._scored(self._engine, number, model, going)
    for _ in self._engine.as_ready(()):
      going()
    return {}

  def _scored(
    self, engine: Engine, number: int, model: run.ModelIdentity, going: Callable[[], bool]
  ) -> dict[str, float]:
    out = self._folder / f"step-{number}"
    shutil.rmtree(out, ignore_errors=True)  # of a step that a resumed run does again

    def each(line: Record) -> None:
      if not going():
        raise _Stopped

    try:
      scores = run.run(
        self._task, engine, out, self._settings.limit, model, predictions.Part(), each=each
      )
    except _Stopped:
      print(f"step {number}: asked to stop; the evaluation is left out", flush=True)
      return {}
    metric = tables.figure(scores)
    kinds = {
      f"eval_score/{kind}": row[metric]
      for kind, row in scores["by_kind"].items()
      if metric in row and kind != "all"
    }
    score = {} if scores["headline"] is None else {"eval_score": scores["headline"]}
    return {**score, "eval_answered": scores["answered"], **kinds}
