"""Reads a file of samples in JSON, and a folder of images."""

from __future__ import annotations

from typing import Any

from llava_sp_jax.data import sample_file, source
from llava_sp_jax.data.failure import attempt


class LlavaJson(source.Samples):
  """Reads a file of samples, and their images from a folder.

  Reads `blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json` as they are published.
  """

  def __init__(self, path: str, image_folder: str, read: source.Reader, key: str = "data.path"):
    """Reads the file of samples.

    Args:
      path: the file.
      image_folder: the folder that names of images start from; "" is the current one.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises:
      FileNotFoundError: when the file or the folder does not exist.
      ConfigError: when the file holds no samples.
    """
    self._samples = sample_file.read(path, key)
    super().__init__(image_folder, read)

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> Any:
    return attempt(lambda: self._samples[index])

  def fingerprint(self) -> str:
    """Returns the hash of the samples, in hexadecimal digits; images are not read."""
    return self._samples.fingerprint

  def former_fingerprint(self) -> str:
    """Returns the SHA-256 of the file's bytes."""
    return self._samples.digest
