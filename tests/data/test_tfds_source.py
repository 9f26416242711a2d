"""A TensorFlow Datasets source reads the same rows as LLaVA's JSON, and needs no tensorflow."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import forms, sources
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.image import Preprocess

PREPROCESS = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PREPARE = """
import sys
from pathlib import Path
from tests.data.tfds_builder import LlavaSamples
path, folder, layout, out = sys.argv[1:]
LlavaSamples(path=Path(path), image_folder=Path(folder), layout=layout, data_dir=out,
             file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def write_samples(folder: Path, with_text_only: bool) -> Path:
  rng = np.random.default_rng(0)
  samples = []
  for i in range(5):
    pixels = rng.integers(0, 256, (6 + i, 9, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
    turns = [("human", f"<image>\nwhat is {i}, é?"), ("gpt", f"it is {i}"), ("human", "sure?")]
    samples.append(
      {
        "id": f"s{i}",
        "image": f"{i}.png",
        "conversations": [{"from": who, "value": what} for who, what in turns],
      }
    )
  if with_text_only:
    turn = {"from": "human", "value": "no picture"}
    samples.append({"id": "text", "conversations": [turn, {"from": "gpt", "value": "none"}]})
  path = folder / "samples.json"
  path.write_text(json.dumps(samples))
  return path


def prepare(tmp_path: Path, layout: str, with_text_only: bool) -> tuple[Path, Path]:
  """Writes the data set in a process of its own; returns (JSON list, builder's folder)."""
  path = write_samples(tmp_path, with_text_only)
  out = tmp_path / "tfds"
  command = [sys.executable, "-c", PREPARE, str(path), str(tmp_path), layout, str(out)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return path, out / "llava_samples" / "1.0.0"


# An Image feature cannot be empty, so only the layout with a file's bytes has a text-only sample.
@pytest.mark.parametrize(("layout", "with_text_only"), [("json", True), ("sequence", False)])
def test_reads_what_llava_json_reads(tmp_path: Path, layout: str, with_text_only: bool) -> None:
  path, folder = prepare(tmp_path, layout, with_text_only)
  wanted = sources.LlavaJson(str(path), str(tmp_path), PREPROCESS)
  found = sources.open_path(str(folder), "", PREPROCESS)
  assert len(found) == len(wanted)
  by_id = {found[i]["id"]: found[i] for i in range(len(found))}  # TFDS shuffles when it writes
  for i in range(len(wanted)):
    sample, other = wanted[i], by_id[wanted[i]["id"]]
    assert forms.read(other) == dataclasses.replace(
      forms.read(sample), images=forms.read(other).images
    )
    pixels, others = wanted.images(sample), found.images(other)
    assert len(others) == len(pixels)
    for ours, theirs in zip(pixels, others, strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_a_broken_image_is_an_error_of_its_sample(tmp_path: Path) -> None:
  path = write_samples(tmp_path, with_text_only=False)
  source = sources.LlavaJson(str(path), str(tmp_path), PREPROCESS)
  tfds = object.__new__(sources.Tfds)
  tfds._folder, tfds._read = tmp_path, PREPROCESS
  with pytest.raises(SampleError, match="sample 's0': cannot be decoded"):
    tfds.images({**source[0], "image": b"not a picture"})


def test_other_keys_go_the_same_way(tmp_path: Path) -> None:
  """Messages as a sequence of dictionaries, several images, a system text; media that are not read."""
  file = io.BytesIO()
  Image.new("RGB", (4, 4)).save(file, "PNG")
  turns = {"role": [b"user", b"assistant"], "content": [b"a <image> b <image>?", b"c"]}
  record = {"id": b"x", "messages": turns, "images": [file.getvalue()] * 2, "system": b"Be terse."}
  tfds = object.__new__(sources.Tfds)
  tfds._folder, tfds._read = tmp_path, PREPROCESS
  tfds._records = [record, {**record, "video": np.zeros((2, 4, 4, 3), np.uint8)}]
  talk = forms.read(tfds[0])
  assert (talk.turns, talk.system) == ([("a <image> b <image>?", "c")], "Be terse.")
  assert [pixels.shape for pixels in tfds.images(tfds[0])] == [(8, 8, 3)] * 2
  assert tfds.sizes(tfds[0]) == [(4, 4)] * 2
  with pytest.raises(SampleError, match=r"`video` .* is not read"):
    forms.read(tfds[1])


def test_a_record_that_cannot_be_read_is_an_error_of_its_sample(tmp_path: Path) -> None:
  """A shard with a damaged record: whatever the reader raises."""

  class Records:
    def __getitem__(self, index: int) -> None:
      raise RuntimeError("crc mismatch")

  tfds = object.__new__(sources.Tfds)
  tfds._records = Records()
  with pytest.raises(SampleError, match="RuntimeError: crc mismatch"):
    forms.read(tfds[0])


def test_no_data_set_is_one_clear_error(tmp_path: Path) -> None:
  for path in (str(tmp_path), "no_such_data_set"):
    with pytest.raises(ConfigError, match=r"data\.path: .* expected a folder or name of Tensor"):
      sources.Tfds(path, "", PREPROCESS)
