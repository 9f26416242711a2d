"""Identifies the model that answered, and the settings that answers depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from llava_sp_jax import __version__
from llava_sp_jax.checkpoints import fingerprints
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.tasks.task import Task

# Fields of `config.data` that decide how a question and its images are preprocessed.
INPUTS = (
  "template", "image_aspect", "image_fit", "image_resample", "grid_pinpoints", "patch_merge",
  "image_mean", "image_std",
)  # fmt: skip


# Fields of `config.model` that do not change answers: they change the speed, or concern training.
NO_MATTER = ("frozen_dtype", "scan_unroll", "remat", "attention")
# Fields that the settings of older results lack: left out where they still have this value.
ADDED = {"cache": "float"}


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
  """Identifies the model that answered: its folder, step, fingerprints and settings."""

  checkpoint: str  # folder
  step: int
  base: str  # fingerprint of the frozen base, as stored in the run
  loaded: str  # fingerprint of all parameters as they compute: frozen and trained
  # The settings that answers depend on, as `reads` returns them.
  reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, pretrained: Pretrained, folder: str = "") -> ModelIdentity:
    """Identifies a loaded model; computes the fingerprint of its parameters.

    `folder` is that of its checkpoint; "" if it has none.
    """
    with jax.default_device(_host()):  # stacked layers may not fit on the device beside the model
      loaded = fingerprints.fingerprint(flatten_dict(pretrained.params, sep="/"))
    return cls(folder, pretrained.step, pretrained.fingerprint, loaded, reads(pretrained))


def reads(pretrained: Pretrained) -> dict[str, Any]:
  """Returns the settings that answers depend on: {inputs, model}, as values for JSON.

  `inputs` has template, tokenizer and preprocessing of images; `model` has sizes and dtype.
  """
  config, model = pretrained.config, dataclasses.asdict(pretrained.config.model)
  return {
    "inputs": {
      **{name: getattr(config.data, name) for name in INPUTS},
      "tokenizer": pretrained.tokenizer.fingerprint()[:16],
    },
    "model": {
      name: value
      for name, value in model.items()
      if name not in NO_MATTER and ADDED.get(name) != value
    },
  }


def settings(task: Task, engine: Engine, model: ModelIdentity) -> dict[str, Any]:
  """Returns all settings that answers depend on, as values for JSON.

  The batch size, the mesh and the number of hosts are not among them.
  """
  return {
    **asked(task),
    "fingerprint": {"base": model.base, "loaded": model.loaded},
    **model.reads,
    "generation": engine.generation.stated(),
    "version": __version__,
  }


def asked(task: Task) -> dict[str, str]:
  """Returns {task, protocol, data_hash} of a task, which identify its questions.

  Leaves the judge out of the protocol: it does not change answers, and may be given later.
  """
  rule = task.protocol.partition("; judge ")[0].removesuffix("; no judge")
  return {"task": task.name, "protocol": rule, "data_hash": task.data_hash()}


def _host() -> Any:
  """Returns the CPU as a device, or None if JAX was told not to use it."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None
