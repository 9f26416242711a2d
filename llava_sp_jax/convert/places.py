"""Where the folders lie that a checkpoint names, and the files of its tokenizer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from llava_sp_jax.convert.torch_io import FormatError


def resolve(name: str, beside: Path, flag: str) -> Path:
  """A local folder: `name` itself, one next to `beside`, or a copy fetched from the hub.

  Raises: FormatError that says which flag names it.
  """
  if not name:
    raise FormatError(f"{beside} does not say what it was trained on; name it with {flag}")
  for path in (Path(name), beside.parent / name, beside.parent.parent / name):
    if path.exists():
      return path
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise FormatError(f"{name}: no such folder, but {beside} needs it; name another with {flag}")
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

  wanted = ["*.json", "*.safetensors", "*.bin", "*.model"]
  try:
    return Path(snapshot_download(name, allow_patterns=wanted))
  except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
    raise FormatError(
      f"{name}: no such folder, and not fetched from the hub ({error}); name a folder with {flag}"
    ) from None


def copy_tokenizer(folder: Path, out: Path) -> None:
  """The files of a tokenizer, and no others."""
  wanted = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
  out.mkdir(exist_ok=True)
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name.startswith(wanted):
      shutil.copy(path, out / path.name)


def has_tokenizer(path: Path) -> bool:
  return any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))
