"""Reading torch files without torch: equal to torch's own reader, and nothing hostile gets through."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llava_sp_jax.convert import torch_io
from llava_sp_jax.convert.torch_io import FormatError

ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4, dtype=np.int64),
}


def save_zip(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
  """A file as `torch.save` lays it out."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    for key, content in (storages or {}).items():
      archive.writestr(f"archive/data/{key}", content)
  return path


def values(tensors: torch_io.Tensors) -> dict[str, np.ndarray]:
  return {name: tensor.array() for name, tensor in tensors.items()}


class _Call:
  """Pickles as a call of any function."""

  def __init__(self, function: Any, *arguments: Any):
    self._function, self._arguments = function, arguments

  def __reduce__(self) -> Any:
    return self._function, self._arguments


@pytest.mark.parametrize("function", [os.system, eval, exec, open, getattr])
def test_a_hostile_pickle_does_nothing(tmp_path: Path, function: Any) -> None:
  target = tmp_path / "harm"
  arguments = {"open": (str(target), "w"), "system": (f"touch {target}",)}
  call = _Call(function, *arguments.get(function.__name__, (f"open({str(target)!r}, 'w')",)))
  path = save_zip(tmp_path / "evil.bin", pickle.dumps({"a": call}))
  with pytest.raises(FormatError, match=r"evil.bin: .*refuses .*: only tensors are read"):
    torch_io.open_bin(path)
  assert not target.exists()


def test_numpy_objects_are_refused_too(tmp_path: Path) -> None:
  path = save_zip(tmp_path / "x.bin", pickle.dumps({"a": np.zeros(2)}))
  with pytest.raises(FormatError, match="refuses numpy"):
    torch_io.open_bin(path)


@pytest.mark.parametrize("tree", [[1, 2], {"a": 3}, "text"])
def test_anything_but_a_dictionary_of_tensors_is_an_error(tmp_path: Path, tree: Any) -> None:
  path = save_zip(tmp_path / "x.bin", pickle.dumps(tree))
  with pytest.raises(FormatError, match="expected a dictionary of tensors"):
    torch_io.open_bin(path)


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path: Path) -> None:
  storage = torch_io._Storage(tmp_path, 0, np.dtype(np.float32), 6)
  assert torch_io._View(storage, 0, (2, 3), (3, 1)).size == (2, 3)
  odd = ((1, (2, 3), (3, 1)), (-1, (2,), (1,)), (3, (2,), (-1,)), (0, (-2,), (1,)))
  for offset, size, stride in odd:
    with pytest.raises(pickle.UnpicklingError, match="beyond its storage"):
      torch_io._View(storage, offset, size, stride)


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "FloatStorage", "OrderedDict"])
def test_a_pickle_cannot_change_the_reader(tmp_path: Path, name: str) -> None:
  """The BUILD opcode sets an object's state: here, of what `find_class` returned."""
  module = {"_rebuild_tensor_v2": "torch._utils", "FloatStorage": "torch"}.get(name, "collections")
  found = pickle.GLOBAL + f"{module}\n{name}\n".encode()
  state = pickle.EMPTY_DICT + b"X\x05\x00\x00\x00build" + pickle.NONE + pickle.SETITEM
  path = save_zip(tmp_path / "x.bin", b"\x80\x02" + found + state + pickle.BUILD + pickle.STOP)
  with pytest.raises(FormatError, match=r"x.bin: cannot be read as a torch checkpoint"):
    torch_io.open_bin(path)


def test_a_broken_pickle_is_one_clear_error(tmp_path: Path) -> None:
  """Random bytes and cut-off pickles may raise anything inside; none of it gets out."""
  rng = np.random.default_rng(0)
  good = pickle.dumps({"a": [1, {"b": (2.5, "x")}]}, protocol=2)
  for _ in range(300):
    data = bytearray(good)
    for _ in range(rng.integers(1, 6)):
      data[rng.integers(0, len(data))] = rng.integers(0, 256)
    path = save_zip(tmp_path / "x.bin", bytes(data))
    with pytest.raises(FormatError, match=r"x.bin: "):
      torch_io.open_bin(path)


def test_values_are_mapped_not_read(tmp_path: Path) -> None:
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "x.bin")
  array = torch_io.open_file(tmp_path / "x.bin")["a"].array()
  while array.base is not None and not isinstance(array, np.memmap):
    array = array.base
  assert isinstance(array, np.memmap)


def test_equal_to_torch(tmp_path: Path) -> None:
  """Views, transposes, parameters and every dtype in the table."""
  torch = pytest.importorskip("torch")
  rng = torch.Generator().manual_seed(0)
  base = torch.randn(4, 6, generator=rng)
  tree = {
    "plain": base, "transposed": base.t(), "view": base[1:3, ::2], "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(base.clone()),
    "half": base.half(), "double": base.double(), "bfloat": base.bfloat16(),
    "long": torch.arange(3), "bool": base > 0, "byte": torch.arange(3).to(torch.uint8),
    "int": torch.arange(3).to(torch.int32),
  }  # fmt: skip
  torch.save(tree, tmp_path / "x.bin")
  opened = torch_io.open_file(tmp_path / "x.bin")
  for name, tensor in opened.items():
    assert (tensor.shape, tensor.dtype) == (tensor.array().shape, tensor.array().dtype), name
  ours = values(opened)
  assert ours.keys() == tree.keys()
  for name, tensor in tree.items():
    assert str(ours[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
    wide = tensor.detach().double().numpy()
    np.testing.assert_array_equal(ours[name].astype(np.float64), wide, err_msg=name)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file_is_an_error(tmp_path: Path, share: float) -> None:
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.zeros(100)}, tmp_path / "x.bin")
  content = (tmp_path / "x.bin").read_bytes()
  (tmp_path / "x.bin").write_bytes(content[: int(len(content) * share)])
  with pytest.raises(FormatError, match=r"x.bin: cannot be read as a torch checkpoint"):
    torch_io.open_file(tmp_path / "x.bin")


def test_a_truncated_storage_is_an_error(tmp_path: Path) -> None:
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.zeros(100)}, tmp_path / "x.bin")
  short = tmp_path / "short.bin"
  with zipfile.ZipFile(tmp_path / "x.bin") as old, zipfile.ZipFile(short, "w") as new:
    for name in old.namelist():
      content = old.read(name)
      new.writestr(name, content[:-4] if name.endswith("data/0") else content)
  with pytest.raises(FormatError, match="storage 0 is truncated"):
    torch_io.open_file(short)


def test_a_zip_without_a_checkpoint_and_a_text(tmp_path: Path) -> None:
  with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
    archive.writestr("hello", "x")
  with pytest.raises(FormatError, match="not a torch checkpoint"):
    torch_io.open_file(tmp_path / "x.bin")
  (tmp_path / "x.bin").write_text("version https://git-lfs")
  with pytest.raises(FormatError, match="cannot be read as a torch checkpoint"):
    torch_io.open_file(tmp_path / "x.bin")


def test_safetensors_and_what_is_wrong_with_them(tmp_path: Path) -> None:
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(ARRAYS, path)
  for name, array in values(torch_io.open_file(path)).items():
    np.testing.assert_array_equal(array, ARRAYS[name])
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(FormatError, match=r"model.safetensors: cannot be read as safetensors"):
    torch_io.open_file(path)


@pytest.mark.parametrize("piece", [1, 40, 130, 1 << 20])
def test_a_large_tensor_is_read_in_pieces(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
  wanted = np.arange(33, dtype=np.float32).reshape(11, 3)
  safetensors.numpy.save_file({"x": wanted, "none": wanted[:0]}, tmp_path / "x.safetensors")
  monkeypatch.setattr(torch_io, "PIECE_BYTES", piece)
  found = torch_io.open_file(tmp_path / "x.safetensors")
  np.testing.assert_array_equal(found["x"].array(), wanted)
  assert found["none"].array().shape == (0, 3)


def test_other_files_are_named(tmp_path: Path) -> None:
  with pytest.raises(FormatError, match=r"gone.bin: no such file"):
    torch_io.open_file(tmp_path / "gone.bin")
  (tmp_path / "x.pt").write_text("x")
  with pytest.raises(FormatError, match=r"expected a file that ends with .safetensors or .bin"):
    torch_io.open_file(tmp_path / "x.pt")
  with pytest.raises(
    FormatError, match=r"no weights here; looked for model.safetensors, model.bin"
  ):
    torch_io.open_named(tmp_path, torch_io.WEIGHTS)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
  """A folder with two shards and their index."""
  for i, (name, array) in enumerate(ARRAYS.items()):
    safetensors.numpy.save_file({name: array}, tmp_path / f"model-{i}.safetensors")
  weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(ARRAYS)}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return tmp_path


def test_shards_are_put_together(sharded: Path) -> None:
  tensors = torch_io.open_named(sharded, torch_io.WEIGHTS)
  assert tensors.keys() == ARRAYS.keys()


def test_a_missing_shard_is_named(sharded: Path) -> None:
  (sharded / "model-1.safetensors").unlink()
  with pytest.raises(FormatError, match=r"names files that are not there: model-1.safetensors"):
    torch_io.open_named(sharded, torch_io.WEIGHTS)


def test_a_tensor_in_no_shard_is_named(sharded: Path) -> None:
  index = sharded / "model.safetensors.index.json"
  names = json.loads(index.read_text())
  names["weight_map"]["lost"] = "model-0.safetensors"
  index.write_text(json.dumps(names))
  with pytest.raises(FormatError, match="named but in no shard: lost"):
    torch_io.open_named(sharded, torch_io.WEIGHTS)


def test_an_index_may_not_point_outside_its_folder(sharded: Path) -> None:
  index = sharded / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
  with pytest.raises(FormatError, match=r"files outside its folder: ../../secret.safetensors"):
    torch_io.open_named(sharded, torch_io.WEIGHTS)


def test_an_index_that_is_no_index_is_named(sharded: Path) -> None:
  (sharded / "model.safetensors.index.json").write_text('{"weights": []}')
  with pytest.raises(FormatError, match=r"index.json: expected JSON with a `weight_map`"):
    torch_io.open_named(sharded, torch_io.WEIGHTS)
