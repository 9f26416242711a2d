"""Prepares images and prompts for LLaVA-SP in transformers, with the pixels and ids of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .configuration_llava_sp import best_canvas, token_order

LONGEST = 200  # the largest aspect ratio of an image that is cropped
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF


class LlavaSPImageProcessor(BaseImageProcessor):
  """Makes an image square, or (anyres) cuts it into tiles, and normalizes its pixels."""

  model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012

  def __init__(
    self,
    size: dict[str, int] | None = None,
    image_aspect_ratio: str = "pad",
    image_fit: str = "crop",
    resample: int = 3,
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    image_grid_pinpoints: Sequence[Sequence[int]] = (),
    **kwargs: Any,
  ):
    """Takes the settings of a processor_config.json.

    Args:
      size: {"height", "width"} of a tile in pixels, which are equal.
      image_aspect_ratio: "pad" to a square, "square" (`image_fit` alone), or "anyres".
      image_fit: how an image becomes square: "crop" (as CLIP) or "stretch" (as SigLIP).
      resample: the number of PIL's filter.
      image_mean, image_std: of each channel, of values from 0 to 1.
      image_grid_pinpoints: canvases of anyres, (height, width) in pixels.
    """
    super().__init__(**kwargs)
    self.size = dict(size or {"height": 336, "width": 336})
    self.image_aspect_ratio = image_aspect_ratio
    self.image_fit = image_fit
    self.resample = resample
    self.image_mean, self.image_std = list(image_mean), list(image_std)
    self.image_grid_pinpoints = [list(pair) for pair in image_grid_pinpoints]

  @property
  def canvases(self) -> list[list[int]]:
    """The canvases of anyres, (height, width); none for a single tile."""
    return self.image_grid_pinpoints if self.image_aspect_ratio == "anyres" else []

  def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
    """Prepares images.

    Returns: `pixel_values` [images, 3, H, W]. With anyres they are [images, tiles, 3, H, W], padded
      to the tiles of the largest canvas, and there is `image_sizes` [images, 2], (height, width).
    """
    if odd := [name for name, value in kwargs.items() if value is not None]:
      raise ValueError(f"{', '.join(odd)}: images are prepared as in training, by the checkpoint")
    flat: Any = make_flat_list_of_images(images)
    pictures = [_rgb(image) for image in flat]
    side = self.size["height"]
    if not self.canvases:
      pixels = [self._pixels(self._single(picture)) for picture in pictures]
      return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors)
    most = 1 + max(height * width // side**2 for height, width in self.canvases)
    batch = np.zeros((len(pictures), most, 3, side, side), np.float32)
    for row, picture in zip(batch, pictures, strict=True):
      tiles = self._tiles(picture)
      row[: len(tiles)] = [self._pixels(tile) for tile in tiles]
    sizes = np.asarray([(picture.height, picture.width) for picture in pictures])
    data = {"pixel_values": batch, "image_sizes": sizes}
    return BatchFeature(data, tensor_type=return_tensors)

  def _single(self, picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if self.image_aspect_ratio != "pad" or picture.size == (side, side):
      return picture
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in self.image_mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square

  def _tiles(self, picture: Image.Image) -> list[Image.Image]:
    """Returns the whole image as one tile, then the tiles of its canvas, row by row."""
    side = self.size["height"]
    height, width = best_canvas((picture.height, picture.width), self.canvases)
    if width / picture.width < height / picture.height:
      inner = (width, min(math.ceil(picture.height * (width / picture.width)), height))
    else:
      inner = (min(math.ceil(picture.width * (height / picture.height)), width), height)
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
    canvas.paste(picture.resize(inner, Image.Resampling.BICUBIC), corner)
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    return [
      picture.resize((side, side), Image.Resampling.BICUBIC),
      *(canvas.crop((x, y, x + side, y + side)) for x, y in corners),
    ]

  def _pixels(self, picture: Image.Image) -> np.ndarray:
    """Makes an RGB image square and normalizes it. -> [3, H, W] float32."""
    side = self.size["height"]
    if picture.size != (side, side):
      picture = self._square(picture, side)
    scaled = (np.asarray(picture) * (1 / 255)).astype(np.float32)
    mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
    return ((scaled - mean) / std).transpose(2, 0, 1)

  def _square(self, picture: Image.Image, side: int) -> Image.Image:
    kind = Image.Resampling(self.resample)
    if self.image_fit == "stretch":
      return picture.resize((side, side), kind)
    short, long = sorted(picture.size)
    if long > LONGEST * short:
      raise ValueError(f"an image of {picture.width}x{picture.height} is too long to be cropped")
    enlarged = int(side * long / short)
    width, height = (side, enlarged) if picture.width <= picture.height else (enlarged, side)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), kind).crop((left, top, left + side, top + side))


def _rgb(image: Any) -> Image.Image:
  """Returns an image as 8-bit RGB. Takes PIL images, and arrays of bytes [H, W, 3] or [3, H, W]."""
  if not isinstance(image, Image.Image):
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
      raise ValueError(
        f"expected a PIL image, or bytes [H, W, 3] or [3, H, W], found {array.dtype} "
        f"{list(array.shape)}"
      )
    image = Image.fromarray(array if array.shape[2] == 3 else array.transpose(1, 2, 0))
  if image.mode.startswith("I;16"):  # the highest 8 bits, where 0 may be white
    tags = getattr(image, "tag_v2", {})
    bits, inverted = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
    values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    image = Image.fromarray(255 - values if inverted else values)
  if image.mode in ("I", "F"):
    raise ValueError(f"an image of mode {image.mode!r}: the range of its values is unknown")
  return image if image.mode == "RGB" else image.convert("RGB")


class LlavaSPProcessor(ProcessorMixin):
  """Prepares prompts with images: each `<image>` becomes as many ids as the image has tokens."""

  def __init__(
    self,
    image_processor: Any = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    patch_size: int = 14,
    num_spatial_tokens: int = 0,
    patch_merge_type: str = "flat",
    image_token: str = "<image>",
    **kwargs: Any,
  ):
    """Takes the settings of a processor_config.json.

    Args:
      image_processor, tokenizer: of this checkpoint.
      chat_template: Jinja of the conversation template.
      patch_size: pixels along a side of a patch.
      num_spatial_tokens: of one tile.
      patch_merge_type: how tiles are ordered, a row of `configuration_llava_sp.MERGES`.
      image_token: the text that stands for an image.
    """
    self.patch_size = patch_size
    self.num_spatial_tokens = num_spatial_tokens
    self.patch_merge_type = patch_merge_type
    self.image_token = image_token
    self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    super().__init__(image_processor, tokenizer, chat_template=chat_template)

  def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
    """Tokenizes prompts; one that already begins with the begin-of-sequence token gets no second."""
    first = text[0] if isinstance(text, list) and text else text
    start = self.tokenizer.bos_token
    if start and isinstance(first, str) and first.startswith(start):
      kwargs.setdefault("add_special_tokens", False)
    return super().__call__(images=images, text=text, **kwargs)

  def tokens_of(self, size: tuple[int, int]) -> int:
    """Returns the number of tokens of an image of (height, width) pixels."""
    side = self.image_processor.size["height"]
    grid, canvases = side // self.patch_size, self.image_processor.canvases
    order, _ = token_order(
      size, side, grid, self.num_spatial_tokens, canvases, self.patch_merge_type
    )
    return len(order)

  def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
    """Returns what replaces the mark of an image in a prompt: one mark for each of its tokens."""
    sizes = image_inputs.get("image_sizes")
    height, width = (1, 1) if sizes is None else (int(side) for side in sizes[image_idx])
    return self.image_token * self.tokens_of((height, width))

  def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
    """Returns the number of tokens of images of (height, width), which vLLM asks for."""
    if image_sizes is None:
      return MultiModalData()
    counts = [self.tokens_of((int(height), int(width))) for height, width in image_sizes]
    return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))
