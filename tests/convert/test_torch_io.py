"""Files and folders of tensors: endings, shards, and folders that give two answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from llava_sp_jax.convert import torch_io
from llava_sp_jax.convert.torch_io import FormatError
from tests.convert.torch_files import SIX, save

ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4, dtype=np.int64),
}
INDEX = "model.safetensors.index.json"


def refused(folder: Path, message: str) -> None:
  with pytest.raises(FormatError, match=message) as raised:
    torch_io.open_named(folder, torch_io.WEIGHTS)
  assert "\n" not in str(raised.value)
  assert str(folder) in str(raised.value)


def test_other_files_are_named(tmp_path: Path) -> None:
  with pytest.raises(FormatError, match=r"gone.bin: no such file"):
    torch_io.open_file(tmp_path / "gone.bin")
  (tmp_path / "x.pt").write_text("x")
  with pytest.raises(FormatError, match=r"expected a file that ends with .safetensors or .bin"):
    torch_io.open_file(tmp_path / "x.pt")
  refused(tmp_path, r"no weights here; looked for model.safetensors, model.bin")


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors", INDEX])
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
  os.mkfifo(tmp_path / name)
  refused(tmp_path, "no weights here")
  if name != INDEX:
    with pytest.raises(FormatError, match=f"{name}: expected a regular file, found a pipe"):
      torch_io.open_file(tmp_path / name)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
  """A folder with two shards and their index."""
  for i, (name, array) in enumerate(ARRAYS.items()):
    safetensors.numpy.save_file({name: array}, tmp_path / f"model-{i}.safetensors")
  weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(ARRAYS)}
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return tmp_path


def point(folder: Path, **places: object) -> None:
  """Changes what the index says."""
  values = json.loads((folder / INDEX).read_text())
  values["weight_map"].update(places)
  (folder / INDEX).write_text(json.dumps(values))


def test_shards_are_put_together(sharded: Path) -> None:
  tensors = torch_io.open_named(sharded, torch_io.WEIGHTS)
  for name, wanted in ARRAYS.items():
    np.testing.assert_array_equal(tensors[name].array(), wanted)


@pytest.mark.parametrize("named", [0, 1])
def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(
  sharded: Path, named: int
) -> None:
  both = [ARRAYS["a"], ARRAYS["a"] + 1]
  for i, other in enumerate(ARRAYS):
    held = {"a": both[i], other: both[0] if other == "a" else ARRAYS[other]}
    safetensors.numpy.save_file(held | {"a": both[i]}, sharded / f"model-{i}.safetensors")
  point(sharded, a=f"model-{named}.safetensors")
  found = torch_io.open_named(sharded, torch_io.WEIGHTS)
  np.testing.assert_array_equal(found["a"].array(), both[named])
  np.testing.assert_array_equal(found["b"].array(), ARRAYS["b"])


def test_what_the_index_does_not_name_is_not_read(sharded: Path) -> None:
  safetensors.numpy.save_file(
    {"b": ARRAYS["b"], "stale": ARRAYS["b"]}, sharded / "model-1.safetensors"
  )
  assert torch_io.open_named(sharded, torch_io.WEIGHTS).keys() == ARRAYS.keys()


def test_a_missing_shard_is_named(sharded: Path) -> None:
  (sharded / "model-1.safetensors").unlink()
  refused(sharded, r"names files that are not there: model-1.safetensors")


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
  point(sharded, b="model-0.safetensors", lost="model-0.safetensors")
  refused(sharded, "named but not in the shard that it names: b, lost$")


@pytest.mark.parametrize("place", ["../../secret.safetensors", "/etc/passwd", "..", "", "a/b.bin"])
def test_an_index_may_not_point_outside_its_folder(sharded: Path, place: str) -> None:
  point(sharded, a=place)
  refused(sharded, f"files outside its folder: {place}$")


@pytest.mark.parametrize("place", ["x" * 300 + ".bin", "a\0.bin", "a\n.bin"])
def test_an_index_with_a_name_that_no_file_has_is_one_line(sharded: Path, place: str) -> None:
  point(sharded, a=place)
  refused(sharded, "names files that are not there: ")


@pytest.mark.parametrize(
  "text",
  [
    '{"weights": []}',
    '{"weight_map": {"a": 1}}',
    "[]",
    "{",
    '{"weight_map": ["a"]}',
    '{"weight_map": {"a": ["x"]}}',
  ],
)
def test_an_index_that_is_no_index_is_named(sharded: Path, text: str) -> None:
  (sharded / INDEX).write_text(text)
  refused(sharded, r"index.json: (expected|not) .*JSON")


def test_an_index_names_a_tensor_once(sharded: Path) -> None:
  (sharded / INDEX).write_text(
    '{"weight_map": {"a": "model-0.safetensors", "a": "model-1.safetensors"}}'
  )
  refused(sharded, "index.json: not JSON .the key 'a' is given twice")


def test_shards_beside_a_single_file_are_two_answers(sharded: Path) -> None:
  safetensors.numpy.save_file(ARRAYS, sharded / "model.safetensors")
  refused(sharded, f"holds both {INDEX} and model.safetensors: which")


@pytest.fixture
def in_both(tmp_path: Path) -> Path:
  """A folder with the same tensor as safetensors and as a pickle, as many published ones are."""
  safetensors.numpy.save_file({"a": SIX.reshape(2, 3)}, tmp_path / "model.safetensors")
  save(tmp_path / "pytorch_model.bin")
  return tmp_path


def test_the_same_in_two_formats_is_one_answer(in_both: Path) -> None:
  found = torch_io.open_named(in_both, torch_io.WEIGHTS)["a"]
  assert found.origin == str(in_both / "model.safetensors")


@pytest.mark.parametrize(
  "other", [SIX.reshape(2, 3) * 2, SIX.reshape(3, 2), SIX.astype(np.float64)]
)
def test_two_formats_that_differ_are_two_answers(in_both: Path, other: np.ndarray) -> None:
  safetensors.numpy.save_file({"a": other}, in_both / "model.safetensors")
  refused(in_both, r"holds both model.safetensors and pytorch_model.bin, which differ in a")


def test_what_cannot_be_read_is_no_second_answer(in_both: Path) -> None:
  (in_both / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")
  assert torch_io.open_named(in_both, torch_io.WEIGHTS).keys() == {"a"}
