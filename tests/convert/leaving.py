"""Pictures and random models that tests of exports share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from llava_sp_jax.convert import export, formats, leaves
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build
from tests.conftest import ConfigMaker
from tests.convert.test_round_trip import assert_same, source, without_image_row
from tests.infer.tiny import random_model

SIZES = [(24, 24), (31, 24), (18, 40), (60, 33), (96, 20), (7, 90)]
CANVASES = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72))  # (width, height)
QUESTION = "what colour is it?"
TILES = {
  "image_aspect": "anyres",
  "grid_pinpoints": CANVASES,
  "patch_merge": "spatial_unpad",
  "images_per_row": 5,
  "row_length": 512,
}


def pictures(count: int = 6) -> list[Image.Image]:
  rng = np.random.default_rng(5)
  sizes = [SIZES[i % len(SIZES)] for i in range(count)]
  return [
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for width, height in sizes
  ]


def random_one(tiny_config: ConfigMaker, variant: str, tiles: bool) -> Pretrained:
  model = {"lora": {"rank": 0}, "image_newline": tiles}
  return random_model(
    tiny_config("finetune", variant, model=model, data=TILES if tiles else {"row_length": 288})
  )


def write(model: Pretrained, out: Path, name: str = "huggingface") -> Path:
  arrays = flatten_dict(model.params, sep="/")
  tokenizer = Path(model.config.data.tokenizer)
  loaded = Loaded("memory", model.config, leaves.in_memory(arrays), formats.PARTS, tokenizer)
  export.export(loaded, name, out)
  return out


def comes_back(variant: str, out: Path) -> None:
  ours = source(variant, "bfloat16" if variant == "cropping" else "float32", rank=0)
  export.export(ours, "huggingface", out)
  back = formats.open_checkpoint(out)
  assert back.format == "huggingface"
  assert back.config.model.projector.variant == variant
  assert build.view_sizes(back.config.model) == build.view_sizes(ours.config.model)
  assert back.config.model.projector.scales == ()
  assert back.config.model.frozen_dtype == ours.config.model.frozen_dtype
  assert_same(ours, without_image_row(back))
