"""LLaVA-SP in JAX: visual spatial tokens for vision-language models (arXiv 2507.00505).

  import llava_sp_jax as llava

  model = llava.load("runs/finetune")  # a run, a folder of a known format, or a name of the hub
  model.answer("what shape is in the image?", ["x.png"])

Names of this module are imported when they are first used, so that importing it costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from llava_sp_jax.config import Config as Config
  from llava_sp_jax.eval.evaluate import evaluate as evaluate
  from llava_sp_jax.eval.train import train as train
  from llava_sp_jax.infer.engine import Engine as Engine
  from llava_sp_jax.infer.generation import Generation as Generation
  from llava_sp_jax.infer.requests import Answer as Answer
  from llava_sp_jax.infer.requests import Request as Request
  from llava_sp_jax.infer.vlm import VisionLanguageModel as VisionLanguageModel
  from llava_sp_jax.infer.vlm import load as load
  from llava_sp_jax.models.projector import Projector as Projector
  from llava_sp_jax.training.step import train_step as train_step

__version__ = "0.1.0"

# Public name: the module that has it.
_HOMES = {
  "Answer": "infer.requests",
  "Config": "config",
  "Engine": "infer.engine",
  "Generation": "infer.generation",
  "Projector": "models.projector",
  "Request": "infer.requests",
  "VisionLanguageModel": "infer.vlm",
  "evaluate": "eval.evaluate",
  "load": "infer.vlm",
  "train": "eval.train",
  "train_step": "training.step",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOMES})
