"""Reads from foreign processor files how images are prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import json_files
from llava_sp_jax.convert import key_tables, keys
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.settings import is_llava_hf, llava, read_json
from llava_sp_jax.convert.torch_io import FormatError

# transformers' image processor -> how it makes an image square (`data.image.FITS`), and the aspect
# (`data.anyres.ASPECTS`) of transformers' LLaVA with that processor.
FITS = {"CLIPImageProcessor": "crop", "SiglipImageProcessor": "stretch"}
_PROCESSORS = {
  "CLIPImageProcessor": ("crop", "square"),
  "CLIPFeatureExtractor": ("crop", "square"),
  "SiglipImageProcessor": ("stretch", "square"),
  "LlavaImageProcessor": ("crop", "pad"),
  "LlavaNextImageProcessor": ("crop", "anyres"),
}
_DEFAULTS: dict[str, Json] = {  # defaults of transformers' classes
  "crop": {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "do_center_crop": True,
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
  },
  "stretch": {
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "size": {"height": 224, "width": 224},
  },
}
# The class that transformers uses if no file names one: by `model_type`, and for a tower by its
# variant.
_OF_MODELS = {"llava": "LlavaImageProcessor", "llava_next": "LlavaNextImageProcessor"}
_OF_TOWERS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
_CANVASES = [
  [336, 672],
  [672, 336],
  [672, 672],
  [1008, 336],
  [336, 1008],
]  # defaults of LlavaNext
# PIL's filters in the order of their numbers, which processors write.
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def images(
  values: Json,
  folder: Path,
  origin: Path,
  tower: config_lib.TowerConfig | None = None,
  allow_unknown: bool = False,
  alone: bool = False,
) -> Json:
  """Returns how images are prepared, as keys of `config.DataConfig`.

  Args:
    values: the config.json of the LLaVA, or of a tower.
    folder: where the settings of the tower's image processor are.
    origin: the folder of `values`, for messages.
    tower: sizes of the tower, which must fit; None is not compared.
    allow_unknown: whether keys that no table has are ignored.
    alone: whether there is only a tower, which may lack the settings.

  Raises: FormatError for settings that are missing, unknown, not supported or of another tower.
  """
  said = llava(values, f"{origin}/config.json", allow_unknown)
  hf = is_llava_hf(values)
  kind = _OF_TOWERS[tower.variant] if tower else "CLIPImageProcessor"
  kind = _OF_MODELS.get(values["model_type"], kind) if hf else kind
  files = _files(folder, said, allow_unknown, tower, kind, alone)
  path, processor = files[0]
  result, aspect = _pixels(processor, path, tower, kind)
  for other, theirs in files[1:]:
    canvases = theirs.get("image_grid_pinpoints") != processor.get("image_grid_pinpoints")
    if canvases or _pixels(theirs, other, tower, kind) != (result, aspect):
      raise FormatError(
        f"{folder}: {path.name} and {other.name} prepare pictures in two ways; move the wrong one "
        "away"
      )
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
  if not hf and aspect == "anyres":  # for a single tile, the merge type has no effect
    result["patch_merge"] = said.get("mm_patch_merge_type") or "flat"
  return result


def _canvases(listed: Any, processor: Json, path: Path) -> Any:
  """Returns the canvases of LlavaNext as (height, width).

  Their order decides between equally good ones.

  Raises: FormatError when model and processor have different ones.
  """
  theirs, listed = processor.get("image_grid_pinpoints") or _CANVASES, listed or _CANVASES
  if listed != theirs:
    raise FormatError(
      f"{path}: image_grid_pinpoints {theirs!r:.100} are not those of config.json, {listed!r:.100}"
    )
  return listed


def _files(
  folder: Path,
  said: Json,
  allow_unknown: bool,
  tower: config_lib.TowerConfig | None,
  kind: str,
  alone: bool,
) -> list[tuple[Path, Json]]:
  """Returns the one or two files that say how images are prepared, with their honored keys.

  A tower alone may have none. Then the defaults of its class are used, as transformers does.
  """
  found: list[tuple[Path, Any]] = []
  joint, own = (folder / name for name in PROCESSOR_FILES[::-1])
  if joint.is_file():
    outer = keys.read(read_json(joint), key_tables.PROCESSOR, str(joint), allow_unknown)
    _fits_model(outer, joint, said, tower)
    if outer.get("image_processor") is not None:  # transformers 5 reads this first
      found.append((joint, outer["image_processor"]))
  if own.is_file():
    found.append((own, read_json(own)))
  if not found and joint.is_file():
    raise FormatError(f"{joint}: no image_processor in it: how pictures are prepared is not said")
  if not found and alone and tower:
    sizes = {
      name: dict.fromkeys(names, tower.image_size)
      for name, names in _DEFAULTS[_PROCESSORS[kind][0]].items()
      if name.endswith("size")
    }
    found.append((folder, {"image_processor_type": kind, **sizes}))
  if not found:
    raise FormatError(
      f"{folder}: no {' or '.join(PROCESSOR_FILES)}: how pictures are prepared is not said; put "
      "the file of the vision tower's processor there"
    )
  return [
    (path, keys.read(values, key_tables.PROCESSOR_IMAGE, str(path), allow_unknown))
    for path, values in found
  ]


def _fits_model(outer: Json, joint: Path, said: Json, tower: config_lib.TowerConfig | None) -> None:
  """Raises FormatError for a processor_config.json of another model than the folder's."""
  name = "vision_feature_select_strategy"
  if name in said and outer.get(name) not in (None, said[name]):
    raise FormatError(f"{joint}: {name} is {outer[name]!r}, but config.json says {said[name]!r}")
  patch = outer.get("patch_size")
  if tower and patch not in (None, tower.patch_size):
    raise FormatError(f"{joint}: patch_size is {patch}, but the tower's is {tower.patch_size}")


def _pixels(
  processor: Json, path: Path, tower: config_lib.TowerConfig | None, default: str
) -> tuple[Json, str]:
  """Returns keys of `config.DataConfig`, and the aspect of the image processor's class."""
  kind = processor.get("image_processor_type") or processor.get("feature_extractor_type")
  kind = (kind or default).removesuffix("Fast").removesuffix("Pil")
  if kind not in _PROCESSORS:
    known = ", ".join(_PROCESSORS)
    raise FormatError(f"{path}: unknown image processor {kind!a:.60}; known: {known}")
  fit, aspect = _PROCESSORS[kind]
  if aspect == "pad" and not processor.get("do_pad"):
    aspect = "square"
  elif aspect == "square" and processor.get("do_pad"):
    raise FormatError(f"{path}: not supported: do_pad=True of {kind}")
  processor = {**_DEFAULTS[fit], **processor}
  if isinstance(processor["size"], int) and processor.get("default_to_square"):
    raise FormatError(
      f"{path}: not supported: default_to_square=True with a size of one number, which some "
      "versions of transformers do not read; give size a height and a width"
    )
  size, square = _side(processor["size"], path)
  cropped = bool(processor.get("do_center_crop"))
  if fit == "crop" and not square and not cropped:
    raise FormatError(f"{path}: pictures are made square by no do_center_crop and no size")
  if fit == "stretch" and (cropped or not square):
    raise FormatError(f"{path}: not supported: do_center_crop or a shortest_edge of {kind}")
  crop = None
  if cropped:
    crop, _ = _side(processor["crop_size"], path)
  sides = {size, crop if cropped else size, tower.image_size if tower else size}
  if len(sides) > 1:
    raise FormatError(
      f"{path}: size {size}, crop_size {crop} and the tower's image_size "
      f"{tower and tower.image_size} differ; one size is computed"
    )
  return {
    "image_fit": "stretch" if square else "crop",
    "image_resample": RESAMPLE[processor.get("resample", 3)],
    "image_mean": tuple(float(v) for v in processor["image_mean"]),
    "image_std": tuple(float(v) for v in processor["image_std"]),
  }, aspect


def _side(value: Any, path: Path) -> tuple[int | None, bool]:
  """Returns the pixels of a size, and whether both sides have it.

  A single number is the size of the shorter side.
  """
  if value is None or isinstance(value, int):
    return value, False
  names = set(value)
  sides = {v for v in value.values() if keys.SIZE.holds(v)}
  if len(sides) == 1 and names in ({"shortest_edge"}, {"height", "width"}):
    return sides.pop(), names != {"shortest_edge"}
  raise FormatError(
    f"{path}: size {value!r:.60}: expected a shortest_edge, or a height and the same width"
  )


def _features(said: Json, tower: config_lib.TowerConfig, origin: str) -> None:
  """Raises FormatError for features that the tower does not compute."""
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
  """Returns the (width, height) of each canvas of anyres, from the setting `value`.

  The original also writes them as a text. `origin` names the file in the message.

  Raises: FormatError for anything else.
  """
  try:
    pairs = value
    if isinstance(value, str):
      pairs = json_files.parse(value.replace("(", "[").replace(")", "]").encode(), str(origin))
    if not keys.listing(keys.listing(keys.SIZE, 2, 2)).holds(pairs):
      raise ValueError
    return tuple((width, height) for width, height in pairs)
  except ValueError:
    raise FormatError(
      f"{origin}: image_grid_pinpoints {value!r:.80} is no list of (width, height)"
    ) from None
