"""Defines the configuration: frozen, validated dataclasses.

A recipe in `configs/` makes nested dictionaries, which `from_dict` turns into the classes below
(see `overrides`). The same content is saved as JSON beside every checkpoint. `llava-sp train
--help` prints the comment beside each field.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from llava_sp_jax import files, json_files, overrides
from llava_sp_jax.overrides import (
  FREE,
  C,
  ConfigError,
  differences,
  former_names,
  formerly,
  free,
  lookup,
  override,
  parse,
  renamed,
  to_dict,
)

__all__ = [
  "ConfigError",
  "differences",
  "from_dict",
  "from_json",
  "lookup",
  "override",
  "parse",
  "parse_arg",
  "renamed",
  "to_dict",
  "to_json",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
  """Sets the sizes of the vision transformer; those of images are in pixels.

  `variant` names a row of `models.vit.TOWER_VARIANTS`.
  """

  variant: str = "clip"  # architecture
  image_size: int = 336  # pixels of a side
  patch_size: int = 14  # pixels of a side
  width: int = 1024  # of hidden states
  layers: int = 24  # blocks
  heads: int = 16  # of attention
  mlp_width: int = 4096  # hidden units of each MLP
  select_layer: int = -2  # index into the hidden states, as in LLaVA; -2 leaves the last block out
  initializer_range: float = 0.02  # standard deviation of random class and position embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Extends rotary positions beyond the trained length; `kind` names a row of `layers.ROPES`.

  Meanings and defaults are those of Hugging Face's `rope_parameters`; a kind reads what it needs.
  """

  kind: str = "default"  # how positions are stretched
  factor: float = 1.0  # times the trained length
  original_length: int = 0  # positions in training; dynamic, llama3 and yarn need it
  low_frequency: float = 1.0  # llama3: turns within that length below which all is stretched
  high_frequency: float = 4.0  # llama3: turns above which nothing is stretched
  beta_fast: float = 32.0  # yarn: turns from which on nothing is stretched
  beta_slow: float = 1.0  # yarn: turns up to which all is stretched
  attention_factor: float = 0.0  # yarn; 0: its own, 0.1 ln(factor) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
  """Sets the sizes of the LLaMA-family decoder."""

  vocab_size: int = 32000  # rows of the embedding
  width: int = 4096  # of hidden states
  layers: int = 32  # decoder layers
  heads: int = 32  # of queries
  kv_heads: int = 32  # of keys and values; fewer than heads: grouped queries
  head_dim: int = 128  # of one head
  mlp_width: int = 11008  # hidden units of each MLP
  rope_theta: float = 10000.0  # base of rotary positions
  rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
  attention_bias: bool = False  # on queries, keys and values, as in Qwen2
  sliding_window: int = 0  # positions that a query sees, its own included; 0: all (Mistral)
  window_from_layer: int = 0  # layers before this one see all (Qwen2's max_window_layers)
  max_positions: int = 4096  # the checkpoint's own limit; only handed on
  norm_eps: float = 1e-5  # added to variances in RMS norms
  tie_embeddings: bool = False  # the head's kernel is the embedding
  initializer_range: float = 0.02  # standard deviation of random weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
  """Sets the projector; `variant` names a row of `models.projector.VARIANTS`.

  `scales` are the side lengths of the views, the parts of the image that spatial tokens see, in
  patches, ascending; if empty, the variant's own.
  """

  variant: str = formerly("row", "cropping")  # design of the spatial tokens
  token_width: int = 512  # of spatial tokens before the projector; the paper's 512
  scales: tuple[int, ...] = ()  # views in patches, small to large; empty: the variant's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Sets the adapters on the decoder's seven linear layers; rank 0 means none."""

  rank: int = 0  # of the adapters; 0: none
  alpha: float = 256.0  # adapters are scaled by alpha / rank
  dropout: float = 0.05  # of what adapters read, in training


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sets the model: its parts, dtypes, and how it is computed."""

  tower: TowerConfig = dataclasses.field(default_factory=TowerConfig)
  language_model: LanguageModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
  projector: ProjectorConfig = dataclasses.field(default_factory=ProjectorConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  image_newline: bool = False  # a learned token that ends a row of tile patches (anyres)
  dtype: str = "bfloat16"  # of activations: float32 or bfloat16
  matmul_precision: str = "auto"  # of products; auto: highest where dtype is float32
  frozen_dtype: str = "bfloat16"  # of frozen parameters, likewise
  quantize: str = "none"  # the decoder's frozen kernels
  frozen_matmul: str = "float"  # how quantized kernels are multiplied; int8, fp8: in their codes
  cache: str = "float"  # keys and values of earlier positions, while answering
  scan_unroll: int = 1  # layers per scan step; all of them is fastest on CPU
  remat: str = "projections"  # what a layer keeps for its backward pass
  attention: str = "auto"  # how it is computed; auto: by platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Sets what is read; `source` names a row of `data.sources.SOURCES`, or is "auto".

  Fingerprints of the samples decide whether a run may resume, not their format or place.

  `image_aspect` names a row of `data.anyres.ASPECTS`, `image_fit` one of `data.image.FITS`,
  `patch_merge` one of `data.anyres.MERGES`; `template` and `turns` one of `data.conversation`.
  """

  source: str = free("auto")  # how samples are stored; auto: as the path is
  path: str = free("")  # the file or folder of samples
  mixture: str = free("")  # in its place: a file of several sources with weights
  image_folder: str = free("")  # image names start from it
  tokenizer: str = ""  # folder
  template: str = "v1"  # how a dialogue is written
  turns: str = "chain"  # of a dialogue: one after another, or each alone with the image
  turns_per_row: int = 0  # 0: all; otherwise a random subset on each visit
  row_length: int = 2048  # tokens of text and images in a row
  packing: str = "none"  # how samples share rows
  samples_per_batch: int = 0  # balanced: samples in the rows of a batch
  samples_per_row: int = 0  # the most in a packed row; 0: any number
  bucket_lengths: tuple[int, ...] = ()  # buckets: their row lengths; none: quarters of row_length
  too_long: str = "cut"  # for a row: cut (as the original), or quarantine
  processes: int = free(0)  # that measure samples before they are packed; 0: one for each core
  images_per_row: int = 1  # counts tiles: an anyres image has 1 + the tiles of its canvas
  augment: str = "none"  # random changes to pictures, in training
  image_aspect: str = "pad"  # the original's image_aspect_ratio
  image_fit: str = "crop"  # how a picture becomes square: as CLIP's or as SigLIP's
  image_resample: str = "bicubic"  # how it is interpolated then
  grid_pinpoints: tuple[tuple[int, int], ...] = (  # anyres: canvases (width, height) in pixels
    (336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008),
  )  # fmt: skip
  patch_merge: str = "flat"  # order of an image's tokens
  image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of each channel, in [0, 1]
  image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)  # of each channel
  threads: int = free(4)  # that read and decode samples
  validation_path: str = free("")  # the validation split: samples of the same source
  validation_fraction: float = 0.0  # without such a path: this share of the samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Sets AdamW and its cosine schedule; `stage` names a row of `training.optimizer.STAGES`."""

  stage: str = "finetune"  # which parameters are trained
  learning_rate: float = 2e-4  # peak, of all but the projector
  projector_learning_rate: float = 2e-5  # peak, of the projector
  warmup_ratio: float = 0.03  # share of the steps with a rising rate
  weight_decay: float = 0.0  # of kernels
  b1: float = 0.9  # decay of the first moment
  b2: float = 0.999  # decay of the second moment
  eps: float = 1e-8  # added to the root of the second moment
  clip_norm: float = 1.0  # largest norm of a step's gradient
  moment_dtype: str = "float32"  # of AdamW's first moment; bfloat16 saves 2 bytes per parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Sets the length of a run, its batches, and what is logged, saved and checked."""

  steps: int = 1000  # of the optimizer, in all
  epochs: float = 0.0  # passes over the data, which give the steps; 0: as `steps` says
  batch_size: int = 128  # rows over all devices
  seed: int = 0  # of weights, order, dropout, augmentation
  log_every: int = free(10)  # steps between two records
  save_every: int = free(500)  # steps between two checkpoints
  keep: int = free(2)  # checkpoints that stay
  local_folder: str = free("")  # on the disk of each host, for steps between checkpoints
  local_every: int = free(50)  # steps between two of these
  accumulate: int = 1  # micro-batches of a step; their gradients are added up
  loss_chunk: int = 512  # positions per slice of the loss, so that [B, T, V] never exists
  sinks: tuple[str, ...] = free(("terminal",))  # beside metrics.jsonl, which is always there
  peak_tflops: float = free(0.0)  # bf16 peak of one chip for the MFU; 0: as hardware.CHIPS has it
  preflight: bool = free(True)  # refuse, before anything is kept, a run that cannot learn
  validate_every: int = free(0)  # steps; 0: never
  validate_batches: int = free(8)  # at most; each sample of the split counts once
  max_nonfinite: int = free(8)  # steps in a row without finite loss and gradient end training
  peer_seconds: int = free(100)  # a process not heard of for so long is dead, and the others stop
  stall_seconds: int = free(1800)  # a process without a step for so long stops; 0: never


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  """Sets the benchmark that is scored between steps; `task` names a row of `tasks.catalog.TASKS`."""

  every: int = 0  # steps; 0: never. With it, the last step is followed by one as well
  task: str = "easy_vqa"  # benchmark, or FILE.py:Class
  data: str = ""  # folder of the benchmark's files; not those that are reported in the end
  limit: int = 0  # only the first questions; 0: all
  batch_size: int = 16  # questions at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sets the devices along each axis; `base` names a row of `distributed.sharding.PRESETS`."""

  data: int = 1  # copies of the model, each with rows of its own
  fsdp: int = -1  # parts of parameters and rows; -1: the devices that are left
  tensor: int = 1  # parts of heads and hidden units
  base: str = "shard"  # the frozen base over `fsdp`; "replicate": a copy on each, without gathers
  slices: int = 0  # groups joined by the slow network, along data; 0: as the devices say


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
  """Sets where parameters come from before training; empty means random."""

  language_model: str = ""  # folder of a torch language model
  vision_tower: str = ""  # folder of a torch vision tower
  checkpoint: str = ""  # a run, or a converted checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sets all of a run: model, data, optimizer, training, evaluation, devices, first weights."""

  name: str = "llava-sp"  # of the run, for sinks
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig, metadata=FREE)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata=FREE)
  init: InitConfig = dataclasses.field(default_factory=InitConfig)


@typing.overload
def from_dict(values: Any) -> Config: ...
@typing.overload
def from_dict(values: Any, cls: type[C], path: str = "config") -> C: ...
def from_dict(values: Any, cls: Any = Config, path: str = "config") -> Any:
  """Builds the config class `cls` from nested mappings; keys may have a former name.

  `path` is the prefix of keys in messages.

  Raises: ConfigError for unknown keys and wrong types, all at once, with the known keys.
  """
  return overrides.from_dict(values, cls, path)


def to_json(config: Any) -> str:
  """Returns a config as indented JSON, which `from_json` reads."""
  return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
  """Reads the text of a config.json, also of older versions.

  Raises: ConfigError for anything that is no config.
  """
  try:
    values = json_files.parse_object(text.encode(), "config.json")
  except files.FormatError as error:
    raise ConfigError(str(error)) from None
  if values and not values.keys() & {field.name for field in dataclasses.fields(Config)}:
    of = f" of model_type {values['model_type']!r}" if "model_type" in values else ""
    raise ConfigError(
      f"a checkpoint of others{of}; read it with llava-sp convert, and give what that made"
    )
  model = values.get("model", {})
  if isinstance(model, dict) and isinstance(model.get("remat"), bool):  # of before they had names
    model["remat"] = "full" if model["remat"] else "none"
  return from_dict(values)


def groups(cls: type[Any] = Config) -> Iterator[type[Any]]:
  """Yields a config class, and all classes of its groups at any depth."""
  yield cls
  for hint in typing.get_type_hints(cls).values():
    if dataclasses.is_dataclass(hint):
      yield from groups(typing.cast(type[Any], hint))


# Where an option, a flag or a note stands for a key of any group: its former name and the present
# one.
FORMER_NAMES = {old: new for group in groups() for old, new in former_names(group).items()}


def parse_arg(arg: str, **defaults: Any) -> types.SimpleNamespace:
  """Parses the options of a recipe, `variant=pooling,seed=3`, to a namespace.

  `defaults` has the known options; their values give the types, and what `arg` leaves out. An
  option may have a former name, unless it is one of `defaults`.

  Raises: ConfigError for an unknown option or a value of the wrong type.
  """
  values = dict(defaults)
  for item in filter(None, arg.split(",")):
    given, _, text = item.partition("=")
    key = given if given in defaults else FORMER_NAMES.get(given, given)
    if key not in defaults:
      raise ConfigError(f"unknown option {given!r} after ':'; known: {', '.join(defaults)}")
    try:
      values[key] = parse(text, defaults[key])
    except (ValueError, KeyError):
      kind = type(defaults[key]).__name__
      raise ConfigError(f"option {key}: expected {kind}, found {text!r:.60}") from None
  return types.SimpleNamespace(**values)
