"""Opens torch checkpoints without torch: `.bin` (zip of a pickle) and safetensors, also sharded.

Opening reads names, shapes and dtypes. The values of a tensor are mapped when `array()` is called,
so a checkpoint may be larger than the memory. docs/security.md says what files may hold, and their
limits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_sp_jax import files, json_files
from llava_sp_jax.convert.safetensors_file import open_safetensors
from llava_sp_jax.convert.tensor import BFLOAT16, Tensor, Tensors
from llava_sp_jax.convert.torch_bin import STORAGES, open_bin
from llava_sp_jax.files import FormatError

__all__ = ["BFLOAT16", "STORAGES", "WEIGHTS", "FormatError", "Tensor", "Tensors", "find",
           "open_bin", "open_file", "open_named", "open_safetensors"]  # fmt: skip

SAMPLED = 256  # values at each end of a tensor that are compared between two files
OPENERS: dict[str, Callable[[Path], Tensors]] = {
  ".safetensors": open_safetensors,
  ".bin": open_bin,
}
WEIGHTS = ("model", "pytorch_model")  # file stems of a Hugging Face model folder


def open_file(path: Path) -> Tensors:
  """Returns the tensors of one file by name; their values are not read.

  Raises: FormatError for a suffix other than .safetensors and .bin, or a file that cannot be read.
  """
  if path.suffix not in OPENERS:
    raise FormatError(f"{path}: expected a file that ends with {' or '.join(OPENERS)}")
  return OPENERS[path.suffix](path)


def find(folder: Path, stems: tuple[str, ...]) -> Path | None:
  """Returns the file of a folder that has the weights: `stem.suffix` or `stem.suffix.index.json`.

  Returns None if there is none. Published folders hold the same tensors in two formats. Then the
  first one counts, safetensors before `.bin`.

  Raises: FormatError that names both files when it is not clear which one counts.
  """
  found: list[Path] = []
  for stem, suffix in itertools.product(stems, OPENERS):
    names = (f"{stem}{suffix}.index.json", f"{stem}{suffix}")
    here = [folder / name for name in names if files.is_regular(folder / name)]
    if len(here) > 1:
      raise FormatError(f"{_both(*here)}: which are the weights? Move the other one away.")
    found += here
  for other in found[1:]:
    _same_tensors(found[0], other)
  return found[0] if found else None


def _both(first: Path, second: Path) -> str:
  return f"{first.parent}: holds both {first.name} and {second.name}"


def _same_tensors(first: Path, second: Path) -> None:
  """Compares the tensors that two files share: shapes, dtypes, and values at both ends.

  A second file that cannot be read is ignored.

  Raises: FormatError when they differ.
  """
  ours = _open(first)
  try:
    theirs = _open(second)
  except FormatError:
    return
  for name in sorted(set(ours) & set(theirs)):
    a, b = ours[name], theirs[name]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not all(map(_equal, _ends(a), _ends(b))):
      raise FormatError(f"{_both(first, second)}, which differ in {name}: move the wrong one away")


def _ends(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
  flat = tensor.array().flat
  return flat[:SAMPLED], flat[max(0, len(flat) - SAMPLED) :]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  return a.tobytes() == b.tobytes()


def open_named(folder: Path, stems: tuple[str, ...]) -> Tensors:
  """Returns the tensors of the weights in a folder by name; their values are not read.

  The weights are a file whose stem is one of `stems`, or several files with an index.

  Raises: FormatError that lists the files that were looked for.
  """
  path = find(folder, stems)
  if path is None:
    wanted = ", ".join(f"{stem}{suffix}" for stem in stems for suffix in OPENERS)
    raise FormatError(
      f"{folder}: no weights here; looked for {wanted} and their .index.json{_parts(folder, stems)}"
    )
  return _open(path)


def _parts(folder: Path, stems: tuple[str, ...]) -> str:
  """Returns what a message says about shards whose index is missing."""
  shard = re.compile(f"({'|'.join(stems)})-\\d+-of-\\d+\\.\\w+")
  found = sorted(path.name for path in folder.iterdir() if shard.fullmatch(path.name))
  return (
    f"; {_listed(found)} are parts, but the index that belongs to them is missing" if found else ""
  )


def _open(path: Path) -> Tensors:
  return _open_shards(path) if path.name.endswith(".index.json") else open_file(path)


def _open_shards(index: Path) -> Tensors:
  """Returns each tensor from the file that the index names.

  Tensors of a shard that the index does not name are ignored.
  """
  names = json_files.read_object(index).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(s, str) for s in names.values()):
    raise FormatError(f"{index}: expected JSON with a `weight_map` of tensors to file names")
  shards = sorted(set(names.values()))
  outside = [s for s in shards if Path(s).name != s or s in ("", "..")]
  absent = [s for s in shards if s not in outside and not files.is_regular(index.parent / s)]
  if outside or absent:
    kind, odd = ("outside its folder", outside) if outside else ("that are not there", absent)
    raise FormatError(f"{index}: names files {kind}: {_listed(odd)}")
  opened = {shard: open_file(index.parent / shard) for shard in shards}
  missing = sorted(name for name, shard in names.items() if name not in opened[shard])
  if missing:
    raise FormatError(f"{index}: named but not in the shard that it names: {_listed(missing)}")
  return {name: opened[shard][name] for name, shard in names.items()}


def _listed(names: list[str]) -> str:
  """Joins the first few names, short and in ASCII, because an index may name anything."""
  shown = ", ".join(ascii(name[:100]).strip("'") for name in names[:5])
  return shown + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
