"""Opens damaged files, each within limits, in a process of its own: `python -m tests.convert.fuzz`.

The n-th file of a kind is always the same. A file that is refused must be refused in one line; one
that is read must hold what an independent reader finds in it. What takes longer than `SECONDS` of
the processor, or sleeps for `WAITING`, ends the process; so does more memory than `MEMORY`.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from llava_sp_jax import json_files
from llava_sp_jax.convert import gguf, torch_io
from llava_sp_jax.files import FormatError
from tests.convert import torch_files

SECONDS, WAITING, MEMORY = 2.0, 60.0, 200 << 20
ODD = [
  struct.pack(f"<{form}", value)
  for form, value in (
    ("B", 0),
    ("B", 255),
    ("H", 65535),
    ("I", 0),
    ("I", 2**31),
    ("I", 2**32 - 1),
    ("Q", 0),
    ("Q", 2**60),
    ("Q", 2**63),
    ("Q", 2**64 - 1),
    ("d", float("nan")),
  )
]
WORDS = [
  b"NaN",
  b"-Infinity",
  b"1e999",
  b"null",
  b"true",
  b"[]",
  b"{}",
  b'""',
  b"-1",
  b"0.5",
  b"[" * 2000,
  b'{"a":' * 40,
  b"9" * 400,
  rb'"\ud800"',
  b'"a":1,"a":2',
  b"\xff",
  b",",
]

Arrays = dict[str, np.ndarray]
ARRAYS: Arrays = {
  "a": torch_files.SIX.reshape(2, 3),
  "b": np.arange(40, dtype=np.float32).reshape(8, 5) + 100,
}


# (data, start, end, a hostile word, a source of chance) -> the damaged data
DAMAGES: tuple[Callable[[bytes, int, int, bytes, random.Random], bytes], ...] = (
  lambda d, i, j, word, draw: d[:i] + bytes([d[i] ^ 1 << draw.randrange(8)]) + d[i + 1 :],
  lambda d, i, j, word, draw: d[:i] + bytes([draw.choice(d)]) + d[i + 1 :],
  lambda d, i, j, word, draw: d[:i] + bytes([(d[i] + draw.choice((1, 255))) % 256]) + d[i + 1 :],
  lambda d, i, j, word, draw: d[:i] + draw.randbytes(j - i) + d[j:],
  lambda d, i, j, word, draw: d[:i] + word + d[i + len(word) :],
  lambda d, i, j, word, draw: d[:i] + word + d[i:],
  lambda d, i, j, word, draw: d[:i],
  lambda d, i, j, word, draw: d[:i] + d[j:],
  lambda d, i, j, word, draw: d[:j] + d[i:j] + d[j:],
  lambda d, i, j, word, draw: d[:i] + b"\0" * (j - i) + d[j:],
)


def damaged(data: bytes, draw: random.Random, words: list[bytes]) -> bytes:
  """One to three damages: bits, bytes, odd numbers or words, cuts, repetitions, holes."""
  for _ in range(draw.choice((1, 1, 1, 2, 3))):
    at = draw.randrange(max(1, len(data)))
    end = min(len(data), at + draw.choice((1, 2, 4, 8, 40)))
    if data:
      data = draw.choice(DAMAGES)(data, at, end, draw.choice(words), draw)
  return data


def arrays(opened: torch_io.Tensors) -> Arrays:
  """All values; shapes and dtypes must be those that were promised."""
  found = {name: tensor.array() for name, tensor in opened.items()}
  for name, array in found.items():
    assert (array.shape, array.dtype) == (opened[name].shape, opened[name].dtype), name
  return found


def equal(found: Arrays, wanted: Arrays) -> None:
  assert found.keys() == wanted.keys(), (sorted(found), sorted(wanted))
  for name, array in wanted.items():
    assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
    assert found[name].tobytes() == array.tobytes(), name


# ---- the kinds: each writes a damaged file, opens it, and compares it where it was read --------------


def bin_file(folder: Path, draw: random.Random) -> None:
  """A `.bin` damaged from outside: checksums tell, so what is read is what was written."""
  path = torch_files.save(folder / "x.bin", byteorder="little")
  path.write_bytes(damaged(path.read_bytes(), draw, ODD))
  equal(arrays(torch_io.open_file(path)), {"a": ARRAYS["a"]})


def pickle_file(folder: Path, draw: random.Random) -> None:
  """A `.bin` whose pickle was changed before its checksum was made: no value from elsewhere."""
  good = torch_files.dictionary(
    torch_files.text("a"),
    torch_files.tensor(),
    torch_files.text("b"),
    torch_files.tensor(torch_files.numbers(3), torch_files.numbers(2)),
  )
  path = torch_files.save(folder / "x.bin", damaged(good, draw, ODD))
  for tensor in torch_io.open_file(path).values():
    assert tensor.nbytes <= 8 << 20
    held = {8: np.float64, 4: np.float32, 2: np.float16}.get(tensor.dtype.itemsize, np.uint8)
    stored = np.frombuffer(torch_files.SIX.tobytes(), held)
    assert set(tensor.array().ravel().tolist()) <= set(stored.view(tensor.dtype).tolist())


def safetensors_file(folder: Path, draw: random.Random) -> None:
  path = folder / "x.safetensors"
  path.write_bytes(damaged(safetensors.numpy.save(ARRAYS), draw, ODD))
  equal(arrays(torch_io.open_file(path)), safetensors.numpy.load_file(path))


def header_file(folder: Path, draw: random.Random) -> None:
  """safetensors whose header was changed and measured again."""
  data = safetensors.numpy.save(ARRAYS)
  length = int.from_bytes(data[:8], "little")
  values = json.loads(data[8 : 8 + length])
  entries = [values[name] for name in draw.sample(sorted(ARRAYS), 2)]
  for key in draw.sample(("dtype", "shape", "data_offsets"), draw.randrange(4)):
    entries[0][key], entries[1][key] = entries[1][key], entries[0][key]
  entries[0]["shape"] = draw.choice(([6], [1, 6, 1], entries[0]["shape"], [40, 1], [0], [2, 3.0]))
  header = json.dumps(values).encode()
  if draw.random() < 0.5:
    header = damaged(header, draw, WORDS)
  path = folder / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
  equal(arrays(torch_io.open_file(path)), safetensors.numpy.load_file(path))


def gguf_good(folder: Path) -> bytes:
  from tests.convert.test_gguf import write

  write(folder / "good.gguf")
  return (folder / "good.gguf").read_bytes()


def gguf_file(folder: Path, draw: random.Random) -> None:
  import gguf as library

  path, good = folder / "x.gguf", folder / "good.gguf"
  data = good.read_bytes() if good.is_file() else gguf_good(folder)
  head = 900 if draw.random() < 0.8 else len(data)  # most damages where they matter
  path.write_bytes(damaged(data[:head], draw, ODD) + data[head:])
  found = {tensor.origin_name: tensor for tensor in _places(path)}
  for theirs in library.GGUFReader(path).tensors:
    array = np.asarray(library.quants.dequantize(theirs.data, theirs.tensor_type), np.float32)
    ours = found.pop(str(theirs.name)).values
    assert ours.tobytes() == array.tobytes(), theirs.name
  assert not found


class _Place:
  def __init__(self, name: str, values: np.ndarray):
    self.origin_name, self.values = name, values


def _places(path: Path) -> list[_Place]:
  """Tensors under the file's own names and in its order of rows, after our door opened all of it."""
  arrays(gguf.open_gguf(path))
  gguf.config(path)
  container = gguf.open_llama(path)
  return [_Place(p.name, gguf._reader(container, p)()) for p in container.tensors]


def json_file(folder: Path, draw: random.Random) -> None:
  values = {
    "model_type": "llama",
    "hidden_size": 64,
    "rope_scaling": {"type": "linear", "factor": 2.5},
    "architectures": ["LlamaForCausalLM"],
    "text": 'a "quoted" \\ \u00fc text',
    "x": None,
  }
  path = folder / "config.json"
  path.write_bytes(damaged(json.dumps(values).encode(), draw, WORDS))
  assert json_files.read_object(path) == json.loads(path.read_text("utf-8-sig"))


def index_file(folder: Path, draw: random.Random) -> None:
  """Two good shards under a damaged index: each tensor from the file that it names."""
  for i, (name, array) in enumerate(ARRAYS.items()):
    held = {name: array, "both": array.ravel()[:5] + i}
    safetensors.numpy.save_file(held, folder / f"model-{i}.safetensors")
  places = {"a": "model-0.safetensors", "b": "model-1.safetensors", "both": "model-1.safetensors"}
  index = folder / "model.safetensors.index.json"
  for name in draw.sample(sorted(places), draw.randrange(3)):
    places[name] = f"model-{draw.randrange(2)}.safetensors"
  text = json.dumps({"weight_map": places}).encode()
  index.write_bytes(text if draw.random() < 0.5 else damaged(text, draw, WORDS))
  found = arrays(torch_io.open_named(folder, torch_io.WEIGHTS))
  said = json.loads(index.read_text("utf-8-sig"))["weight_map"]
  equal(found, {n: safetensors.numpy.load_file(folder / s)[n] for n, s in said.items()})


def zip_file(folder: Path, draw: random.Random) -> None:
  """Any archive that Python writes, with members of torch's names, damaged or not."""
  held = io.BytesIO()
  methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
  with zipfile.ZipFile(held, "w", draw.choice(methods)) as archive:
    archive.comment = draw.randbytes(draw.choice((0, 0, 30)))
    for name, content in (("data.pkl", torch_files.GOOD), ("data/0", torch_files.SIX.tobytes())):
      info = zipfile.ZipInfo(f"{draw.choice(('archive', 'archive', 'x', ''))}/{name}")
      info.compress_type, info.extra = (
        draw.choice(methods),
        draw.choice((b"", b"\1\0\0\0", b"FB\0\0")),
      )
      archive.writestr(info, content)
  path = folder / "x.bin"
  data = held.getvalue()
  path.write_bytes(data if draw.random() < 0.5 else damaged(data, draw, ODD))
  equal(arrays(torch_io.open_file(path)), {"a": ARRAYS["a"]})


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
  "bin": bin_file,
  "pickle": pickle_file,
  "zip": zip_file,
  "safetensors": safetensors_file,
  "header": header_file,
  "gguf": gguf_file,
  "json": json_file,
  "index": index_file,
}


def outcome(kind: str, number: int, folder: Path) -> str:
  """Empty when the file was read and right; otherwise the line that refused it."""
  signal.setitimer(signal.ITIMER_PROF, SECONDS)  # unhandled, these signals end the process
  signal.setitimer(signal.ITIMER_REAL, WAITING)
  try:
    KINDS[kind](folder, random.Random(f"{kind} {number}"))
  except FormatError as error:
    return str(error)
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
  return ""


def limit_memory() -> None:
  """From now on the process gets `MEMORY` more than it has."""
  pages = int(Path("/proc/self/statm").read_text().split()[0])
  most = pages * resource.getpagesize() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(arguments: list[str]) -> None:
  """KIND FIRST COUNT: a JSON line for each file, written when it is done."""
  kind, first, count = arguments[0], int(arguments[1]), int(arguments[2])
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    if kind == "gguf":
      gguf_good(folder)
    limit_memory()
    for number in range(first, first + count):
      said: dict[str, Any] = {"number": number, "refused": outcome(kind, number, folder)}
      print(json.dumps(said | {"folder": name}), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
