"""What other people's JSON says becomes our config, value by value; what a stage starts from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import initial, runs, writing
from llava_sp_jax.convert import export, folding, formats, processors, settings, settings_out
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.errors import CheckpointError
from tests.convert.test_formats import GOLDEN, change_json
from tests.convert.test_round_trip import source

# No value here is a default of transformers or of ours.
SIZES = {
  "vocab_size": 48,
  "hidden_size": 24,
  "num_hidden_layers": 5,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 8,
  "intermediate_size": 40,
  "rms_norm_eps": 2e-4,
  "rope_theta": 7777.0,
  "max_position_embeddings": 99,
  "initializer_range": 0.05,
  "tie_word_embeddings": True,
}
OURS = config_lib.LanguageModelConfig(
  vocab_size=48,
  width=24,
  layers=5,
  heads=6,
  kv_heads=3,
  head_dim=8,
  mlp_width=40,
  norm_eps=2e-4,
  rope_theta=7777.0,
  max_positions=99,
  initializer_range=0.05,
  tie_embeddings=True,
)
LLAMA_3 = {
  "rope_type": "llama3",
  "factor": 3.0,
  "low_freq_factor": 1.5,
  "high_freq_factor": 5.0,
  "original_max_position_embeddings": 33,
}


@pytest.mark.parametrize(
  ("kind", "theirs", "ours"),
  [
    ("llama", {}, {}),
    ("llama", {"rope_scaling": LLAMA_3},
     {"rope_scaling": config_lib.RopeScaling(kind="llama3", factor=3.0, low_frequency=1.5,
                                             high_frequency=5.0, original_length=33)}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0,
                                "original_max_position_embeddings": 33}},
     {"rope_scaling": config_lib.RopeScaling(kind="dynamic", factor=3.0,
                                             original_length=OURS.max_positions)}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": None,
                                "original_max_position_embeddings": 33}},
     {"rope_scaling": config_lib.RopeScaling(kind="yarn", factor=3.0, original_length=33)}),
    ("mistral", {"sliding_window": 17}, {"sliding_window": 17}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 3},
     {"attention_bias": True, "sliding_window": 17, "window_from_layer": 3}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 17}, {"attention_bias": True}),
  ],
)  # fmt: skip
def test_a_decoder_s_sizes(kind: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
  """There, and back again as a config.json."""
  found = settings.language_model({"model_type": kind, **SIZES, **theirs}, "x")
  assert found == dataclasses.replace(OURS, **ours)
  said = settings_out.language_model_json(found, "bfloat16")
  assert settings.language_model(said, "y") == found
  assert (said["model_type"], said["torch_dtype"]) == (kind, "bfloat16")


@pytest.mark.parametrize("variant", ["clip", "siglip"])
def test_a_tower_s_sizes(variant: str) -> None:
  ours = config_lib.TowerConfig(
    variant=variant,
    image_size=60,
    patch_size=12,
    width=32,
    layers=7,
    heads=4,
    mlp_width=56,
    select_layer=-3,
  )
  said = settings_out.tower_json(ours, 7)
  assert settings.tower(said, "x", -3) == ours
  assert said["layer_norm_eps"] == {"clip": 1e-5, "siglip": 1e-6}[variant]


def test_how_pictures_are_read(tmp_path: Path) -> None:
  mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
  processor = {
    "image_processor_type": "SiglipImageProcessorFast",
    "image_mean": mean,
    "image_std": std,
  }
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
  anyres = {
    "mm_vision_tower": "clip",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[(20, 40), (40, 20)]",
    "mm_patch_merge_type": "spatial_unpad",
  }
  found = processors.images(anyres, tmp_path, tmp_path)
  assert found == {
    "image_aspect": "anyres",
    "image_fit": "stretch",
    "image_mean": tuple(mean),
    "image_resample": "bicubic",
    "image_std": tuple(std),
    "grid_pinpoints": ((20, 40), (40, 20)),
    "patch_merge": "spatial_unpad",
  }
  assert processors.images({}, tmp_path, tmp_path)["image_aspect"] == "square"
  back = settings_out.processor_json(config_lib.DataConfig(**found), 36)
  assert (back["image_mean"], back["image_std"]) == (mean, std)
  assert back["image_processor_type"] == "SiglipImageProcessor"


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_layer_that_a_checkpoint_was_trained_with(tmp_path: Path, layer: int) -> None:
  for name in ("base-llm", "clip-vit-tiny", "cropping/llava-lora"):
    shutil.copytree(GOLDEN / name, tmp_path / name)
  folder = tmp_path / "cropping/llava-lora"
  change_json(folder / "config.json", mm_vision_select_layer=layer)
  opened = formats.open_checkpoint(folder, formats.Options(variant="cropping"))
  tower = opened.config.model.tower
  assert tower.select_layer == layer
  assert opened.leaves["vision_tower/layers/q_proj/kernel"].shape[0] == tower.layers + 1 + layer


@pytest.mark.parametrize(
  ("stored", "computed"),
  [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")],
)
def test_what_is_stored_in_float32_is_computed_in_it(
  tmp_path: Path, stored: str, computed: str
) -> None:
  """And a merged export holds the folded kernels of a model with adapters."""
  ours = source("none", stored)
  export.export(ours, "llava", tmp_path / "x")
  back = formats.open_checkpoint(tmp_path / "x")
  assert (back.config.model.dtype, back.config.model.frozen_dtype) == (computed, stored)
  path = "language_model/layers/up_proj/kernel"
  np.testing.assert_array_equal(back.leaves[path].read(), folding.fold(ours).leaves[path].read())
  assert np.any(back.leaves[path].read() != ours.leaves[path].read())
  assert back.config.model.lora.rank == 0


# ---- what a stage starts from -----------------------------------------------------------------------


@pytest.fixture
def stage_1(tmp_path: Path) -> Path:
  """A whole checkpoint of ours without adapters and without spatial tokens."""
  writing.write(source("none", rank=0), tmp_path / "one")
  return tmp_path / "one"


def second(stage_1: Path, variant: str) -> config_lib.Config:
  model = source(variant).config.model
  return config_lib.Config(model=model, init=config_lib.InitConfig(checkpoint=str(stage_1)))


def test_stage_2_takes_all_of_stage_1_and_only_adapters_are_new(stage_1: Path) -> None:
  wanted = source("none", rank=0).leaves
  found = initial.initial_params(second(stage_1, "none"))
  for path, leaf in wanted.items():
    node: Any = found
    for key in path.split("/"):
      node = node[key]
    np.testing.assert_array_equal(node, leaf.read(), err_msg=path)
  adapter = found["language_model"]["layers"]["q_proj"]
  assert np.any(adapter["lora_a"])
  assert not np.any(adapter["lora_b"])


def test_a_projector_that_stage_1_lacks_is_an_error(stage_1: Path) -> None:
  with pytest.raises(FormatError, match=r"(?s)missing projector/pool_0/kernel.*projector/pool_5"):
    initial.initial_params(second(stage_1, "pooling"))


def test_an_unfinished_stage_1_is_an_error(stage_1: Path) -> None:
  config = runs.read_config(stage_1)
  longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
  runs.write_config(stage_1, longer)
  with pytest.raises(CheckpointError, match="stopped at step 0 of 9; finish it first"):
    initial.initial_params(second(stage_1, "none"))


def test_random_weights_are_those_of_the_seed() -> None:
  model = dataclasses.replace(source("none", rank=0).config.model)

  def kernel(seed: int) -> np.ndarray:
    config = config_lib.Config(model=model, train=config_lib.TrainConfig(seed=seed))
    return np.asarray(initial.initial_params(config)["projector"]["fc1"]["kernel"])

  first = kernel(0)
  np.testing.assert_array_equal(kernel(0), first)
  assert (kernel(5) != first).mean() > 0.9
