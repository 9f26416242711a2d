"""Pictures and random models that tests of exports share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax import recipes
from llava_sp_jax.convert import export, formats, leaves
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.data import conversation
from llava_sp_jax.data.tokenizer import train_bpe
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build
from llava_sp_jax.training import loop
from tests.conftest import REPOSITORY, ConfigMaker
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


def trained(folder: Path, variant: str, count: int) -> tuple[Path, list[tuple[Path, str]]]:
  """Trains on easy-VQA until pictures are told apart; returns the run, and questions of the test."""
  easy_vqa = pytest.importorskip("easy_vqa")
  questions, answers, numbers = easy_vqa.get_train_questions()
  turns: dict[int, list[dict[str, str]]] = {}
  for question, answer, number in zip(questions, answers, numbers, strict=True):
    mark = "" if number in turns else "<image>\n"
    turns.setdefault(number, []).extend(
      [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    )
  samples = [{"image": f"{n}.png", "conversations": turns[n]} for n in sorted(turns)[:400]]
  (folder / "train.json").write_text(json.dumps(samples))
  v1 = conversation.TEMPLATES["v1"]
  texts = [
    f"{v1.system}{v1.before}\n{q}{v1.after} {a}" for q, a in zip(questions, answers, strict=True)
  ]
  train_bpe(texts[:4000], folder / "tokenizer", 512)
  config = config_lib.override(
    recipes.load(f"{REPOSITORY}/configs/easy_vqa.py:stage=finetune,variant={variant}"),
    {
      "config.data.path": str(folder / "train.json"),
      "config.optimizer.stage": "pretrain_all",
      "config.data.image_folder": str(Path(easy_vqa.__file__).parent / "data/train/images"),
      "config.data.tokenizer": str(folder / "tokenizer"),
      "config.model.lora.rank": "0",
      "config.train.steps": "150",
      "config.optimizer.learning_rate": "1e-3",
    },
  )
  loop.train(config, folder / "run")
  questions, _, numbers = easy_vqa.get_test_questions()
  paths = easy_vqa.get_test_image_paths()
  chosen = range(0, len(questions), len(questions) // (count - 1))[:count]
  return folder / "run", [(Path(paths[numbers[i]]), questions[i]) for i in chosen]
