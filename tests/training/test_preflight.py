"""Runs that cannot learn are refused before anything is kept, with all that is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.data import anyres, pipeline
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.training import loop, preflight
from llava_sp_jax.training.preflight import PreflightError, Seen
from tests.conftest import ConfigMaker


def tokenizer_of(config: config_lib.Config) -> Tokenizer:
  return Tokenizer(config.data.tokenizer)


def make(config: config_lib.Config, quarantine: pipeline.Quarantine | None = None) -> Any:
  tile = anyres.Tile(*build.tile_shape(config.model))
  return pipeline.make(config.data, tokenizer_of(config), tile, 4, 0, quarantine)


def settings(config: config_lib.Config) -> str:
  """The message that the config is refused with."""
  with pytest.raises(PreflightError) as error:
    preflight.check_config(config, tokenizer_of(config))
  return str(error.value)


def test_a_good_config_passes(tiny_config: ConfigMaker) -> None:
  for stage in ("pretrain", "pretrain_all", "finetune"):
    config = tiny_config(stage)
    preflight.check_config(config, tokenizer_of(config))


def test_all_problems_of_the_settings_at_once(tiny_config: ConfigMaker) -> None:
  config = tiny_config(
    "finetune",
    model={"lora": {"rank": 0}, "language_model": {"vocab_size": 100}},
    optimizer={"projector_learning_rate": 0.0},
    data={"row_length": 42},
  )
  message = settings(config)
  assert "vocab_size is 100" in message
  assert "optimizer.projector_learning_rate: 0.0" in message
  assert "(model.lora.rank is 0)" in message
  assert "data.row_length: an image of 1 tile is 42 tokens and rows have 42" in message
  assert len(message.splitlines()) == 1 + 4 + 1
  assert "--config.train.preflight=false" in message


def test_a_template_that_the_tokenizer_cannot_end(tiny_config: ConfigMaker) -> None:
  message = settings(tiny_config("finetune", data={"template": "mpt"}))
  assert "data.template 'mpt': replies end with '<|im_end|>', which this tokenizer reads" in message
  assert "that fit: v1, vicuna_v1" in message
  assert preflight.replies_end in preflight.SETTINGS


def test_tiles_that_do_not_fit(tiny_config: ConfigMaker) -> None:
  config = tiny_config(
    data={"image_aspect": "anyres", "grid_pinpoints": ((48, 48), (24, 48)), "images_per_row": 3}
  )
  message = settings(config)
  assert "an image of 5 tiles is 210 tokens and rows have 208" in message
  assert "data.images_per_row: 3, but one image can be 5 tiles" in message


def test_a_vocabulary_that_is_too_small_is_refused_in_any_case(tiny_config: ConfigMaker) -> None:
  config = tiny_config(
    model={"language_model": {"vocab_size": 100}},
    optimizer={"learning_rate": 0.0},
    train={"preflight": False},
  )
  message = settings(config)
  assert "vocab_size is 100" in message
  assert "learning_rate" not in message
  assert "preflight=false" not in message


def test_answers_that_are_cut_off(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  config = tiny_config(train={"batch_size": 4})
  weights = next(make(config))["weights"]
  learned = min(int(np.flatnonzero(row)[0]) for row in weights)
  short = dataclasses.replace(
    config, data=dataclasses.replace(config.data, row_length=learned, turns="chain")
  )
  with pytest.raises(PreflightError) as error:
    preflight.check_batches(short, make(short), lambda: 0, tmp_path)
  assert "none of the first 8 samples has a token to learn" in str(error.value)
  assert f"data.row_length {learned} cuts the answers off" in str(error.value)
  allowed = dataclasses.replace(short, train=dataclasses.replace(short.train, preflight=False))
  preflight.check_batches(allowed, make(allowed), lambda: 0, tmp_path)


def test_looking_leaves_the_data_where_they_were(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  config = tiny_config(data={"augment": "mirror_shift", "turns_per_row": 2})
  fresh, looked_at = make(config), make(config)
  preflight.check_batches(config, looked_at, lambda: 0, tmp_path)
  for _ in range(4):
    ours, theirs = next(looked_at), next(fresh)
    for name in theirs:
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_what_is_seen_in_a_batch(tiny_config: ConfigMaker) -> None:
  config = tiny_config()
  tokens = build.image_token_count(config.model)
  batch = next(make(config))
  assert preflight.look(batch, tokens) == Seen(samples=4, supervised=4, with_image=4)
  batch["weights"][0] = 0
  batch["slots"][1] = -1
  batch["slots"][2][batch["slots"][2] == tokens - 1] = -1  # the last token of an image is gone
  assert preflight.look(batch, tokens) == Seen(4, 3, 3, 1)
  assert preflight.look(batch, 0) == Seen(4, 3, 3, 0)


def test_what_the_batches_are_refused_for(tmp_path: Path) -> None:
  config, good = config_lib.Config(), Seen(16, 16, 8)
  assert preflight.judge(good, config) == []
  for changes, text in (
    ({"supervised": 7}, "only 7 of the first 16 samples have a token to learn"),
    ({"with_image": 0}, "none of the first 16 samples has an image"),
    ({"cut_images": 2}, "2 images have lost tokens to truncation"),
    ({"quarantined": 17}, "17 samples were left out and only 16 used; the commonest reason: x 1"),
  ):
    (problem,) = preflight.judge(dataclasses.replace(good, **changes), config, "x 1")
    assert text in problem
  lines = ('{"error": "no image 1"}', '{"error": "broken"}', '{"error": "no image 2"}', '{"er')
  (tmp_path / "q.jsonl").write_text("\n".join(lines))
  assert preflight._commonest(tmp_path / "q.jsonl") == "no image 1"
  assert preflight._commonest(tmp_path / "none.jsonl") == ""


A, B, FC1 = (
  "language_model/layers/q_proj/lora_a",
  "language_model/layers/q_proj/lora_b",
  "projector/fc1/kernel",
)


@pytest.mark.parametrize(
  ("squares", "images", "dead"),
  [((0, 1, 1), 9, []), ((0, 0, 1), 9, ["lora"]), ((0, 1, 0), 9, ["projector"]),
   ((1, 0, 0), 9, ["lora", "projector"]), ((0, 1, 0), 0, [])],
)  # fmt: skip
def test_gradients_of_the_first_step(squares: Any, images: int, dead: list[str]) -> None:
  metrics = {"grad_squares": np.asarray(squares, np.float32), "image_positions": np.float32(images)}
  config = config_lib.Config()
  if not dead:
    preflight.check_gradients(config, metrics, [FC1, B, A])
    return
  with pytest.raises(PreflightError) as error:
    preflight.check_gradients(config, metrics, [FC1, B, A])
  lines = str(error.value).splitlines()[1:-1]
  assert [line.strip().partition(":")[0] for line in lines] == dead


@pytest.mark.guard
def test_a_dead_decoder_is_refused_and_nothing_is_kept(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  """Decoder weights of 0 pass no gradient on: found by the first real step."""
  config = tiny_config(
    model={"language_model": {"initializer_range": 0.0}}, train={"save_every": 1, "steps": 2}
  )
  with pytest.raises(PreflightError) as error:
    loop.train(config, tmp_path / "run")
  assert "lora: the gradient of language_model/layers/" in str(error.value)
  assert "projector: the gradient of projector/fc1" in str(error.value)
  assert not on_disk.steps(tmp_path / "run")
  assert not (tmp_path / "run" / loop.METRICS_FILE).exists()
