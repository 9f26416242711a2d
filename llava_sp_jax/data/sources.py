"""Where samples come from: random-access sources of LLaVA-style dictionaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import image as image_lib
from llava_sp_jax.data.conversation import SampleError


class Source(Protocol):
  """Samples `{"id", "conversations"}` by index, and the decoded images of a sample."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...
  def images(self, sample: dict[str, Any]) -> list[np.ndarray]: ...


class LlavaJson:
  """LLaVA's own format: a JSON list of conversations beside a folder of images.

  Serves `blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json` as they are published.
  """

  def __init__(self, path: str, image_folder: str, preprocess: image_lib.Preprocess):
    """Raises: FileNotFoundError, or ConfigError when the file is not such a list."""
    if not Path(path).is_file():
      raise FileNotFoundError(f"data.path: no file {path!r}; expected a LLaVA JSON list")
    try:
      samples = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
      raise config_lib.ConfigError(
        f"data.path: {path} is not JSON ({error}); expected a LLaVA list of conversations"
      ) from None
    if not isinstance(samples, list) or not samples:
      raise config_lib.ConfigError(f"data.path: {path} is not a list with at least one sample")
    if image_folder and not Path(image_folder).is_dir():
      raise FileNotFoundError(f"data.image_folder: no folder {image_folder!r}")
    self._samples, self._folder, self._preprocess = samples, Path(image_folder), preprocess

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._samples[index]

  def images(self, sample: dict[str, Any]) -> list[np.ndarray]:
    """[H, W, 3] float32 each. Raises: SampleError when one cannot be read."""
    names = sample.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list):
      raise SampleError(f"`image` must be a file name or a list of them, found {names!r:.60}")
    return [self._preprocess(image_lib.read(self._folder / name)) for name in names]


SOURCES = {"llava_json": LlavaJson}
