"""Reads data sets of TensorFlow Datasets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import forms, source
from llava_sp_jax.data.failure import attempt


class Tfds(source.Samples):
  """Reads samples from TensorFlow Datasets, without tensorflow (array_record files only).

  Features are `id` (text), `conversations` (text with LLaVA's JSON list, or a sequence of
  `{from, value}`), and `image` (an Image, or a file's bytes; empty for a sample without one). The
  other keys that `forms` reads are supported as well: `messages`, `images`, `system`.
  """

  def __init__(self, path: str, image_folder: str, read: source.Reader, key: str = "data.path"):
    """Opens the split "train" of a data set.

    Args:
      path: the folder of a builder, or the name of a prepared data set.
      image_folder: the folder that names of images start from; bytes need none.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises: ConfigError when there is no such data set or its files are not array_record.
    """
    import tensorflow_datasets as tfds  # slow to import

    try:
      builder = tfds.builder_from_directory(path) if Path(path).is_dir() else tfds.builder(path)
      # Images are decoded in `images`, so that a broken one fails its sample and not the run.
      pictures = [key for key in forms.IMAGES if key in builder.info.features]
      skip = {key: tfds.decode.SkipDecoding() for key in pictures} or None
      self._records = builder.as_data_source("train", decoders=skip)
    except (NotImplementedError, ImportError, ValueError, LookupError, OSError) as error:
      raise config_lib.ConfigError(
        f"{key}: {path!r} cannot be read ({str(error).splitlines()[0]}); expected a folder or "
        "name of TensorFlow Datasets with split 'train', prepared with file_format='array_record'"
      ) from None
    # The version, and the shards with their lengths, which change when a data set is prepared
    # again.
    self._about = f"{builder.info.full_name} {builder.info.splits['train'].to_proto()}"
    super().__init__(image_folder, read)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Any:
    return attempt(lambda: self._sample(index))

  def _sample(self, index: int) -> dict[str, Any]:
    return {key: _plain(key, value) for key, value in self._records[index].items()}

  def fingerprint(self) -> str:
    """Returns a hash of the data set's name, version and shards; its values are not read."""
    return hashlib.sha256(self._about.encode()).hexdigest()

  def former_fingerprint(self) -> str:
    """Returns the same hash."""
    return self.fingerprint()


def _plain(key: str, value: Any) -> Any:
  """Converts the value of a feature to that of a JSON file; leaves others for `forms` to refuse."""
  if key in forms.DIALOGUES:
    return source.turns(value)
  if key in forms.IMAGES:
    return value if isinstance(value, bytes) else [bytes(file) for file in value]
  return source.text(value)
