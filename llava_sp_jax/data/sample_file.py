"""Reads a file of samples: a JSON list or JSON lines, in UTF-8, UTF-16 or UTF-32."""

from __future__ import annotations

import array
import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import files, storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.console import shortened
from llava_sp_jax.data import content, forms, kept, sample_offsets, sample_text
from llava_sp_jax.data.failure import REASON
from llava_sp_jax.data.sample_offsets import BLANKS, Offsets
from llava_sp_jax.data.sample_text import UTF_8, NoTextError, decoded, loads

EXPECTED = "expected a JSON list of samples, or JSON lines, one sample each"
KEPT = ("starts", "ends", "numbers")  # arrays of `Offsets`
_SIGNS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)  # strings, and signs of JSON


class SampleFile(Sequence[Any]):
  """Holds the samples of a file: where they are, or in memory if the file is not a sound one.

  `fingerprint` is that of the samples, `digest` the SHA-256 of the file's bytes.
  """

  def __init__(self, path: Path, held: Sequence[Any], fingerprint: str, digest: str):
    self.fingerprint, self.digest = fingerprint, digest
    self._path, self._held = path, held

  def __len__(self) -> int:
    return len(self._held)

  def __getitem__(self, index: Any) -> Any:
    return self._held[index]

  def __reduce__(self) -> tuple[Any, ...]:
    if isinstance(self._held, list):  # samples may be nested too deeply for pickle
      return read, (self._path,)
    return SampleFile, (self._path, self._held, self.fingerprint, self.digest)


def read(path: str | Path, key: str = "data.path") -> SampleFile:
  """Finds the samples of a file.

  Puts a SampleError in the place of a line or item that is not JSON.

  `key` is the setting that names the file, for messages.

  Raises:
    FileNotFoundError: when there is no such file.
    ConfigError: when the file holds no samples.
  """
  place = storage.place(path)
  try:
    local = storage.of(place).local(place)
  except FileNotFoundError:
    local = Path()
  if not files.is_regular(local):
    raise FileNotFoundError(f"{key}: no file {str(path)[-REASON:]!r}; {EXPECTED}")
  try:
    return _read(local, local.stat().st_mtime_ns, kept.beside(path))
  except (OSError, ValueError, RecursionError) as error:
    why = error.strerror if isinstance(error, OSError) else str(error)
    raise ConfigError(f"{key}: {path} {shortened(why or '', REASON)}; {EXPECTED}") from None


@functools.lru_cache(maxsize=2)
def _read(path: Path, changed: int, beside: Path) -> SampleFile:
  """Reads a file; cached, since training and validation may read the same large one."""
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  name = f"samples-{kept.key_of(content.VERSION, digest)}.npz"
  if (known := kept.load(beside / name)) and known.keys() == {*KEPT, "about"}:
    kind, fingerprint = map(str, known["about"])
    return SampleFile(path, Offsets(path, kind, *(known[key] for key in KEPT)), fingerprint, digest)
  if found := sample_offsets.find(path):
    offsets, fingerprint = found
    if len(offsets) > kept.SMALL:
      arrays = {key: getattr(offsets, key) for key in KEPT}
      kept.save_in(beside, name, {**arrays, "about": np.array([offsets.kind, fingerprint])})
    return SampleFile(path, offsets, fingerprint, digest)
  held = _parsed(path.read_bytes(), path.name)
  hashed = content.Fingerprint()
  for sample in held:
    hashed.add(sample)
  return SampleFile(path, held, hashed.hexdigest(), digest)


def _parsed(data: bytes, name: str) -> list[Any]:
  """Returns the samples in `data`; `name` is the file's name, for errors of samples.

  Raises: ValueError that says what the file holds in place of samples.
  """
  try:
    found = loads(decoded(data, json.detect_encoding(data)))
  except (ValueError, RecursionError) as error:
    why = _why(error)
  else:
    if isinstance(found, dict) and any(key in found for key in forms.DIALOGUES):
      return [found]
    if isinstance(found, list) and found:
      return found
    keys = f" with keys {', '.join(map(repr, found)) or 'none'}" if isinstance(found, dict) else ""
    raise ValueError(f"is not a list with at least one sample, but a {type(found).__name__}{keys}")
  return _apart(data, name, why)


def _why(error: Exception) -> str:
  """Returns why a file is not a single JSON value."""
  if isinstance(error, NoTextError):
    return str(error)
  if isinstance(error, RecursionError):
    return "is not a list of samples (nested too deeply)"
  empty = isinstance(error, json.JSONDecodeError) and not error.doc.strip()
  return f"is not JSON ({'it is empty' if empty else error})"


def _apart(data: bytes, name: str, why: str) -> list[Any]:
  """Reads each item of a list, or each line, of a file that is not a single JSON value.

  Raises: ValueError with the text `why` when items or lines cannot be found or none is a sample.
  """
  if data.startswith(codecs.BOM_UTF8):
    data = b" " * len(codecs.BOM_UTF8) + data[len(codecs.BOM_UTF8) :]
  elif (encoding := json.detect_encoding(data)) != UTF_8:
    try:
      data, name = decoded(data, encoding).encode(UTF_8, "surrogatepass"), f"{name} as UTF-8"
    except NoTextError:
      raise ValueError(why) from None
  first = data.lstrip(BLANKS).partition(b"\n")[0]
  parts = _items(data) if first.startswith(b"[") else _lines(data)
  if parts is None and _items(first) is not None:  # the first line is a list by itself
    parts = _lines(data)
  found = [sample_text.sample(f"{name}, {part}", at, text) for part, at, text in parts or ()]
  if not any(isinstance(sample, dict) for sample in found):
    raise ValueError(why)
  return found


Part = tuple[str, int, bytes]  # name for messages, offset in the file, content


def _lines(data: bytes) -> Iterator[Part]:
  at = 0
  for number, line in enumerate(data.split(b"\n"), 1):
    if line.strip():
      yield f"line {number}", at, line
    at += len(line) + 1


def _items(data: bytes) -> Iterator[Part] | None:
  """Finds the items of a list by brackets and commas alone; returns None if the list is incomplete.

  So one item that is not JSON, not text, or nested too deeply does not affect the others. Uses no
  recursion, and stores only the offsets of the items.
  """
  depth, borders = 0, array.array("q")
  for found in _SIGNS.finditer(data):
    sign = found[0]
    if sign[:1] == b'"':
      continue
    depth += (sign in b"[{") - (sign in b"]}")
    if depth == 0 or (depth == 1 and (sign == b"," or not borders)):
      borders.append(found.start())
    if depth == 0:
      break
  if depth or len(borders) < 2 or data[borders[-1] + 1 :].strip(BLANKS):
    return None
  spans = itertools.pairwise(borders)
  return ((f"item {n}", a + 1, data[a + 1 : b]) for n, (a, b) in enumerate(spans, 1))
