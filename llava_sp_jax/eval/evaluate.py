"""Provides `llava_sp_jax.evaluate`: one call from a loaded model to the scores of a benchmark."""

from __future__ import annotations

from pathlib import Path

from llava_sp_jax.distributed import processes
from llava_sp_jax.eval import run
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.vlm import VisionLanguageModel
from llava_sp_jax.results.scores import BenchmarkScores
from llava_sp_jax.tasks import catalog
from llava_sp_jax.tasks.task import Task


def evaluate(
  model: VisionLanguageModel,
  task: str | Task,
  data: str | Path = "",
  *,
  out: str | Path,
  limit: int = 0,
  generation: Generation | None = None,
) -> BenchmarkScores:
  """Asks a model the questions of a benchmark and scores its answers.

  Does not ask questions again that `out` has answers to. Several processes take a part each, share
  the folder `out`, and wait for each other.

  Args:
    model: the loaded model.
    task: a name of `llava-sp eval --list`, FILE.py:Class, or a task object.
    data: the folder of the benchmark's data, if `task` is a name or FILE.py:Class.
    out: the folder for predictions.jsonl, scores.json and index.html.
    limit: asks only the first `limit` questions (0: all).
    generation: replaces the generation settings of the benchmark.

  Returns: the content of scores.json as attributes; `headline` is the benchmark's figure.
  Raises: ConfigError for an unknown task; EvalError for data that cannot be read, or an `out` with
    answers of other settings.
  """
  asked = catalog.find("task", task)(data) if isinstance(task, str) else task
  run.ask(asked, model.engine(generation or asked.generation), out, limit)
  processes.barrier("answers are written", processes.WITHOUT_LIMIT)
  return run.finish(asked, out, limit)
