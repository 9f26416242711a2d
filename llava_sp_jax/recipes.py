"""Finds recipes, and holds what those of the paper share: language models, data sets, stages.

Sizes and data sets are rows of tables. A recipe names its stage, rates and adapters, and takes the
rest from here. Sources: configs of Vicuna v1.5; `pretrain.sh` and `finetune_lora.sh` of the
original code; `finetune.sh` of LLaVA-1.5, which the original does not change.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import types
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.errors import LlavaSPError

TOWER = "clip-vit-large-patch14-336"  # its sizes are the defaults of config.TowerConfig

# Recipes are installed inside the package; in a clone they are beside it.
FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def known() -> dict[str, Path]:
  """Returns {name: file} of the recipes that come with the package."""
  folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
  return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def find(text: str) -> Path:
  """Returns the file of a recipe; `text` is a path, or the name of a known recipe (`easy_vqa`).

  Outside a clone, `configs/easy_vqa.py` also counts as that name.

  Raises: ConfigError, which lists the known recipes, if there is no such file or name.
  """
  if Path(text).is_file():
    return Path(text)
  name = text.removeprefix("configs/").removesuffix(".py")
  if name not in known():
    raise config_lib.ConfigError(
      f"--config: no file {text!r}, and no recipe of that name; known: {', '.join(known())}"
    )
  return known()[name]


def load(value: str) -> config_lib.Config:
  """Runs a recipe and returns its config; what it leaves out has its default.

  `value` is `RECIPE[:OPTIONS]`, where RECIPE is a file or a known name.

  Raises: ConfigError for an unknown recipe or option, and for whatever error a recipe ends with.
  """
  name, _, options = value.partition(":")
  file = str(find(name))
  spec = importlib.util.spec_from_file_location("recipe", file)
  if spec is None or spec.loader is None:
    raise config_lib.ConfigError(f"--config: {file!r} is not a Python file (.py)")
  recipe = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(recipe)
    if not hasattr(recipe, "get_config"):
      raise config_lib.ConfigError(f"--config: {file!r} has no function get_config")
    made = recipe.get_config(*filter(None, [options]))
    if not hasattr(made, "to_dict"):
      raise config_lib.ConfigError(
        f"--config: get_config of {file!r} returned {made!r:.40}, expected an ml_collections.ConfigDict"
      )
    values = made.to_dict()
  except (Exception, SystemExit) as error:  # one that leaves has told us nothing to train
    if isinstance(error, LlavaSPError | OSError):
      raise
    why = f"{type(error).__name__}: {error}"
    raise config_lib.ConfigError(f"--config: {file} ends with {why}") from error
  return config_lib.from_dict(values)


@dataclasses.dataclass(frozen=True)
class ModelSize:
  """Describes a published language model: its folder below `checkpoints=`, and its sizes."""

  folder: str
  language_model: config_lib.LanguageModelConfig


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Describes published data of LLaVA, and how a step reads them.

  A step trains on `batch_samples` samples, as in the paper. They are packed into `rows` rows, which
  have some room to spare, in micro-batches of 16 rows.
  """

  file: str
  images: str  # folder of the images below `data=`
  samples: int
  batch_samples: int
  rows: int
  accumulate: int
  template: str

  @property
  def steps(self) -> int:
    """Returns the number of steps of one epoch; leaves out the last, incomplete batch."""
    return self.samples // self.batch_samples


SIZES = {
  "7b": ModelSize("vicuna-7b-v1.5", config_lib.LanguageModelConfig()),
  "13b": ModelSize(
    "vicuna-13b-v1.5",
    config_lib.LanguageModelConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824),
  ),
}

# In the original, 256 is 8 GPUs x 16 samples x 2 accumulation steps, and 128 is 8 x 4 x 4. Here a row
# holds three captions, or 2.15 samples of instructions on average (docs/results/packing.md).
CAPTIONS = Dataset("blip_laion_cc_sbu_558k.json", "images", 558_128, 256, 96, 6, "plain")
INSTRUCTIONS = Dataset("llava_v1_5_mix665k.json", "", 665_298, 128, 64, 4, "v1")
IMAGES = 3  # of a row
SAMPLES = 8  # of a row; the mixture of stage 2 packs to at most 4

LORA = {"rank": 128, "alpha": 256.0, "dropout": 0.05}

STAGE_1 = {"size": "7b", "variant": "cropping", "init": "", "data": "data/llava_pretrain",
           "checkpoints": "checkpoints"}  # fmt: skip
STAGE_2 = {**STAGE_1, "init": "runs/pretrain", "data": "data/llava_finetune"}


def llava(
  options: types.SimpleNamespace,
  name: str,
  dataset: Dataset,
  optimizer: dict[str, Any],
  model: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the config of a recipe as nested dictionaries.

  Args:
    options: size, variant, init, data and checkpoints, parsed by `parse_arg` from STAGE_1 or
      STAGE_2.
    name: of the recipe; a part of the run's name.
    dataset: what is trained on; gives the batch and the steps of one epoch.
    optimizer: stage and rates; the cosine schedule, warm-up .03 and no weight decay are the
      defaults of `config.OptimizerConfig`.
    model: adapters and quantization.

  Raises: ConfigError for an unknown size.
  """
  size = config_lib.lookup("option size", options.size, SIZES)
  language_model = f"{options.checkpoints}/{size.folder}"
  # A run names its own base; without a run, the projector is random.
  base = {"language_model": language_model, "vision_tower": f"{options.checkpoints}/{TOWER}"}
  return {
    "name": f"llava-sp-{options.size}-{options.variant}-{name}",
    "model": {
      "language_model": dataclasses.asdict(size.language_model),
      "projector": {"variant": options.variant},
      **(model or {}),
    },
    "data": {
      "path": f"{options.data}/{dataset.file}",
      "image_folder": f"{options.data}/{dataset.images}".rstrip("/"),
      "tokenizer": language_model,
      "template": dataset.template,
      "row_length": 2048,
      "packing": "balanced",
      "samples_per_batch": dataset.batch_samples,
      "samples_per_row": SAMPLES,
      "images_per_row": IMAGES,
    },
    "optimizer": optimizer,
    "train": {
      "steps": dataset.steps,
      "batch_size": dataset.rows,
      "accumulate": dataset.accumulate,
    },
    "init": {"checkpoint": options.init} if options.init else base,
  }
