"""Samples with one, two or no pictures of several sizes, and batches of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import pipeline
from llava_sp_jax.data.anyres import Tile
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import IMAGE_SIZE, PATCH_SIZE, ConfigMaker, dialogue

TILE = Tile(IMAGE_SIZE, IMAGE_SIZE // PATCH_SIZE, 6, newline=True)
SIZES = ((24, 24), (48, 40), (24, 60), (50, 24))  # of pictures, in pixels
COUNT = 16


def write_mixed(folder: Path) -> dict[str, str]:
  """COUNT samples with one, two or no pictures of several sizes."""
  rng = np.random.default_rng(0)
  for i, (width, height) in enumerate(SIZES):
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  made = []
  for i in range(COUNT):
    talk = dialogue(i)
    sample: dict[str, Any] = {"id": str(i), "conversations": talk}
    if i % 4 == 0:
      talk[0]["value"] = talk[0]["value"].replace("<image>\n", "")
    elif i % 4 == 1:
      talk[0]["value"] = "<image>\n" + talk[0]["value"]
      sample["image"] = ["0.png", "2.png"]
    else:
      sample["image"] = f"{(i // 4) % len(SIZES)}.png"
    made.append(sample)
  (folder / "train.json").write_text(json.dumps(made))
  return {"path": str(folder / "train.json"), "image_folder": str(folder)}


def mixed_config(tiny_config: ConfigMaker, folder: Path, **data: Any) -> config_lib.Config:
  values = {
    "image_aspect": "anyres",
    "patch_merge": "spatial_unpad",
    "images_per_row": 12,
    "grid_pinpoints": ((24, 48), (48, 24), (48, 48)),
    "row_length": 900,
    "packing": "first_fit",
    **write_mixed(folder),
    **data,
  }
  return tiny_config(model={"image_newline": True}, data=values)


def make(data: config_lib.DataConfig, **options: Any) -> pipeline.Batches:
  values = {"batch_size": 4, "seed": 0} | options
  return pipeline.make(data, Tokenizer(data.tokenizer), TILE, **values)


def held(batch: dict[str, Any]) -> list[list[pipeline.Held]]:
  return batch[pipeline.SAMPLES]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key) if key != pipeline.SAMPLES else None
  assert held(a) == held(b)
