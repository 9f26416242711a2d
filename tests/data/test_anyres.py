"""Tiles and the order of their tokens, against a slow and obvious twin and the original's numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import anyres, example, pipeline
from llava_sp_jax.data.anyres import Reader, Tile, plan
from llava_sp_jax.data.example import IMAGE_ID, NEWLINE, Run, layout
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import IMAGE_SIZE, PATCH_SIZE, ConfigMaker

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = np.load(GOLDEN / "imageproc" / "anyres.npz")
INPUTS = json.loads((GOLDEN / "inputs.json").read_text())
PINPOINTS = config_lib.DataConfig().grid_pinpoints
SIZES = {"wide": (700, 320), "tall": (320, 900), "big": (640, 600), "a": (96, 64)}  # of images/
CLIP = Tile(336, 24, 6, newline=True)

SPATIAL = (0, 1, 3, 6, 12, 49)
MANY_SIZES = (
  (1, 1), (2, 1), (56, 56), (57, 56), (56, 112), (100, 300), (300, 100), (333, 77), (77, 333),
  (640, 480), (480, 640), (1000, 999), (1, 2000), (2000, 1), (13, 1700), (1700, 13),
)  # fmt: skip


def naive(tile: Tile, size: tuple[int, int], canvas: tuple[int, int], merge: str) -> list[int]:
  """Concatenates lists of tokens as the original concatenates features, one patch at a time."""
  across, down = canvas[0] // tile.size, canvas[1] // tile.size
  numbers = itertools.count()
  tiles = [[next(numbers) for _ in range(tile.tokens)] for _ in range(1 + across * down)]
  if merge == "flat":
    return [token for tokens in tiles for token in tokens]
  result = [token for tokens in tiles for token in tokens[: tile.spatial]]
  result += tiles[0][tile.spatial :]
  height, width = down * tile.grid, across * tile.grid
  top = left = 0
  if merge == "spatial_unpad":
    if size[0] / size[1] > width / height:
      top = (height - int(size[1] * (width / size[0]))) // 2
    else:
      left = (width - int(size[0] * (height / size[1]))) // 2
  for y in range(top, height - top):
    for x in range(left, width - left):
      tokens = tiles[1 + (y // tile.grid) * across + x // tile.grid]
      result.append(tokens[tile.spatial + (y % tile.grid) * tile.grid + x % tile.grid])
    if merge == "spatial_unpad":
      result.append(NEWLINE)
  return result


@pytest.mark.parametrize("merge", anyres.MERGES)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_plans_equal_naive_concatenation(spatial: int, merge: str) -> None:
  tile = Tile(56, 4, spatial, newline=True)
  pinpoints = [(w // 6, h // 6) for w, h in PINPOINTS]
  for size in MANY_SIZES:
    canvas = anyres.best_resolution(size, pinpoints)
    found = plan(tile, size, canvas, merge)
    assert found.slots.tolist() == naive(tile, size, canvas, merge), (size, canvas)
    assert found.slots.dtype == np.int32
    assert found.tiles == 1 + canvas[0] * canvas[1] // 56**2


@pytest.mark.parametrize("merge", anyres.MERGES)
@pytest.mark.parametrize("name", ["wide", "tall", "big"])
def test_lengths_are_the_original_s(name: str, merge: str) -> None:
  canvas = anyres.best_resolution(SIZES[name], PINPOINTS)
  found = plan(CLIP, SIZES[name], canvas, merge)
  assert len(found.slots) == EXPECTED[f"merge_{merge}_{name}_shape"][0]
  assert found.tiles == EXPECTED[f"tiles_{name}_shape"][0]


def test_spatial_tokens_of_all_tiles_come_first() -> None:
  """The first rows of the original's features: spatial tokens tile by tile, then base patches."""
  head = EXPECTED["anyres_features_head"]
  slots = plan(CLIP, SIZES["tall"], (336, 1008), "spatial_unpad").slots[: len(head)]
  for row, slot in zip(head, slots, strict=True):
    tile, token = divmod(int(slot), CLIP.tokens)
    known = (
      EXPECTED["image_features_start"][token] if not tile else EXPECTED["sp_tokens"][tile][token]
    )
    np.testing.assert_allclose(row, known, atol=1e-5)


@pytest.mark.parametrize("part", ["single", "batch"])
def test_text_stands_where_the_original_puts_it(part: str) -> None:
  samples = [INPUTS["single"]] if part == "single" else INPUTS["batch"]["rows"]
  names = [INPUTS["anyres"]["single"]] if part == "single" else INPUTS["anyres"]["batch"]
  rows = []
  for sample, images in zip(samples, names, strict=True):
    plans = [
      plan(CLIP, SIZES[n], anyres.best_resolution(SIZES[n], PINPOINTS), "spatial_unpad")
      for n in images
    ]
    runs = example.from_labels(sample["input_ids"], sample["labels"])
    rows.append(layout(runs, plans, EXPECTED[f"{part}/expanded_len"][1]))
  assert max(row.length for row in rows) == EXPECTED[f"{part}/expanded_len"][1]
  text = [(i, p) for i, row in enumerate(rows) for p in np.flatnonzero(row.slots[: row.length] < 0)]
  golden = zip(EXPECTED[f"{part}/text_rows"], EXPECTED[f"{part}/text_positions"], strict=True)
  assert text == list(golden)
  labels = [
    [i, p + 1, row.targets[p]] for i, row in enumerate(rows) for p in np.flatnonzero(row.weights)
  ]
  assert labels == EXPECTED[f"{part}/expanded_labels_sparse"].tolist()


def test_one_tile_alone_has_its_own_order_and_one_newline() -> None:
  """The original uses the spatial tokens of the image before it, or stops."""
  tile = Tile(8, 2, 3, newline=True)
  own = list(range(7))
  assert plan(tile, (5, 9), None, "spatial_unpad").slots.tolist() == [*own, NEWLINE]
  assert plan(tile, (5, 9), None, "spatial").slots.tolist() == own
  assert plan(tile, (5, 9), None, "flat").slots.tolist() == own
  assert example.one_tile(7).slots.tolist() == own


@pytest.mark.parametrize(("size", "rows"), [((1, 2000), 48), ((2000, 1), 0)])
def test_of_a_line_only_the_whole_picture_is_left(size: tuple[int, int], rows: int) -> None:
  """As in the original, unpadding leaves no patch; rows without patches still end."""
  slots = plan(CLIP, size, (336, 672), "spatial_unpad").slots
  assert slots.tolist() == [
    *(t * CLIP.tokens + n for t in range(3) for n in range(6)),
    *range(6, CLIP.tokens),
    *[NEWLINE] * rows,
  ]


def test_images_of_a_row_follow_each_other_and_share_the_newline() -> None:
  tile = Tile(2, 1, 1, newline=True)  # 2 tokens: one spatial, one patch
  first = plan(tile, (4, 2), (4, 2), "spatial_unpad")
  second = plan(tile, (2, 2), None, "spatial_unpad")
  assert first.slots.tolist() == [0, 2, 4, 1, 3, 5, NEWLINE]
  runs = [Run((7, IMAGE_ID, 8, IMAGE_ID), (False,) * 4)]
  row = layout(runs, [first, second], 14, row_tiles=6)
  assert row.slots.tolist() == [-1, 0, 2, 4, 1, 3, 5, 12, -1, 6, 7, 12, -1, -1]
  assert layout(runs, [first, second], 14).slots.max() == 8  # room for exactly its four tiles
  with pytest.raises(SampleError, match=r"2 images of 4 tiles, but data.images_per_row is 3"):
    layout(runs, [first, second], 14, row_tiles=3)


def reader(**values: object) -> Reader:
  return Reader(config_lib.DataConfig(**values), CLIP)  # type: ignore[arg-type]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"image_aspect": "nope"}, "data.image_aspect: unknown 'nope'; known: anyres, pad, square"),
    ({"image_fit": "nope"}, "data.image_fit: unknown 'nope'; known: crop, stretch"),
    ({"patch_merge": "nope"}, "data.patch_merge: unknown 'nope'; known: flat, spatial, spatial_"),
    ({"image_aspect": "anyres", "grid_pinpoints": ()}, r"data.grid_pinpoints: none given"),
    ({"image_aspect": "anyres", "grid_pinpoints": ((336, 400), (336, 336))},
     r"data.grid_pinpoints: \[\(336, 400\)\] given; .* multiples of model.tower.image_size, 336"),
    ({"image_aspect": "anyres", "grid_pinpoints": ((336, 0),)}, r"\[\(336, 0\)\] given"),
    ({"image_aspect": "anyres", "augment": "mirror_shift"}, "data.augment: 'mirror_shift' would"),
  ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_errors(values: dict, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    reader(**values)


def test_unpadding_needs_the_model_s_newline() -> None:
  with pytest.raises(ConfigError, match=r"'spatial_unpad' needs model.image_newline=true"):
    Reader(config_lib.DataConfig(patch_merge="spatial_unpad"), Tile(336, 24, 6))


def test_the_most_tiles_of_a_picture() -> None:
  assert reader(image_aspect="anyres").max_tiles == 5
  assert reader().max_tiles == 1


SMALL = {
  "image_aspect": "anyres",
  "patch_merge": "spatial_unpad",
  "images_per_row": 5,
  "grid_pinpoints": ((24, 48), (48, 24), (48, 48)),
  "row_length": 400,
}
TILE = Tile(IMAGE_SIZE, IMAGE_SIZE // PATCH_SIZE, 6, newline=True)


@pytest.fixture
def config(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.Config:
  """One picture of 48 x 40 pixels, with one question."""
  pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "0.png")
  talk = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "red"}]
  sample = {"id": "x", "image": "0.png", "conversations": talk}
  (tmp_path / "train.json").write_text(json.dumps([sample]))
  paths = {"path": str(tmp_path / "train.json"), "image_folder": str(tmp_path)}
  return tiny_config(model={"image_newline": True}, data={**SMALL, **paths})


def test_training_and_inference_make_the_same_row(config: config_lib.Config) -> None:
  from llava_sp_jax.infer.caches import PictureCache
  from llava_sp_jax.infer.prompts import Prompts
  from llava_sp_jax.infer.requests import Request, key_of

  tokenizer = Tokenizer(config.data.tokenizer)
  batch = next(pipeline.make(config.data, tokenizer, TILE, batch_size=1, seed=0))
  pictures, picture = PictureCache.of(config), Path(config.data.image_folder) / "0.png"
  prompts = Prompts(config, tokenizer, pictures)
  asked = prompts(Request("what is it?", (picture,)))
  tiles = pictures.tiles(key_of(picture), picture)
  np.testing.assert_array_equal(tiles, batch["images"][0])
  assert batch["images"].any(axis=(2, 3, 4)).all()  # five tiles of picture
  length = int(np.flatnonzero(batch["weights"][0])[0]) + 1  # up to the answer
  assert asked.length == length
  for name in ("tokens", "slots"):
    joined = np.concatenate([getattr(piece, name) for piece in asked.pieces])
    np.testing.assert_array_equal(joined, batch[name][0][:length])
  newline = 5 * TILE.tokens
  assert batch["slots"].max() == newline
  shown = plan(TILE, (48, 40), (48, 48), "spatial_unpad").slots
  slots = batch["slots"][0]
  assert slots[slots >= 0].tolist() == np.where(shown == NEWLINE, newline, shown).tolist()


def test_too_many_tiles_cost_the_sample(config: config_lib.Config, tmp_path: Path) -> None:
  data = config_lib.override(config, {"config.data.images_per_row": "4"}).data
  with pytest.raises(ConfigError, match=r"1 images of 5 tiles, but data.images_per_row is 4"):
    next(pipeline.make(data, Tokenizer(data.tokenizer), TILE, batch_size=1, seed=0))


def test_pinpoints_travel_in_the_config(config: config_lib.Config) -> None:
  assert config.data.grid_pinpoints == SMALL["grid_pinpoints"]
  assert config_lib.from_json(config_lib.to_json(config)) == config
  text = "((24, 48), (48, 24))"
  changed = config_lib.override(config, {"config.data.grid_pinpoints": text})
  assert changed.data.grid_pinpoints == ((24, 48), (48, 24))
  with pytest.raises(ConfigError, match="grid_pinpoints"):
    config_lib.override(config, {"config.data.grid_pinpoints": "(24, 48"})
  with pytest.raises(ConfigError, match=r"grid_pinpoints\[0\]"):
    config_lib.override(config, {"config.data.grid_pinpoints": "(24, 48)"})
