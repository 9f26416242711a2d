"""What `--format huggingface` writes comes back, and its code prepares inputs as ours does."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import export, export_huggingface, formats
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import anyres
from tests.conftest import IMAGE_SIZE
from tests.convert.leaving import CANVASES, comes_back, pictures
from tests.convert.test_round_trip import assert_same, source, without_image_row


@pytest.mark.parametrize("variant", ["none", "cropping", "pooling_transformer", "register"])
def test_variants_come_back(variant: str, tmp_path: Path) -> None:
  comes_back(variant, tmp_path / "x")


def test_settings_come_back(tmp_path: Path) -> None:
  """Those of images, tokens and templates, and the scales of a variant."""
  projector = config_lib.ProjectorConfig(variant="both", scales=(3, 5), token_width=8)
  ours = source("both", rank=0, projector=projector, image_newline=True)
  data = dataclasses.replace(
    ours.config.data,
    image_aspect="anyres",
    grid_pinpoints=((96, 192), (192, 96)),
    patch_merge="spatial_unpad",
    image_fit="stretch",
    image_resample="bilinear",
    image_mean=(0.5, 0.4, 0.3),
    template="chatml_direct",
    row_length=777,
  )
  ours = dataclasses.replace(ours, config=dataclasses.replace(ours.config, data=data))
  export.export(ours, "huggingface", tmp_path / "x")
  back = formats.open_checkpoint(tmp_path / "x")
  assert back.config.data == data
  assert back.config.model.projector == projector
  assert_same(ours, without_image_row(back))


@pytest.mark.parametrize(
  ("file", "change", "message"),
  [
    ("config.json", {"projector": {"detail_sizes": [8]}}, r"detail_sizes is \[8\], but \[16\] is"),
    ("config.json", {"projector": {"variant": "crop"}}, "projector.variant: unknown 'crop'"),
    ("config.json", {"projector": {"scales": [4, 3]}}, "expected growing sizes"),
    ("config.json", {"num_spatial_tokens": 5}, "num_spatial_tokens is 6, expected 5"),
    ("config.json", {"projector": {"kernels": 1}}, "projector: unknown key kernels"),
    ("processor_config.json", {"patch_size": 5}, "patch_size is 5, expected 4"),
    ("processor_config.json", {"image_processor": {"image_fit": None}}, "image_fit"),
    ("processor_config.json", {"image_processor": {"do_pad": True}}, "unknown key do_pad"),
  ],
)
def test_folders_that_contradict_themselves(
  file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
  export.export(source("cropping", rank=0), "huggingface", tmp_path / "x")
  values = json.loads((tmp_path / "x" / file).read_text())
  for key, value in change.items():
    values[key] = {**values[key], **value} if isinstance(value, dict) else value
  (tmp_path / "x" / file).write_text(json.dumps(values))
  with pytest.raises((FormatError, config_lib.ConfigError), match=message):
    formats.open_checkpoint(tmp_path / "x")


def test_a_variant_that_the_code_lacks_is_refused(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  monkeypatch.setattr(export_huggingface, "EXTRACTORS", frozenset({"register"}))
  with pytest.raises(FormatError, match=r"variant pooling has conv, which the code .* lacks"):
    export.export(source("pooling", rank=0), "huggingface", tmp_path / "x")


def test_the_code_stands_alone() -> None:
  """It imports nothing of this package, and is copied as it is."""
  allowed = {"__future__", "collections", "math", "typing", "numpy", "PIL", "torch", "transformers"}
  for file in export_huggingface.FILES:
    tree = ast.parse((export_huggingface.CODE / f"{file}.py").read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        assert {alias.name.split(".")[0] for alias in node.names} <= allowed
      elif isinstance(node, ast.ImportFrom):
        assert node.module is not None
        own = node.level == 1 and node.module in export_huggingface.FILES
        assert own or (not node.level and node.module.split(".")[0] in allowed)


# The code of the folder, imported from where it stands in the package.


def test_its_order_of_tokens_is_ours() -> None:
  from llava_sp_jax.convert.remote_code import configuration_llava_sp as theirs

  rng = np.random.default_rng(0)
  canvases = ((672, 336), (336, 672), (672, 672), (1008, 336))
  swapped = [(height, width) for width, height in canvases]
  assert set(theirs.MERGES) == set(anyres.MERGES)
  for _ in range(300):
    width, height = (int(side) for side in rng.integers(1, 1500, 2))
    for merge in anyres.MERGES:
      for spatial, tiled in ((6, True), (0, True), (6, False)):
        tile = anyres.Tile(336, 24, spatial, newline=True)
        best = anyres.best_resolution((width, height), canvases) if tiled else None
        plan = anyres.plan(tile, (width, height), best, merge)
        order, tiles = theirs.token_order(
          (height, width), 336, 24, spatial, swapped if tiled else (), merge
        )
        assert tiles == plan.tiles
        ours = np.where(plan.slots == anyres.NEWLINE, theirs.NEWLINE, plan.slots)
        np.testing.assert_array_equal(order, ours)


@pytest.mark.parametrize("aspect", anyres.ASPECTS)
@pytest.mark.parametrize(("fit", "resample"), [("crop", "bicubic"), ("stretch", "bilinear")])
def test_its_pixels_are_ours(aspect: str, fit: str, resample: str) -> None:
  pytest.importorskip("torch")
  from llava_sp_jax.convert.remote_code import processing_llava_sp as theirs

  data = config_lib.DataConfig(
    image_aspect=aspect, image_fit=fit, image_resample=resample, grid_pinpoints=CANVASES
  )
  reader = anyres.Reader(data, anyres.Tile(IMAGE_SIZE, 6, 0))
  processor = theirs.LlavaSPImageProcessor(
    {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    aspect,
    fit,
    int(Image.Resampling[resample.upper()]),
    image_grid_pinpoints=[(height, width) for width, height in CANVASES],
  )
  given = pictures()
  given[1:4] = [given[1].convert("L"), given[2].convert("RGBA"), given[3].convert("P")]
  given.append(Image.fromarray(np.arange(24 * 30, dtype=np.uint16).reshape(24, 30) * 90))
  found = np.asarray(processor(given)["pixel_values"])
  for picture, pixels in zip(given, found, strict=True):
    ours = reader(picture).tiles.transpose(0, 3, 1, 2)
    tiles = pixels if aspect == "anyres" else pixels[None]
    np.testing.assert_array_equal(tiles[: len(ours)], ours)
    assert not tiles[len(ours) :].any()
  with pytest.raises(ValueError, match="do_resize: images are prepared as in training"):
    processor(given, do_resize=False)
  with pytest.raises(ValueError, match=r"found float64 \[24, 24, 3\]"):
    processor([np.zeros((24, 24, 3))])


def test_its_parts_are_those_that_are_listed() -> None:
  pytest.importorskip("torch")
  from llava_sp_jax.convert.remote_code import projector_llava_sp as theirs

  assert set(theirs.VIEWS) == export_huggingface.VIEWS
  assert set(theirs.EXTRACTORS) == export_huggingface.EXTRACTORS
  assert set(theirs.MERGES) == export_huggingface.MERGES
