"""`llava_sp_jax.evaluate`: one call from a loaded model to the scores of a benchmark."""

from __future__ import annotations

from pathlib import Path

from llava_sp_jax.eval import run
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.vlm import VisionLanguageModel
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
) -> dict[str, object]:
  """Asks a model the questions of a benchmark and scores its answers.

  What `out` already answers is not asked again.

  Args:
    task: a name of `llava-sp eval --list`, FILE.py:Class, or a task of your own.
    data: the folder of the benchmark's data, where `task` is a name.
    out: the folder of predictions.jsonl, scores.json and index.html.
    limit: only the first so many questions; 0 for all.
    generation: settings in place of the benchmark's own.

  Returns: the content of scores.json; `headline` is the benchmark's figure.
  Raises: ConfigError for an unknown task; EvalError for data that cannot be read, or an `out` with
    answers that were made otherwise.
  """
  asked = catalog.find("task", task)(data) if isinstance(task, str) else task
  return run.run(asked, model.engine(generation or asked.generation), out, limit)
