"""Pixels of every picture and processor against the original's, to the last bit."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, decode, image
from llava_sp_jax.data.failure import SampleError

FOLDER = Path(__file__).parents[1] / "golden" / "imageproc"
GOLDEN = json.loads((FOLDER / "image.json").read_text())
PROBES = np.load(FOLDER / "probes.npz")
PINPOINTS = tuple(map(tuple, GOLDEN["pinpoints"]))
CLIP = {
  "image_mean": (0.48145466, 0.4578275, 0.40821073),
  "image_std": (0.26862954, 0.26130258, 0.27577711),
}
SIGLIP = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "image_fit": "stretch"}
PROCESSORS = {"clip336": (336, CLIP), "clip224": (224, CLIP), "siglip336": (336, SIGLIP)}
MODES = {"pad": "pad", "none": "square", "anyres": "anyres"}  # the golden file's: ours
OUTPUTS = {k: o for p in GOLDEN["images"].values() for k, o in p["out"].items()}


@functools.cache
def reader(processor: str, mode: str) -> anyres.Reader:
  size, values = PROCESSORS[processor]
  data = config_lib.DataConfig(image_aspect=MODES[mode], grid_pinpoints=PINPOINTS, **values)  # type: ignore[arg-type]
  return anyres.Reader(data, anyres.Tile(size, size // 14))


def digest(picture: Image.Image) -> str:
  return hashlib.sha256(picture.tobytes()).hexdigest()


def opened(name: str) -> Image.Image:
  return decode.read(FOLDER / f"{name}.png")


@pytest.mark.parametrize("name", GOLDEN["images"])
def test_pictures_before_the_processor(name: str) -> None:
  golden = GOLDEN["images"][name]
  picture = opened(name)
  assert picture.size == tuple(golden["size"])
  assert digest(picture) == golden["rgb_sha256"]
  square = image.pad_to_square(picture, reader("clip336", "pad").preprocess.pad_color)
  assert square.size == tuple(golden["expand2square"]["size"])
  assert digest(square) == golden["expand2square"]["sha256"]
  best = anyres.best_resolution(picture.size, PINPOINTS)
  canvas = anyres.on_canvas(picture, best)
  assert list(best) == golden["anyres"]["best"]
  assert digest(canvas) == golden["anyres"]["resized_sha256"]
  assert len(anyres.cut(canvas, 336)) == golden["anyres"]["tiles"]
  assert [side // 336 for side in best] == golden["anyres"]["grid_shape"]


@pytest.mark.parametrize("key", [key for key, output in OUTPUTS.items() if "raises" not in output])
def test_pixels(key: str) -> None:
  name, processor, mode = key.split("/")
  tiles = reader(processor, mode)(opened(name)).tiles.transpose(0, 3, 1, 2)
  shape = (1, *tiles.shape) if mode == "anyres" else tiles.shape
  assert list(shape) == OUTPUTS[key]["shape"]
  flat = np.ascontiguousarray(tiles).reshape(-1)
  places = np.random.default_rng(flat.size).integers(0, flat.size, 64)
  np.testing.assert_array_equal(flat[places], PROBES[key])
  for found, wanted in ((np.mean, "mean"), (np.std, "std")):
    assert abs(found(flat, dtype=np.float64) - OUTPUTS[key][wanted]) < 1e-9


@pytest.mark.parametrize("key", [key for key, output in OUTPUTS.items() if "raises" in output])
def test_a_single_pixel_is_a_picture(key: str) -> None:
  """The original cannot tell channels from pixels here; one pixel fills the whole square."""
  name, processor, mode = key.split("/")
  assert name == "tiny"
  (tile,) = reader(processor, mode)(opened(name)).tiles
  color = np.asarray(opened(name), np.float64).reshape(3) / 255
  values = PROCESSORS[processor][1]
  wanted = (color - values["image_mean"]) / values["image_std"]
  np.testing.assert_allclose(tile, np.broadcast_to(wanted, tile.shape), atol=1e-6)


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("fit", image.FITS)
def test_a_picture_of_few_rows_keeps_its_channels(height: int, fit: str) -> None:
  """Three rows are not three channels, as the original believes."""
  pixels = np.random.default_rng(0).integers(0, 256, (height, 8, 3), dtype=np.uint8)
  found = image.Preprocess(28, (0.0,) * 3, (1.0,) * 3, fit).square(Image.fromarray(pixels))
  for channel in range(3):
    alone = image.FITS[fit].make(Image.fromarray(np.ascontiguousarray(pixels[..., channel])), 28)
    np.testing.assert_array_equal(np.rint(found[..., channel] * 255), np.asarray(alone))


def test_padding_colors() -> None:
  for processor, color in GOLDEN["pad_background"].items():
    assert list(reader(processor, "pad").preprocess.pad_color) == color


def test_best_resolutions() -> None:
  for entry in GOLDEN["select_best_resolution"]:
    best = anyres.best_resolution(tuple(entry["size"]), PINPOINTS)
    assert list(best) == entry["best"]
    assert [side // 336 for side in best] == entry["grid"]


def test_unpadding() -> None:
  """All of the original's, the two of a line included, which leave nothing."""
  empty = 0
  for entry in GOLDEN["unpad_image"]:
    height, width = entry["input"]
    left = anyres.unpad(np.arange(height * width).reshape(height, width), tuple(entry["orig"]))
    assert list(left.shape) == entry["shape"]
    assert left.sum() == entry["sum"]
    assert (left[0, 0] if left.size else None) == entry["first"]
    empty += not left.size
  assert empty == 2


def test_a_line_is_not_cropped() -> None:
  with pytest.raises(SampleError, match="2000x1 pixels is too long to be cropped"):
    reader("clip336", "none")(Image.new("RGB", (2000, 1)))
  assert reader("siglip336", "none")(Image.new("RGB", (2000, 1))).tiles.shape == (1, 336, 336, 3)


def test_the_golden_files_are_all_looked_at() -> None:
  assert len(GOLDEN["images"]) == 14
  assert set(PROBES.files) == {k for k, o in OUTPUTS.items() if "raises" not in o}
  assert len(PROBES.files) == 79
  assert len(GOLDEN["select_best_resolution"]) == len(GOLDEN["unpad_image"]) == 53
