"""Pictures that are read again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from llava_sp_jax.data import anyres
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.requests import LostImageError
from llava_sp_jax.models import build
from tests.conftest import ConfigMaker


def test_an_image_of_another_size_is_not_taken_for_the_first(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  """Its tiles would be others than the prompt has places for."""
  config = tiny_config("finetune")
  side = config.model.tower.image_size
  pinpoints = ((side, 2 * side), (2 * side, side), (2 * side, 2 * side))
  data = dataclasses.replace(config.data, image_aspect="anyres", grid_pinpoints=pinpoints)
  tile = anyres.Tile(*build.tile_shape(config.model))
  pictures, path = PictureCache(anyres.Reader(data, tile), 9), tmp_path / "a.png"
  Image.new("RGB", (side, 2 * side)).save(path)
  assert pictures.plan("key", path).tiles == len(pictures.tiles("key", path)) == 3
  assert len(pictures.tiles("key", path)) == 3
  Image.new("RGB", (2 * side, 2 * side)).save(path)
  with pytest.raises(LostImageError, match="key: is not the picture that it was") as raised:
    pictures.tiles("key", path)
  assert raised.value.key == "key"


def test_pictures_that_were_read_first_are_forgotten(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  config = tiny_config("finetune")
  reader = anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model)))
  pictures = PictureCache(reader, 2)
  for name in "abc":
    Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    pictures.plan(name, tmp_path / f"{name}.png")
  assert [len(x) for x in (pictures._plans, pictures._tiles)] == [2, 2]
  (tmp_path / "c.png").unlink()
  assert len(pictures.tiles("c", tmp_path / "c.png")) == 1  # as it was read
  (tmp_path / "a.png").unlink()
  with pytest.raises(LostImageError, match=r"a\.png: no such file"):
    pictures.tiles("a", tmp_path / "a.png")
