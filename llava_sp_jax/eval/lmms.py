"""Runs lmms-eval's tasks with our engine, through its model interface `lmms`.

Needs `pip install lmms-eval`, which installs torch; the module can be imported without it.
Interface: `lmms_eval/api/model.py`, `api/instance.py`, `models/registry_v2.py` of lmms-eval.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.infer import pretrained as pretrained_lib
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.tasks.task import EvalError

try:
  from lmms_eval.api.model import lmms as Base  # noqa: N812
except ImportError:  # the class below exists nevertheless, and raises when it is constructed
  Base = object

NAME = "llava_sp_jax"
PATH = f"{__name__}.LlavaSp"
MAX_NEW_TOKENS = 1024  # for a task that gives none, as in lmms-eval's own LLaVA

# Keys of a task's `generation_kwargs` that are fields of Generation. WITHOUT_MEANING are those that
# are read below, do not concern generation, or have the values of LLaVA.
KNOWN = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams")
WITHOUT_MEANING = (
  "until",
  "do_sample",
  "image_aspect_ratio",
  "use_cache",
  "return_dict_in_generate",
)


def manifest() -> Any:
  """Returns the manifest that lmms-eval loads through its entry point `lmms_eval.models`."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id=NAME, simple_class_path=PATH)


class LlavaSp(Base):  # type: ignore[misc]  # the package has no types
  """Implements a model of lmms-eval.

  Use: `lmms-eval --model llava_sp_jax --model_args pretrained=runs/finetune --batch_size 8`.
  """

  is_simple = True

  def __init__(self, pretrained: Any, batch_size: int | str = 8, **more: Any):
    """Loads a model.

    `pretrained` is the folder of a checkpoint, or a `Pretrained`. `more` are the arguments that
    lmms-eval always passes; they are not used.

    Raises: EvalError for unknown arguments, and without lmms-eval.
    """
    # lmms-eval always passes these two.
    unknown = [name for name in more if name not in ("device", "max_batch_size")]
    if unknown:
      raise EvalError(f"--model_args: unknown {', '.join(unknown)}; known: pretrained, batch_size")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise EvalError(f"--batch_size: expected a number from 1, found {batch_size!r}")
    if Base is object:
      raise EvalError("lmms-eval is not installed; pip install lmms-eval, and start it from there")
    super().__init__()
    opened = isinstance(pretrained, pretrained_lib.Pretrained)
    self._pretrained = pretrained if opened else pretrained_lib.from_any(pretrained)
    self._batch_size = int(batch_size)
    self._engine: Engine | None = None  # only the last one: each has the parameters on the device
    self._likelihood: Likelihood | None = None

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Returns answers in the order of the requests, each cut before the first text of `until`.

    Raises: EvalError for a request that cannot be answered, which a task would score as wrong.
    """
    groups: dict[Generation, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(generation(request.args[1]), []).append(i)
    texts = [""] * len(requests)
    for settings, places in groups.items():
      asked = self._requests([requests[i] for i in places])
      with contextlib.closing(self._answering(settings).answer(asked)) as answers:
        for i, answer in zip(places, answers, strict=True):
          if answer.error:
            _, _, _, doc_id, task, split = requests[i].args
            raise EvalError(f"{task}, {split}, document {doc_id}: {answer.error}")
          texts[i] = answer.text
          self.cache_hook.add_partial("generate_until", tuple(requests[i].args[:2]), answer.text)
    return texts

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Returns for each request the log-probability of its continuation, and whether it is greedy.

    The log-probability is the sum over the tokens of the continuation. A continuation is greedy if
    greedy decoding generates it.
    """
    if self._likelihood is None:
      self._engine = None
      self._likelihood = Likelihood(self._pretrained, self._batch_size)
    continuations = []
    for request in requests:
      _, target, _, doc_id, task, split = request.args
      made = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
      continuations.append(str(made))
    return list(self._likelihood(zip(self._requests(requests), continuations, strict=True)))

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    """Refuses tasks of several rounds: the engine answers single questions, as LLaVA is trained to.

    Raises: EvalError, always.
    """
    raise EvalError(
      "tasks of several rounds (generate_until_multi_round) are not supported: the engine answers "
      "single questions; choose tasks with output_type generate_until or loglikelihood"
    )

  def _answering(self, settings: Generation) -> Engine:
    if self._engine is None or self._engine.generation != settings:
      self._engine = self._likelihood = None
      self._engine = Engine(self._pretrained, self._batch_size, settings)
    return self._engine

  def _requests(self, requests: Sequence[Any]) -> Iterable[Request]:
    """Yields our requests one by one, so that not all images are in memory."""
    for request in requests:
      context, _, doc_to_visual, doc_id, task, split = request.args
      images = tuple(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
      if images and IMAGE not in context:  # like lmms-eval's LLaVA: on one line, in front
        context = " ".join([IMAGE] * len(images)) + f"\n{context}"
      yield Request(context, images)


def generation(arguments: dict[str, Any]) -> Generation:
  """Converts a task's `generation_kwargs`, with the defaults of lmms-eval's LLaVA.

  Raises: EvalError for an unknown key.
  """
  if unknown := [key for key in arguments if key not in (*KNOWN, *WITHOUT_MEANING)]:
    raise EvalError(f"generation_kwargs: unknown {', '.join(unknown)}; known: {', '.join(KNOWN)}")
  until = arguments.get("until") or ()
  given = {k: arguments[k] for k in KNOWN if arguments.get(k) is not None}
  if arguments.get("do_sample") is False:
    given["temperature"] = 0.0
  if not given.get("temperature"):
    # Without effect in greedy decoding.
    given = {k: v for k, v in given.items() if k not in ("top_p", "top_k")}
  stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
  return Generation(**{"max_new_tokens": MAX_NEW_TOKENS, **given, "stop": stop})
