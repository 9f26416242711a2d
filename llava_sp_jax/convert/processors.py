"""How pictures are prepared, as the processor files of others say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import json_files
from llava_sp_jax.convert import key_tables, keys
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.settings import is_llava_hf, llava, read_json
from llava_sp_jax.convert.torch_io import FormatError

# Image processor of transformers -> how it makes a picture square (`data.image.FITS`), and the
# aspect (`data.anyres.ASPECTS`) of a LLaVA of transformers that has it.
FITS = {"CLIPImageProcessor": "crop", "SiglipImageProcessor": "stretch"}
_PROCESSORS = {
  "CLIPImageProcessor": ("crop", "square"),
  "CLIPFeatureExtractor": ("crop", "square"),
  "SiglipImageProcessor": ("stretch", "square"),
  "LlavaImageProcessor": ("crop", "pad"),
  "LlavaNextImageProcessor": ("crop", "anyres"),
}
_DEFAULTS = {  # of transformers' classes: mean and deviation
  "crop": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "stretch": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_OF_TOWERS = {"clip": "crop", "siglip": "stretch"}
_CANVASES = [
  [336, 672],
  [672, 336],
  [672, 672],
  [1008, 336],
  [336, 1008],
]  # LlavaNext's, if none are said
# PIL's numbers of its filters, which processors write.
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def images(
  values: Json, folder: Path, origin: Path, tower: config_lib.Tower | None = None,
  allow_unknown: bool = False, alone: bool = False,
) -> Json:  # fmt: skip
  """Preprocessing as keys of `config.Data`: the model's own choices, then the tower's processor.

  `values` is the LLaVA's config.json, or a tower's; `folder` holds the processor's settings; `alone`
  says that there is a tower and nothing else.

  Raises: FormatError for settings that are missing, unknown, not computed or of another tower.
  """
  said = llava(values, f"{origin}/config.json", allow_unknown)
  path, processor = _processor(folder, said, allow_unknown, tower if alone else None)
  result, aspect = _pixels(processor, path, tower)
  hf = is_llava_hf(values)
  if not hf:
    aspect = said.get("image_aspect_ratio") or "square"
  if tower:
    _features(said, tower, f"{origin}/config.json")
  result["image_aspect"] = aspect
  listed = said.get("image_grid_pinpoints")
  if hf and aspect == "anyres":
    listed = _canvases(listed, processor, path)
    if result["image_resample"] != "bicubic":
      raise FormatError(f"{path}: tiles of anyres are cut from bicubic pictures only")
    result["patch_merge"] = "spatial_unpad"
    result["grid_pinpoints"] = tuple((width, height) for height, width in listed)
  elif listed:
    result["grid_pinpoints"] = pinpoints(listed, origin)
  if not hf and aspect == "anyres":  # one square has one order, whatever its config names
    result["patch_merge"] = said.get("mm_patch_merge_type") or "flat"
  return result


def _canvases(listed: Any, processor: Json, path: Path) -> Any:
  """(height, width) of LlavaNext's canvases, whose order decides between equally good ones.

  Raises: FormatError where model and processor have others.
  """
  theirs = processor.get("image_grid_pinpoints")
  if listed and theirs and listed != theirs:
    raise FormatError(
      f"{path}: image_grid_pinpoints {theirs!r:.100} are not those of config.json, {listed!r:.100}"
    )
  return listed or theirs or _CANVASES


def _processor(
  folder: Path, said: Json, allow_unknown: bool, alone: config_lib.Tower | None
) -> tuple[Path, Json]:
  """The file of a processor's settings, and what is honored of them.

  A tower alone may have none: then its class's defaults are taken, as transformers does.
  """
  path = next((folder / n for n in PROCESSOR_FILES if (folder / n).is_file()), None)
  if path is None and alone:
    kind = {fit: name for name, fit in FITS.items()}[_OF_TOWERS[alone.variant]]
    return folder, {"image_processor_type": kind}
  if path is None:
    raise FormatError(
      f"{folder}: no {' or '.join(PROCESSOR_FILES)}: how pictures are prepared is not said; put "
      "the file of the vision tower's processor there"
    )
  values = read_json(path)
  joint = folder / PROCESSOR_FILES[1]
  if joint.is_file():
    outer = keys.read(read_json(joint), key_tables.PROCESSOR, str(joint), allow_unknown)
    name = "vision_feature_select_strategy"
    if name in said and outer.get(name) not in (None, said[name]):
      raise FormatError(f"{joint}: {name} is {outer[name]!r}, but config.json says {said[name]!r}")
  if path == joint or isinstance(values.get("image_processor"), dict):
    values = values.get("image_processor") or {}
    if not values:
      raise FormatError(f"{path}: no image_processor in it: how pictures are prepared is not said")
  return path, keys.read(values, key_tables.PROCESSOR_IMAGE, str(path), allow_unknown)


def _pixels(processor: Json, path: Path, tower: config_lib.Tower | None) -> tuple[Json, str]:
  """Keys of `config.Data`, and the aspect that the processor alone stands for."""
  kind = processor.get("image_processor_type") or processor.get("feature_extractor_type")
  kind = (kind or "CLIPImageProcessor").removesuffix("Fast").removesuffix("Pil")
  if kind not in _PROCESSORS:
    known = ", ".join(_PROCESSORS)
    raise FormatError(f"{path}: unknown image processor {kind!a:.60}; known: {known}")
  fit, aspect = _PROCESSORS[kind]
  if aspect == "pad" and not processor.get("do_pad", True):
    aspect = "square"
  elif aspect == "square" and processor.get("do_pad"):
    raise FormatError(f"{path}: not supported: do_pad=True of {kind}")
  mean, std = _DEFAULTS[fit]
  size, square = _side(processor.get("size"), fit == "stretch", path)
  cropped = processor.get("do_center_crop")
  if fit == "crop" and (square or cropped is False):
    if not square:
      raise FormatError(f"{path}: pictures are made square by no do_center_crop and no size")
    fit = "stretch"
  elif fit == "stretch" and (cropped or not square):
    raise FormatError(f"{path}: not supported: do_center_crop or a shortest_edge of {kind}")
  crop, _ = _side(processor.get("crop_size") if cropped is not False else None, True, path)
  sides = {n for n in (size, crop if fit == "crop" else None, tower and tower.image_size) if n}
  if len(sides) > 1:
    raise FormatError(
      f"{path}: size {size}, crop_size {crop} and the tower's image_size "
      f"{tower and tower.image_size} differ; one size is computed"
    )
  return {
    "image_fit": fit, "image_resample": RESAMPLE[processor.get("resample", 3)],
    "image_mean": tuple(float(v) for v in processor.get("image_mean", mean)),
    "image_std": tuple(float(v) for v in processor.get("image_std", std)),
  }, aspect  # fmt: skip


def _side(value: Any, square: bool, path: Path) -> tuple[int | None, bool]:
  """Pixels of a size, and whether it is one of both sides; a number alone is what `square` says."""
  if value is None or isinstance(value, int):
    return value, square
  names = set(value)
  sides = {v for v in value.values() if keys.SIZE.holds(v)}
  if len(sides) == 1 and names in ({"shortest_edge"}, {"height", "width"}):
    return sides.pop(), names != {"shortest_edge"}
  raise FormatError(
    f"{path}: size {value!r:.60}: expected a shortest_edge, or a height and the same width"
  )


def _features(said: Json, tower: config_lib.Tower, origin: str) -> None:
  """Raises: FormatError for features that the tower here does not give."""
  odd = {
    ("clip", "mm_vision_select_feature"): ("cls_patch", "patch"),
    ("clip", "vision_feature_select_strategy"): ("full", "default"),
    ("siglip", "vision_feature_select_strategy"): ("default", "full"),
  }
  for (variant, name), (value, right) in odd.items():
    if tower.variant == variant and said.get(name) == value:
      raise FormatError(
        f"{origin}: not supported: {name}={value!r} with {variant} (known: {right!r}; the patches, "
        "all of them, and no class token are computed)"
      )
  width = said.get("mm_hidden_size")
  if width and width != tower.width:
    raise FormatError(f"{origin}: mm_hidden_size is {width}, but the tower is {tower.width} wide")


def pinpoints(value: Any, origin: Path) -> tuple[tuple[int, int], ...]:
  """Canvas sizes of anyres; the original also writes them as a text. Raises: FormatError."""
  try:
    pairs = value
    if isinstance(value, str):
      pairs = json_files.parse(value.replace("(", "[").replace(")", "]").encode(), str(origin))
    return tuple((int(width), int(height)) for width, height in pairs)
  except (ValueError, TypeError):
    raise FormatError(
      f"{origin}: image_grid_pinpoints {value!r:.80} is no list of (width, height)"
    ) from None
