"""How pixels are prepared, as a processor's file says or its class does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.convert import (
  processors,
  settings,
)
from llava_sp_jax.convert.torch_io import FormatError
from tests.convert.settings_files import one_line, write

CLIP = {
  "model_type": "clip_vision_model",
  "image_size": 28,
  "patch_size": 14,
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "intermediate_size": 64,
}
PIXELS = {
  "image_processor_type": "CLIPImageProcessor",
  "size": {"shortest_edge": 28},
  "crop_size": {"height": 28, "width": 28},
}


@pytest.mark.parametrize(
  ("changed", "found"),
  [
    ({"resample": 2}, {"image_resample": "bilinear"}),
    ({"resample": 1}, {"image_resample": "lanczos"}),
    ({"size": 28, "crop_size": 28}, {}),
    ({"image_processor_type": "CLIPImageProcessorFast"}, {}),
    ({"image_processor_type": "LlavaImageProcessor"}, {}),
    ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28},
      "crop_size": None}, {"image_fit": "stretch", "image_mean": (0.5, 0.5, 0.5),
                           "image_std": (0.5, 0.5, 0.5)}),
    ({"do_center_crop": False, "size": {"height": 28, "width": 28}}, {"image_fit": "stretch"}),
  ],
)  # fmt: skip
def test_pixels_are_prepared_as_the_processor_says(
  tmp_path: Path, changed: dict[str, Any], found: dict[str, Any]
) -> None:
  tower = settings.tower(CLIP, "x", -2)
  plain = {
    "image_fit": "crop",
    "image_resample": "bicubic",
    "image_aspect": "square",
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
  }
  folder = write(tmp_path, "preprocessor_config.json", {**PIXELS, **changed})
  assert processors.images(CLIP, folder, folder, tower) == {**plain, **found}


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"resample": 6}, "resample: expected a whole number from 0 to 5"),
    ({"do_resize": False}, "do_resize=False"),
    ({"do_normalize": False}, "do_normalize=False"),
    *(
      ({name: None}, f"{name}=None")
      for name in ("do_normalize", "do_rescale", "do_resize", "rescale_factor")
    ),
    ({"size": {"height": 28, "width": 28}, "crop_size": 14}, "size 28, crop_size 14 and"),
    ({"size": 28, "default_to_square": True}, "default_to_square=True with a size of one number"),
    ({"do_center_crop": None}, "made square by no do_center_crop"),
    ({"crop_size": None}, "size 28, crop_size None and the tower's image_size 28 differ"),
    ({"image_processor_type": "SiglipImageProcessor", "size": 28}, "a shortest_edge of Siglip"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor="),
    ({"image_mean": [0.5]}, "image_mean: expected a list of 3"),
    ({"image_std": [0.5, 0.0, 0.5]}, "image_std: expected a list of 3"),
    ({"image_mean": [math.nan] * 3}, "NaN is no number of JSON"),
    ({"size": {"shortest_edge": 32}}, "size 32, crop_size 28 and the tower's image_size 28"),
    ({"crop_size": {"height": 28, "width": 30}}, "expected a shortest_edge, or a height"),
    ({"size": {"longest_edge": 28}}, "expected a shortest_edge"),
    ({"do_center_crop": False}, "made square by no do_center_crop"),
    ({"do_pad": True}, "do_pad=True of CLIPImageProcessor"),
    ({"image_processor_type": "ViTImageProcessor"}, "unknown image processor 'ViTImageProcessor'"),
    ({"image_processor_type": 3}, "image_processor_type: expected a text"),
    ({"do_flip_channel_order": True}, "unknown key do_flip_channel_order"),
  ],
)
def test_a_processor_s_values_are_checked(
  tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
  folder = write(tmp_path, "preprocessor_config.json", {**PIXELS, **changed})
  with pytest.raises(FormatError, match=message) as error:
    processors.images(CLIP, folder, folder, settings.tower(CLIP, "x", -2))
  one_line(error)


def test_a_processor_s_file_alone_and_none(tmp_path: Path) -> None:
  """transformers 5 writes processor_config.json only; a tower alone may have no file at all."""
  tower = settings.tower(CLIP, "x", -2)
  joint = write(
    tmp_path / "joint",
    "processor_config.json",
    {"image_processor": {**PIXELS, "resample": 2}, "image_token": "<image>"},
  )
  assert processors.images(CLIP, joint, joint, tower)["image_resample"] == "bilinear"
  empty = write(tmp_path / "empty", "config.json", CLIP)
  assert processors.images(CLIP, empty, empty, tower, alone=True)["image_fit"] == "crop"
  with pytest.raises(FormatError, match="how pictures are prepared is not said"):
    processors.images(CLIP, empty, empty, tower)


def test_a_class_s_own_choices_where_a_file_does_not_say(tmp_path: Path) -> None:
  tower = dataclasses.replace(settings.tower(CLIP, "x", -2), image_size=224)
  folder = write(
    tmp_path, "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}
  )
  assert processors.images(CLIP, folder, folder, tower)["image_fit"] == "crop"
  with pytest.raises(FormatError, match="size 224, crop_size 224 and the tower's image_size 28"):
    processors.images(CLIP, folder, folder, settings.tower(CLIP, "x", -2))


@pytest.mark.parametrize(
  ("kind", "changed", "aspect"),
  [
    ("llava", {"image_processor_type": "LlavaImageProcessor"}, "square"),
    ("llava", {"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
    ("llava", {"image_processor_type": None, "do_pad": True}, "pad"),
    ("llava_next", {"image_processor_type": None, "image_grid_pinpoints": [[28, 56]]}, "anyres"),
  ],
)
def test_the_class_that_transformers_takes(
  tmp_path: Path, kind: str, changed: dict[str, Any], aspect: str
) -> None:
  values = {"model_type": kind, "text_config": {}, "vision_config": CLIP}
  if kind == "llava_next":
    values["image_grid_pinpoints"] = [[28, 56]]
  folder = write(tmp_path, "preprocessor_config.json", {**PIXELS, **changed})
  found = processors.images(values, folder, folder, settings.tower(CLIP, "x", -2))
  assert found["image_aspect"] == aspect


def test_two_processor_files_must_say_the_same(tmp_path: Path) -> None:
  """transformers 5 reads processor_config.json first, 4 does not."""
  tower = settings.tower(CLIP, "x", -2)
  folder = write(tmp_path, "preprocessor_config.json", PIXELS)
  write(folder, "processor_config.json", {"image_processor": {**PIXELS, "do_convert_rgb": True}})
  assert processors.images(CLIP, folder, folder, tower)["image_resample"] == "bicubic"
  write(folder, "processor_config.json", {"image_processor": {**PIXELS, "resample": 2}})
  with pytest.raises(
    FormatError, match=r"processor_config.json and preprocessor_config.json prepare"
  ):
    processors.images(CLIP, folder, folder, tower)
  write(folder, "processor_config.json", {"patch_size": 16})
  with pytest.raises(FormatError, match="patch_size is 16, but the tower's is 14"):
    processors.images(CLIP, folder, folder, tower)


def test_the_older_name_of_a_tower_s_group() -> None:
  """Of a whole CLIP, where it counts more than vision_config."""
  whole = {"model_type": "clip", "vision_config": CLIP, "vision_config_dict": {"patch_size": 14}}
  assert settings.tower(whole, "x", -2) == settings.tower(CLIP, "x", -2)
  alone = {"model_type": "clip", "vision_config_dict": CLIP}
  assert settings.tower(alone, "x", -2) == settings.tower(CLIP, "x", -2)
  with pytest.raises(FormatError, match="and vision_config_dict differ in patch_size"):
    settings.tower({**whole, "vision_config_dict": {"patch_size": 7}}, "x", -2)
