"""Files of torch.save read without torch: what is good has torch's values, what is hostile one line."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax.convert import torch_pickle
from llava_sp_jax.convert.tensor import MalformedError
from llava_sp_jax.convert.torch_bin import open_bin
from llava_sp_jax.files import FormatError
from tests.convert.torch_files import (
  GOOD,
  HOOKS,
  SIX,
  dictionary,
  get,
  name,
  number,
  numbers,
  put,
  real,
  save,
  storage,
  tensor,
  text,
)


def values(path: Path) -> dict[str, np.ndarray]:
  return {name: tensor.array() for name, tensor in open_bin(path).items()}


def refused(path: Path, message: str) -> None:
  """The file ends in one line that names it."""
  with pytest.raises(FormatError, match=message) as raised:
    values(path)
  assert str(raised.value).startswith(f"{path}: ")
  assert "\n" not in str(raised.value)
  assert len(str(raised.value)) < len(str(path)) + 250


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
  refused(save(tmp_path / "evil.bin", pickle.dumps({"a": call})), "refuses .*: only tensors")
  assert not target.exists()


def test_numpy_objects_are_refused_too(tmp_path: Path) -> None:
  refused(save(tmp_path / "x.bin", pickle.dumps({"a": np.zeros(2)})), "refuses numpy")


@pytest.mark.parametrize("tree", [[1, 2], {"a": 3}, "text"])
def test_anything_but_a_dictionary_of_tensors_is_an_error(tmp_path: Path, tree: Any) -> None:
  refused(save(tmp_path / "x.bin", pickle.dumps(tree)), "expected a dictionary of tensors")


def changed(index: int, to: int, items: tuple[int, ...]) -> bytes:
  """A size in a list that the memo keeps, changed behind the check."""

  def held(at: int, values: tuple[int, ...]) -> bytes:
    filled = pickle.MARK + b"".join(map(number, values)) + pickle.APPENDS
    return pickle.EMPTY_LIST + put(at) + filled

  later = get(1) + number(index) + number(to) + pickle.SETITEM + pickle.POP
  return dictionary(text("a"), tensor(held(1, items), held(2, (1, 1))), then=later)


def tripled(first: bytes, last: bytes, times: int = 40) -> bytes:
  """A value of 2**times items, from pairs of what the memo has under one number."""
  return first + b"".join(put(0) + get(0) + pickle.TUPLE2 for _ in range(times)) + last


ELSEWHERE = tensor(stored=storage(key=text("1")))
HUGE = 1 << 70
HOSTILE = {
  "size changed after the check": (changed(0, 1 << 26, (1, 1)), "no.* made of a storage"),
  "size changed a little": (changed(1, 64, (1, 6)), "not made of a storage, a shape and strides"),
  "bytes of 32 GB": (b"\x80\4" + pickle.BINBYTES8 + struct.pack("<Q", 32 << 30) + b".", "refuses"),
  "text of 4 GB": (b"\x80\2X\xff\xff\xff\xffab.", "a text of 4,294,967,295 bytes"),
  "text beyond the end": (b"\x80\2X\xff\0\0\0ab.", "ends too early"),
  "frame beyond the end": (b"\x80\4\x95" + struct.pack("<Q", 1 << 60) + b"N.", "ends too early"),
  "memo of 400M": (b"\x80\2}r" + struct.pack("<I", 400_000_000) + b".", "out of order"),
  "memo it does not have": (b"\x80\2h\7.", "refers to what it does not have"),
  "float as a size": (
    dictionary(text("a"), tensor(pickle.MARK + real(2.0) + pickle.TUPLE, numbers(1))), "a tensor's shape"),
  "float as a count": (dictionary(text("a"), tensor(stored=storage(count=real(6)))), "whose size is"),
  "true as a size": (
    dictionary(text("a"), tensor(pickle.MARK + pickle.NEWTRUE + pickle.TUPLE, numbers(1))), "shape"),
  "negative count": (dictionary(text("a"), tensor(stored=storage(count=number(-1)))), "whose size is"),
  "stride 0 of 1 TB": (dictionary(text("a"), tensor(numbers(1 << 38), numbers(0))), "stand for 1,099"),
  "offset beyond an empty one": (
    dictionary(text("a"), tensor(numbers(0), numbers(1), number(1 << 80))), "reaches beyond"),
  "zero beside a huge size": (dictionary(text("a"), tensor(numbers(0, HUGE), numbers(HUGE, 1))), "shape"),
  "product beyond 64 bits": (
    dictionary(text("a"), tensor(numbers(0, 1 << 40, 1 << 40), numbers(0, 0, 0))), "larger than any"),
  "stride beyond the storage": (dictionary(text("a"), tensor(numbers(2), numbers(6))), "reaches beyond"),
  "negative stride": (dictionary(text("a"), tensor(numbers(2), numbers(-1), number(3))), "strides"),
  "negative offset": (dictionary(text("a"), tensor(numbers(2), numbers(1), number(-1))), "offset"),
  "negative size": (dictionary(text("a"), tensor(numbers(-2), numbers(1))), "shape"),
  "fewer strides": (dictionary(text("a"), tensor(numbers(2, 3), numbers(1))), "one for each axis"),
  "33 axes": (dictionary(text("a"), tensor(numbers(*[1] * 33), numbers(*[0] * 33))), "shape"),
  "number and text as names": (
    dictionary(number(5), tensor(numbers(2), numbers(1)), text("5"), tensor()), "name is no printable"),
  "line break in a name": (dictionary(text("a\nb"), tensor()), "name is no printable text"),
  "a name twice": (dictionary(text("a"), tensor(), text("a"), tensor()), "stands in it twice"),
  "tuples as a kind": (
    dictionary(text("a"), tensor(stored=storage(tag=tripled(text("x"), b"")))), "remembers something twice"),
  "tuples as a key": (dictionary(tripled(number(1), b""), tensor()), "remembers something twice"),
  "a call of nothing": (b"\x80\2N)R.", "calls what is no function"),
  "a storage's type called": (b"\x80\2" + name("torch", "FloatStorage") + b")R.", "calls what is no"),
  "arguments that lack": (
    b"\x80\2" + name("torch._utils", "_rebuild_tensor_v2") + b")R.", "another number of arguments"),
  "a storage that is none": (dictionary(text("a"), tensor(stored=pickle.NONE)), "not made of a storage"),
  "a storage that is not there": (dictionary(text("a"), ELSEWHERE), "no storage '1' inside"),
  "a storage of two types": (
    dictionary(text("a"), tensor(), text("b"), tensor(stored=storage("IntStorage"))), "two types"),
  "another count": (dictionary(text("a"), tensor(stored=storage(count=number(5)))), "reaches beyond"),
  "a smaller storage": (
    dictionary(text("a"), tensor(numbers(1), numbers(1), stored=storage(count=number(5)))), "truncated"),
  "negated values": (
    dictionary(text("a"), tensor(rest=pickle.NEWFALSE + HOOKS + dictionary(text("neg"), b"\x88")[2:-1])),
    "hooks or other properties"),
  "a list in itself": (b"\x80\2]q\0h\0a.", "expected a dictionary"),
  "no end": (b"\x80\2}", "ends too early"),
  "nothing": (b"", "ends too early"),
  "two values": (b"\x80\2}}.", "does not end with one value"),
  "more behind the end": (GOOD + b"x", "does not end with one value"),
  "600,000 instructions": (b"\x80\2" + b"N" * 600_000 + b".", "more than 500,000 instructions"),
  "protocol 0": (b"(dp0\n.", "refuses the pickle instruction"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_hostile_is_one_line(tmp_path: Path, what: str) -> None:
  pickled, message = HOSTILE[what]
  refused(save(tmp_path / "x.bin", pickled), message)


@pytest.mark.parametrize("called", ["_rebuild_tensor_v2", "FloatStorage", "OrderedDict"])
def test_a_pickle_cannot_change_the_reader(tmp_path: Path, called: str) -> None:
  """The BUILD instruction sets an object's state: here, of what the reader itself calls."""
  module = {"_rebuild_tensor_v2": "torch._utils", "FloatStorage": "torch"}.get(
    called, "collections"
  )
  state = pickle.EMPTY_DICT + text("build") + pickle.NONE + pickle.SETITEM
  pickled = b"\x80\2" + name(module, called) + state + pickle.BUILD + pickle.STOP
  refused(save(tmp_path / "x.bin", pickled), "tries to change")


def test_deep_nesting_is_no_recursion(tmp_path: Path) -> None:
  deep = b"\x80\2)" + pickle.TUPLE1 * 100_000 + b"."
  refused(save(tmp_path / "x.bin", deep), "expected a dictionary of tensors")
  refused(save(tmp_path / "x.bin", dictionary(text("a"), deep[2:-1])), "something else under a")


def test_the_good_one_is_read(tmp_path: Path) -> None:
  np.testing.assert_array_equal(values(save(tmp_path / "x.bin"))["a"], SIX.reshape(2, 3))


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", torch_pickle.STORAGES)
def test_bytes_are_read_in_the_order_that_the_file_says(
  tmp_path: Path, order: str, kind: str
) -> None:
  dtype = torch_pickle.STORAGES[kind]
  wanted = np.arange(6).astype(dtype)
  stored = wanted.view(f"u{dtype.itemsize}").astype(f"{'<>'[order == 'big']}u{dtype.itemsize}")
  pickled = dictionary(text("a"), tensor(stored=storage(kind)))
  path = save(tmp_path / "x.bin", pickled, stored.tobytes(), order)
  found = values(path)["a"]
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, wanted.reshape(2, 3))


def test_an_unknown_order_of_bytes_is_refused(tmp_path: Path) -> None:
  refused(save(tmp_path / "x.bin", byteorder="middle"), "byteorder says b'middle'")


def test_a_small_broadcast_is_read(tmp_path: Path) -> None:
  """torch saves `expand` with stride 0; what it stands for is small here."""
  path = save(tmp_path / "x.bin", dictionary(text("a"), tensor(numbers(100, 3), numbers(0, 2))))
  np.testing.assert_array_equal(values(path)["a"], np.broadcast_to(SIX[:5:2], (100, 3)))


def test_many_tensors_of_one_storage_are_counted_together(tmp_path: Path) -> None:
  wide = tensor(numbers(100, 1000), numbers(0, 0))
  items = [part for i in range(3) for part in (text(f"t{i}"), wide)]
  refused(save(tmp_path / "x.bin", dictionary(*items)), "stand for 1,200,000 bytes")


def test_any_damage_to_the_values_is_found(tmp_path: Path) -> None:
  """One bit of a tensor, which nothing but the checksum tells."""
  path = save(tmp_path / "x.bin")
  content = bytearray(path.read_bytes())
  content[content.index(SIX.tobytes()) + 9] ^= 1
  path.write_bytes(content)
  assert open_bin(path).keys() == {"a"}, "values are read later"
  refused(path, "archive/data/0 is damaged: its CRC-32")


def test_damage_to_the_pickle_is_found(tmp_path: Path) -> None:
  path = save(tmp_path / "x.bin", dictionary(text("weight"), tensor()))
  path.write_bytes(path.read_bytes().replace(b"weight", b"weighs"))
  refused(path, "data.pkl is damaged: its CRC-32")


def test_a_file_that_changes_between_opening_and_reading_is_refused(tmp_path: Path) -> None:
  path = save(tmp_path / "x.bin")
  opened = open_bin(path)
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(FormatError, match="has changed since it was opened"):
    opened["a"].array()


def test_values_are_mapped_not_read(tmp_path: Path) -> None:
  wanted = np.arange(1 << 18, dtype=np.float32)
  pickled = dictionary(
    text("a"), tensor(numbers(1 << 18), numbers(1), stored=storage(count=number(1 << 18)))
  )
  array = open_bin(save(tmp_path / "x.bin", pickled, wanted.tobytes()))["a"].array()
  np.testing.assert_array_equal(array, wanted)
  with pytest.raises(ValueError, match="read-only"):
    array[0] = 1


def test_a_view_lies_within_its_storage() -> None:
  held = torch_pickle.Storage("0", np.dtype(np.float32), 6)
  assert torch_pickle.view(held, 0, (2, 3), (3, 1)).shape == (2, 3)
  assert torch_pickle.view(held, 5, (1, 1), (1 << 70, 9)).strides == (0, 0), "never stepped along"
  for offset, size, stride in ((1, (2, 3), (3, 1)), (6, (1,), (1,)), (7, (0,), (1,))):
    with pytest.raises(MalformedError, match="beyond its storage"):
      torch_pickle.view(held, offset, size, stride)


def test_equal_to_torch(tmp_path: Path) -> None:
  """Views, transposes, parameters and every dtype in the table, with and without checksums."""
  torch = pytest.importorskip("torch")
  rng = torch.Generator().manual_seed(0)
  base = torch.randn(4, 6, generator=rng)
  tree = {
    "plain": base,
    "transposed": base.t(),
    "view": base[1:3, ::2],
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(base.clone()),
    "half": base.half(),
    "double": base.double(),
    "bfloat": base.bfloat16(),
    "long": torch.arange(3),
    "bool": base > 0,
    "byte": torch.arange(3).to(torch.uint8),
    "int": torch.arange(3).to(torch.int32),
    "wide": torch.ones(1).expand(5, 7),
  }
  for checksums in (True, False):
    torch.serialization.set_crc32_options(checksums)
    try:
      torch.save(tree, tmp_path / "x.bin")
    finally:
      torch.serialization.set_crc32_options(True)
    opened = open_bin(tmp_path / "x.bin")
    assert opened.keys() == tree.keys()
    for key, wanted in tree.items():
      found = opened[key].array()
      assert (opened[key].shape, opened[key].dtype) == (found.shape, found.dtype), key
      assert str(found.dtype) == str(wanted.dtype).removeprefix("torch."), key
      wide = wanted.detach().double().numpy()
      np.testing.assert_array_equal(found.astype(np.float64), wide, err_msg=key)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_module_s_state_is_read(tmp_path: Path, protocol: int) -> None:
  """It carries `_metadata` as an attribute of its dictionary, which has no effect."""
  torch = pytest.importorskip("torch")
  module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
  torch.save(module.state_dict(), tmp_path / "x.bin", pickle_protocol=protocol)
  found = values(tmp_path / "x.bin")
  for key, wanted in module.state_dict().items():
    np.testing.assert_array_equal(found[key], wanted.numpy())


def test_torch_s_older_formats_are_named(tmp_path: Path) -> None:
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.zeros(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
  refused(tmp_path / "x.bin", "older than torch 1.6")


def test_our_own_writer_is_read(tmp_path: Path) -> None:
  from llava_sp_jax.convert import torch_write
  from llava_sp_jax.convert.tensor import Tensor

  tensors = [
    Tensor(key, "", a.shape, a.dtype, lambda a=a: a)  # type: ignore[misc]
    for key, a in (("a", SIX.reshape(3, 2)), ("none", SIX[:0]), ("one", SIX[3:4].reshape(())))
  ]
  torch_write.save_bin(tensors, tmp_path / "x.bin")
  for wanted in tensors:
    np.testing.assert_array_equal(values(tmp_path / "x.bin")[wanted.name], wanted.array())
