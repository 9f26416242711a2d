"""Parameters from wherever they are: random, a run of ours, torch folders, GGUF.

Every reader returns a flat `{path: numpy array}`; nothing missing, unexpected or mis-shaped gets
past `check`, which names all problems at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import checkpoint
from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import gguf, tables, torch_io
from llava_sp_jax.models import build

Flat = dict[str, np.ndarray]
ADAPTERS = r"language_model/.*/lora_[ab]$"


def translate(tensors: Flat, rows: tuple[tables.Row, ...], origin: str) -> Flat:
  """torch names -> our paths, layers stacked.

  Raises: FormatError that lists every name without a row, and every gap among the layers.
  """
  whole: Flat = {}
  stacks: dict[str, dict[int, np.ndarray]] = {}
  problems = []
  for name, array in tensors.items():
    if tables.ignored(name):
      continue
    match = tables.match(name, rows)
    if match is None:
      problems.append(f"unexpected tensor {name} {array.shape}")
    elif match.layer is None:
      whole[match.path] = match.layout.to_jax(array)
    else:
      stacks.setdefault(match.path, {})[match.layer] = match.layout.to_jax(array)
  for path, layers in stacks.items():
    missing = sorted(set(range(max(layers) + 1)) - set(layers))
    if missing:
      problems.append(f"{path}: layers {missing} are missing")
    else:
      whole[path] = np.stack([layers[i] for i in range(len(layers))])
  _raise(origin, problems)
  return whole


def check(found: Flat, expected: dict[str, Any], origin: str) -> Flat:
  """`found` when it has exactly the paths and shapes of `expected`.

  Raises: FormatError that lists everything missing, unexpected or of another shape.
  """
  problems = [f"missing {p} {expected[p].shape}" for p in sorted(set(expected) - set(found))]
  problems += [f"unexpected {p} {found[p].shape}" for p in sorted(set(found) - set(expected))]
  for path in sorted(set(found) & set(expected)):
    if found[path].shape != expected[path].shape:
      problems.append(f"{path}: expected shape {expected[path].shape}, found {found[path].shape}")
  _raise(origin, problems)
  return found


def _raise(origin: str, problems: list[str]) -> None:
  if problems:
    raise torch_io.FormatError(f"{origin} does not fit the model:\n  " + "\n  ".join(problems))


def language_model(path: str | Path, tied: bool) -> Flat:
  """A LLaMA folder of Hugging Face, or a GGUF file."""
  source = Path(path)
  if source.suffix == ".gguf":
    tensors = gguf.tensors(source)
  else:
    tensors = torch_io.read_named(source, torch_io.WEIGHTS)
  if tied:
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
  return translate(tensors, tables.LLAMA, str(source))


def vision_tower(path: str | Path, layers: int) -> Flat:
  """The first `layers` blocks of a CLIP folder (full model or vision part), or a run's tower."""
  if (Path(path) / checkpoint.CONFIG_FILE).is_file() and (Path(path) / "checkpoints").is_dir():
    run = finished_run(path, "init.vision_tower")
    return {p: a for p, a in run.params.items() if p.startswith("vision_tower/")}
  flat = translate(torch_io.read_named(Path(path), torch_io.WEIGHTS), tables.CLIP, str(path))
  return {p: a[:layers] if "/layers/" in p else a for p, a in flat.items()}


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run as it stands on disk."""

  config: config_lib.Config
  params: Flat  # all of the model
  step: int
  fingerprint: str  # of the frozen base


def run_params(folder: str | Path) -> Run:
  """All parameters of a run of ours: what it trained over the base that its config names.

  Raises: CheckpointError when the base is another one than it was trained with.
  """
  config = checkpoint.read_config(folder)
  trained, about, step = checkpoint.read_params(folder)
  expected = _abstract(config.model)
  base: dict[str, Any] = _read_init(config, expected, but=set(trained))
  missing = {p: s for p, s in expected.items() if p not in trained and p not in base}
  base.update(_random(config, missing))
  frozen = {p: np.asarray(a).astype(config.model.frozen_dtype) for p, a in base.items()}
  found = checkpoint.fingerprint({p: jax.numpy.asarray(a) for p, a in frozen.items()})
  if found != about["fingerprint"]:
    raise checkpoint.CheckpointError(
      f"{folder}: its frozen base has fingerprint {about['fingerprint']}, but config.init leads to "
      f"{found}; restore the files that config.init names"
    )
  return Run(config, check({**frozen, **trained}, expected, str(folder)), step, found)


def finished_run(folder: str | Path, key: str) -> Run:
  """`run_params` of a run that reached its last step. Raises: CheckpointError."""
  run = run_params(folder)
  if run.step < run.config.train.steps:
    raise checkpoint.CheckpointError(
      f"{key} {folder}: stopped at step {run.step} of {run.config.train.steps}; finish it first"
    )
  return run


def initial_params(
  config: config_lib.Config, shardings: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
  """Parameters before training, nested, as `config.init` says; what it does not name is random.

  With `init.checkpoint`, only adapters may be new: anything else that the checkpoint lacks is an
  error. `shardings` maps an abstract tree to where each leaf goes.
  """
  expected = _abstract(config.model)
  found = _read_init(config, expected, but=set())
  missing = {p: s for p, s in expected.items() if p not in found}
  if config.init.checkpoint:
    _raise(
      f"init.checkpoint {config.init.checkpoint}",
      [f"missing {p} {s.shape}" for p, s in missing.items() if not re.match(ADAPTERS, p)],
    )
  places = shardings(expected) if shardings else dict.fromkeys(expected)
  random = _random(config, missing)
  return unflatten_dict(
    {p: jax.device_put(found.get(p, random.get(p)), places[p]) for p in expected}, sep="/"
  )


def _abstract(model: config_lib.Model) -> dict[str, jax.ShapeDtypeStruct]:
  return flatten_dict(build.abstract(model), sep="/")


def _random(config: config_lib.Config, wanted: dict[str, Any]) -> dict[str, jax.Array]:
  """Random leaves; the compiler leaves out what is not wanted."""
  if not wanted:
    return {}

  def leaves(rng: jax.Array) -> dict[str, jax.Array]:
    flat = flatten_dict(build.initialise(config.model, rng), sep="/")
    return {path: flat[path] for path in wanted}

  return jax.jit(leaves)(jax.random.key(config.train.seed))


def _read_init(config: config_lib.Config, expected: dict[str, Any], but: set[str]) -> Flat:
  """What `config.init` names, each part checked for completeness; paths in `but` are left out."""
  init, found = config.init, Flat()
  if init.checkpoint and (init.language_model or init.vision_tower):
    raise config_lib.ConfigError(
      "config.init: a checkpoint brings its own base; leave out language_model and vision_tower"
    )
  if init.checkpoint:
    run = finished_run(init.checkpoint, "init.checkpoint")
    wanted = {p: s for p, s in expected.items() if p in run.params}
    found.update(check(run.params, wanted, f"init.checkpoint {init.checkpoint}"))
    return {p: a for p, a in found.items() if p not in but}
  readers: dict[str, tuple[str, Callable[[str], Flat]]] = {
    "language_model": (
      init.language_model,
      lambda path: language_model(path, config.model.language_model.tie_embeddings),
    ),
    "vision_tower": (
      init.vision_tower,
      lambda path: vision_tower(path, _used_layers(config.model.tower)),
    ),
  }
  for part, (path, read) in readers.items():
    if not path:
      continue
    wanted = {p: s for p, s in expected.items()
              if p.startswith(part + "/") and not re.match(ADAPTERS, p)}  # fmt: skip
    found.update(check(read(path), wanted, f"init.{part} {path}"))
  return {p: a for p, a in found.items() if p not in but}


def _used_layers(tower: config_lib.Tower) -> int:
  return tower.layers + 1 + tower.select_layer if tower.select_layer < 0 else tower.select_layer


@dataclasses.dataclass(frozen=True)
class Upstream:
  """A LoRA folder as the original `train.py` leaves it, with the base and tower it needs."""

  model: config_lib.Model
  params: dict[str, Any]  # nested, float32
  image_mean: tuple[float, ...]
  image_std: tuple[float, ...]


def upstream(
  lora: str | Path, base: str | Path, tower: str | Path, row: str, dtype: str = "float32"
) -> Upstream:
  """Reads base LLM + CLIP tower + `adapter_model` + `non_lora_trainables.bin`.

  `row` names the projector's row. Raises: FormatError with all that does not fit.
  """
  lora, base, tower = Path(lora), Path(base), Path(tower)
  llm, adapter = _json(lora / "config.json"), _json(lora / "adapter_config.json")
  clip = _json(tower / "config.json")
  clip = {**CLIP_DEFAULTS, **clip.get("vision_config", clip)}
  extra = torch_io.read_named(lora, ("non_lora_trainables",))
  extra = {name.removeprefix("base_model.model."): array for name, array in extra.items()}
  kernels = [a for n, a in extra.items() if re.fullmatch(r"model\.conv_\d+(\.1)?\.weight", n)]
  model = config_lib.Model(
    dtype=dtype, frozen_dtype=dtype, remat=False,
    tower=config_lib.Tower(
      variant="clip", image_size=clip["image_size"], patch_size=clip["patch_size"],
      width=clip["hidden_size"], layers=clip["num_hidden_layers"],
      heads=clip["num_attention_heads"], mlp_width=clip["intermediate_size"],
      select_layer=llm["mm_vision_select_layer"],
    ),
    language_model=llama_config(llm),
    projector=config_lib.Projector(row=row, token_width=kernels[0].shape[0] if kernels else 512),
    lora=config_lib.Lora(
      rank=adapter["r"], alpha=float(adapter["lora_alpha"]), dropout=adapter["lora_dropout"]
    ),
  )  # fmt: skip
  flat = language_model(base, model.language_model.tie_embeddings)
  flat |= vision_tower(tower, _used_layers(model.tower))
  flat |= translate(extra, tables.projector(row, model.tower.width), str(lora))
  flat |= translate(torch_io.read_named(lora, ("adapter_model",)), tables.LORA, str(lora))
  flat = check(flat, _abstract(model), str(lora))
  pixels = _json(tower / "preprocessor_config.json")
  params = unflatten_dict({p: a.astype(np.float32) for p, a in flat.items()}, sep="/")
  return Upstream(model, params, tuple(pixels["image_mean"]), tuple(pixels["image_std"]))


# Hugging Face leaves values out of config.json that equal CLIPVisionConfig's defaults.
CLIP_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "image_size": 224, "patch_size": 32}  # fmt: skip


def llama_config(values: dict[str, Any]) -> config_lib.LanguageModel:
  """Sizes from a Hugging Face LLaMA `config.json`.

  Raises: FormatError for what the decoder does not do.
  """
  for key, wanted in (("rope_scaling", None), ("attention_bias", False), ("hidden_act", "silu")):
    if values.get(key, wanted) != wanted:
      raise torch_io.FormatError(f"config.json: {key}={values[key]!r} is not supported")
  heads = values["num_attention_heads"]
  return config_lib.LanguageModel(
    vocab_size=values["vocab_size"], width=values["hidden_size"],
    layers=values["num_hidden_layers"], heads=heads,
    kv_heads=values.get("num_key_value_heads", heads),
    head_dim=values.get("head_dim") or values["hidden_size"] // heads,
    mlp_width=values["intermediate_size"], rope_theta=float(values.get("rope_theta", 10000.0)),
    norm_eps=values["rms_norm_eps"], tie_embeddings=values.get("tie_word_embeddings", False),
    initializer_range=values.get("initializer_range", 0.02),
  )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise torch_io.FormatError(f"{path}: no such file") from None
  except json.JSONDecodeError as error:
    raise torch_io.FormatError(f"{path}: not JSON ({error})") from None
