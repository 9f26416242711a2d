"""Writes image tokens for programs that take them in place of images.

They are vLLM with `--enable-mm-embeds`, and llama.cpp, whose batches may hold embeddings. vLLM reads a bare [N, D] as N images of one token each, without an error. So the functions here
never write one where it would be read so.

Shape letters:  N tokens of an image . D width of the decoder
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llava_sp_jax.convert import torch_write
from llava_sp_jax.convert.torch_io import FormatError


def content_part(tokens: np.ndarray) -> dict[str, str]:
  """Returns a part of a chat message, of OpenAI's form, that is one image: its tokens [N, D].

  The server stacks the parts of a request itself.
  """
  _check([tokens])
  file = io.BytesIO()
  torch_write.save_value(tokens, file)
  data = base64.b64encode(file.getvalue()).decode()
  return {"type": "image_embeds", "image_embeds": data}


def _tensors(images: Sequence[np.ndarray], path: Path) -> None:
  """Writes what `torch.load` returns for `multi_modal_data`: a tensor [images, N, D], or a list.

  It is a list if the images have different numbers of tokens.
  """
  alike = len({image.shape for image in images}) == 1
  with path.open("wb") as file:
    torch_write.save_value(np.stack(images) if alike else list(images), file)


def _parts(images: Sequence[np.ndarray], path: Path) -> None:
  """Writes a part of a chat message for each image, one a line."""
  path.write_text("".join(f"{json.dumps(content_part(image))}\n" for image in images))


def _array(images: Sequence[np.ndarray], path: Path) -> None:
  """Writes what `numpy.load` returns as one array [images, N, D].

  Raises: FormatError for images with different numbers of tokens, and for bfloat16, which numpy does
    not know.
  """
  counts = sorted({len(image) for image in images})
  if len(counts) > 1:
    raise FormatError(
      f"{path}: the images have {counts} tokens, which are no one array; name a .safetensors file"
    )
  if images[0].dtype.kind != "f":
    raise FormatError(f"{path}: numpy has no {images[0].dtype}; take --dtype float32 or float16")
  np.save(path, np.stack(images))


def _arrays(images: Sequence[np.ndarray], path: Path) -> None:
  """Writes an array [N, D] for each image, named by its number: "0", "1", ..."""
  import safetensors.numpy

  safetensors.numpy.save_file({str(i): np.ascontiguousarray(x) for i, x in enumerate(images)}, path)


# By the ending of a file's name.
WRITERS: dict[str, Callable[[Sequence[np.ndarray], Path], None]] = {
  ".pt": _tensors,
  ".jsonl": _parts,
  ".npy": _array,
  ".safetensors": _arrays,
}


def check_name(path: Path) -> None:
  """Raises FormatError for a file whose ending is not in WRITERS."""
  if path.suffix not in WRITERS:
    raise FormatError(f"{path}: expected a file that ends with {', '.join(WRITERS)}")


def write(images: Sequence[np.ndarray], path: Path) -> None:
  """Writes the tokens [N, D] of images, in the form that the ending of `path` names.

  Raises: FormatError for an unknown ending, no images, or arrays that are not [N, D] of one width.
  """
  check_name(path)
  _check(images)
  WRITERS[path.suffix](images, path)


def _check(images: Sequence[np.ndarray]) -> None:
  shapes = [image.shape for image in images]
  if not images or any(len(shape) != 2 for shape in shapes) or len({s[1] for s in shapes}) != 1:
    raise FormatError(f"expected the tokens [N, D] of images, found arrays of shapes {shapes}")
