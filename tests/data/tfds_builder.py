"""A small TensorFlow Datasets builder of LLaVA samples; its own module, as builders are imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


class LlavaSamples(tfds.core.GeneratorBasedBuilder):
  """Writes the LLaVA JSON list `path` with its images; `layout` names a row of `LAYOUTS`."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # nothing beside this file belongs to the data set (checksums, tags)

  def __init__(self, *, path: Path, image_folder: Path, layout: str, **kwargs: Any):
    self._path, self._folder, self._layout = path, image_folder, layout
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    turns, image, _ = LAYOUTS[self._layout]
    features = {"id": tfds.features.Text(), "conversations": turns(), "image": image()}
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

  def _split_generators(self, download_manager: Any) -> dict[str, Iterator[tuple[str, Any]]]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, Any]]:
    write_turns = LAYOUTS[self._layout][2]
    for sample in json.loads(self._path.read_text()):
      yield (
        sample["id"],
        {
          "id": sample["id"],
          "conversations": write_turns(sample["conversations"]),
          "image": self._image(sample),
        },
      )

  def _image(self, sample: dict[str, Any]) -> Any:
    file = self._folder / sample["image"] if "image" in sample else None
    if self._layout == "sequence":
      return str(file)
    return file.read_bytes() if file else b""


def text() -> Any:
  return tfds.features.Text()


def turn_sequence() -> Any:
  return tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})


def image() -> Any:
  return tfds.features.Image(shape=(None, None, 3), encoding_format="png")


# layout: (feature of the conversations, feature of the image, how conversations are written)
LAYOUTS = {"json": (text, text, json.dumps), "sequence": (turn_sequence, image, list)}
