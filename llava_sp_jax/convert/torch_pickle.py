"""Reads the pickle in a torch checkpoint by a machine that knows only tensors and plain containers.

A pickle is a program. Python's unpickler runs all of it. This one has a table of the instructions
that `torch.save` writes, and any other instruction is an error. Nothing can change after it was
checked: a tensor is built from tuples of integers, and objects in the memo are not checked again.
Source: Python's pickletools (instructions), torch/_utils.py and torch/serialization.py (names).
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from llava_sp_jax.convert.tensor import BFLOAT16, MalformedError, check_shape

MAX_BYTES = 16 << 20
MAX_STEPS = 500_000  # instructions; about 35 a tensor
MAX_TEXT = 4096  # bytes

STORAGES = {
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": BFLOAT16,
  "DoubleStorage": np.dtype(np.float64),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
  """Holds a flat array of the archive: the member `data/<key>`."""

  key: str
  dtype: np.dtype
  count: int


@dataclasses.dataclass(frozen=True, eq=False)
class TensorView:
  """Holds a strided view of a storage, which lies within it; strides count items."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
  """Holds an object that a pickle may name: a type of storage, or a function."""

  dtype: np.dtype | None = None
  call: Callable[..., Any] | None = None


def view(storage: Any, offset: Any, size: Any, stride: Any) -> TensorView:
  """Returns the view of a storage that begins at item `offset` and has a shape and strides.

  Raises: MalformedError when they are no such thing, or the view does not lie within the storage.
  """
  if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
    raise MalformedError("a tensor that is not made of a storage, a shape and strides")
  shape = check_shape(size, storage.dtype.itemsize)
  if len(stride) != len(shape) or not all(type(n) is int and n >= 0 for n in (offset, *stride)):
    raise MalformedError(
      "a tensor's offset or strides are no non-negative integers, one for each axis"
    )
  strides = tuple(s if n > 1 else 0 for n, s in zip(shape, stride, strict=True))
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if offset > storage.count or (0 not in shape and last >= storage.count):
    raise MalformedError("a tensor reaches beyond its storage")
  return TensorView(storage, offset, shape, strides)


def _tensor(
  storage: Any,
  offset: Any,
  size: Any,
  stride: Any,
  requires_grad: Any,
  hooks: Any,
  about: Any = None,
) -> TensorView:
  """Replaces torch's `_rebuild_tensor_v2`.

  A non-empty `about` would say that values are negated or conjugated, and is refused.
  """
  if type(requires_grad) is not bool or hooks != {} or about not in (None, {}):
    raise MalformedError("a tensor with hooks or other properties")
  return view(storage, offset, size, stride)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> TensorView:
  if not isinstance(data, TensorView) or type(requires_grad) is not bool or hooks != {}:
    raise MalformedError("a parameter that is no tensor, or has hooks")
  return data


NAMES: dict[tuple[str, str], _Name] = {
  ("collections", "OrderedDict"): _Name(call=dict),
  ("torch._utils", "_rebuild_tensor_v2"): _Name(call=_tensor),
  ("torch._utils", "_rebuild_parameter"): _Name(call=_parameter),
  **{("torch", name): _Name(dtype=dtype) for name, dtype in STORAGES.items()},
}
ARGUMENTS = {dict: (0, 0), _tensor: (6, 7), _parameter: (3, 3)}


def load(data: bytes) -> Any:
  """Returns the content of a pickle: dictionaries, lists, tuples, numbers, texts and `TensorView`s.

  Raises: MalformedError when it is damaged, or names anything but tensors.
  """
  return _Machine(data).run()


_MARK = object()


class _Machine:
  """Runs the instructions of a pickle one by one; each is a row of `_INSTRUCTIONS`."""

  def __init__(self, data: bytes):
    if len(data) > MAX_BYTES:
      raise MalformedError(f"a pickle of {len(data):,} bytes, expected at most {MAX_BYTES:,}")
    self.data, self.at = data, 0
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    self.storages: dict[str, Storage] = {}

  def run(self) -> Any:
    for _ in range(MAX_STEPS):
      code = self.take(1)
      if code == pickle.STOP:
        if len(self.stack) != 1 or self.stack[0] is _MARK or self.at != len(self.data):
          raise MalformedError("a pickle that does not end with one value")
        return self.stack[0]
      if code not in _INSTRUCTIONS:
        raise MalformedError(f"refuses the pickle instruction {code!a}: only tensors are read")
      _INSTRUCTIONS[code](self)
    raise MalformedError(f"a pickle of more than {MAX_STEPS:,} instructions")

  # ---- arguments ---------------------------------------------------------------------------------

  def take(self, count: int) -> bytes:
    end = self.at + count
    if end > len(self.data):
      raise MalformedError("a pickle that ends too early")
    data, self.at = self.data[self.at : end], end
    return data

  def number(self, form: str) -> int:
    result: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
    return result

  def text(self, length: int) -> str:
    if length > MAX_TEXT:
      raise MalformedError(f"a text of {length:,} bytes, expected at most {MAX_TEXT:,}")
    return _decoded(self.take(length))

  def line(self) -> str:
    end = self.data.find(b"\n", self.at, self.at + MAX_TEXT)
    if end < 0:
      raise MalformedError("a name without an end")
    return _decoded(self.take(end + 1 - self.at)[:-1])

  # ---- the stack ---------------------------------------------------------------------------------

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def pop(self) -> Any:
    if not self.stack or self.stack[-1] is _MARK:
      raise MalformedError("a pickle that takes what is not there")
    return self.stack.pop()

  def top(self, kind: type) -> Any:
    """Returns the last value. Raises: MalformedError when it has another type."""
    if not self.stack or type(self.stack[-1]) is not kind:
      raise MalformedError("tries to change what is no plain container")
    return self.stack[-1]

  def since_mark(self) -> list[Any]:
    for i in range(len(self.stack) - 1, -1, -1):
      if self.stack[i] is _MARK:
        items = self.stack[i + 1 :]
        del self.stack[i:]
        return items
    raise MalformedError("a pickle without the mark that it goes back to")

  def last(self, count: int) -> list[Any]:
    return [self.pop() for _ in range(count)][::-1]

  # ---- instructions ------------------------------------------------------------------------------

  def protocol(self) -> None:
    if self.at != 1 or not 2 <= self.number("<B") <= 5:
      raise MalformedError("a pickle of another protocol than 2 to 5")

  def frame(self) -> None:
    if self.number("<Q") > len(self.data) - self.at:
      raise MalformedError("a pickle that ends too early")

  def long(self) -> None:
    self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

  def put(self, index: int) -> None:
    if index in self.memo or index >= MAX_STEPS or not self.stack or self.stack[-1] is _MARK:
      raise MalformedError("a pickle that remembers something twice, nothing, or out of order")
    self.memo[index] = self.stack[-1]

  def get(self, index: int) -> None:
    if index not in self.memo:
      raise MalformedError("a pickle that refers to what it does not have")
    self.push(self.memo[index])

  def set_items(self, items: list[Any]) -> None:
    target = self.top(dict)
    if len(items) % 2:
      raise MalformedError("a dictionary with a key that has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if type(key) not in (str, int) or key in target:
        raise MalformedError("a dictionary's key is no text or number, or stands in it twice")
      target[key] = value

  def append(self, items: list[Any]) -> None:
    self.top(list).extend(items)

  def name(self, module: Any, name: Any) -> None:
    if (module, name) not in NAMES:
      shown = ascii(f"{module}.{name}"[:120])[1:-1]
      raise MalformedError(f"refuses {shown}: only tensors are read")
    self.push(NAMES[module, name])

  def stack_name(self) -> None:
    module, name = self.last(2)
    if type(module) is not str or type(name) is not str:
      raise MalformedError("a name that is no text")
    self.name(module, name)

  def call(self) -> None:
    function, arguments = self.last(2)
    if type(function) is not _Name or function.call is None or type(arguments) is not tuple:
      raise MalformedError("calls what is no function")
    least, most = ARGUMENTS[function.call]
    if not least <= len(arguments) <= most:
      raise MalformedError("calls a function with another number of arguments")
    self.push(function.call(*arguments))

  def storage(self) -> None:
    about = self.pop()
    if type(about) is not tuple or len(about) != 5 or about[0] != "storage":
      raise MalformedError("an unknown persistent object")
    _, kind, key, _, count = about
    if type(kind) is not _Name or kind.dtype is None or type(key) is not str:
      raise MalformedError("a storage without a type or a key")
    if type(count) is not int or count < 0:
      raise MalformedError("a storage whose size is no non-negative integer")
    found = self.storages.setdefault(key, Storage(key, kind.dtype, count))
    if (found.dtype, found.count) != (kind.dtype, count):
      raise MalformedError("a storage that is named with two types or sizes")
    self.push(found)

  def build(self) -> None:
    """Ignores the attributes of a state dictionary (torch's `_metadata`)."""
    state = self.pop()
    if type(state) is not dict:
      raise MalformedError("tries to change the state of an object: only tensors are read")
    self.top(dict)


def _decoded(data: bytes) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError:
    raise MalformedError("a text that is not UTF-8") from None


def _reads(form: str, then: Callable[[_Machine, Any], None]) -> Callable[[_Machine], None]:
  return lambda machine: then(machine, machine.number(form))


def _pushes(make: Callable[[], Any]) -> Callable[[_Machine], None]:
  return lambda machine: machine.push(make())


def _text(machine: _Machine, length: int) -> None:
  machine.push(machine.text(length))


def _gathers(count: int) -> Callable[[_Machine], None]:
  return lambda machine: machine.push(tuple(machine.last(count)))


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
  pickle.PROTO: _Machine.protocol,
  pickle.FRAME: _Machine.frame,
  pickle.MARK: _pushes(lambda: _MARK),
  pickle.NONE: _pushes(lambda: None),
  pickle.NEWTRUE: _pushes(lambda: True),
  pickle.NEWFALSE: _pushes(lambda: False),
  pickle.EMPTY_DICT: _pushes(dict),
  pickle.EMPTY_LIST: _pushes(list),
  pickle.EMPTY_TUPLE: _pushes(tuple),
  pickle.BININT: _reads("<i", _Machine.push),
  pickle.BININT1: _reads("<B", _Machine.push),
  pickle.BININT2: _reads("<H", _Machine.push),
  pickle.LONG1: _Machine.long,
  pickle.BINFLOAT: _reads(">d", _Machine.push),
  pickle.BINUNICODE: _reads("<I", _text),
  pickle.SHORT_BINUNICODE: _reads("<B", _text),
  pickle.BINUNICODE8: _reads("<Q", _text),
  pickle.BINPUT: _reads("<B", _Machine.put),
  pickle.LONG_BINPUT: _reads("<I", _Machine.put),
  pickle.MEMOIZE: lambda machine: machine.put(len(machine.memo)),
  pickle.BINGET: _reads("<B", _Machine.get),
  pickle.LONG_BINGET: _reads("<I", _Machine.get),
  pickle.TUPLE: lambda machine: machine.push(tuple(machine.since_mark())),
  pickle.TUPLE1: _gathers(1),
  pickle.TUPLE2: _gathers(2),
  pickle.TUPLE3: _gathers(3),
  pickle.APPEND: lambda machine: machine.append([machine.pop()]),
  pickle.APPENDS: lambda machine: machine.append(machine.since_mark()),
  pickle.SETITEM: lambda machine: machine.set_items(machine.last(2)),
  pickle.SETITEMS: lambda machine: machine.set_items(machine.since_mark()),
  pickle.GLOBAL: lambda machine: machine.name(machine.line(), machine.line()),
  pickle.STACK_GLOBAL: _Machine.stack_name,
  pickle.REDUCE: _Machine.call,
  pickle.BINPERSID: _Machine.storage,
  pickle.BUILD: _Machine.build,
}
