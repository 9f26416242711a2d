"""Finds the folders that a checkpoint names, and the files of its tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from llava_sp_jax import storage
from llava_sp_jax.convert import key_tables, keys, settings
from llava_sp_jax.convert.torch_io import FormatError

HUB = "hf:"  # prefix of a name that is always the hub's, even if such a path exists
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # organization/name, @revision
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"]
# Beginnings of the names of a tokenizer's files.
_OF_TOKENIZER = (
  "tokenizer",
  "special_tokens_map",
  "added_tokens",
  "vocab",
  "merges",
  "chat_template",
)


def is_hub_name(name: str) -> bool:
  """Returns whether a string has the form of a repository name on the Hugging Face hub.

  That is "organization/name", with "hf:" before it or not, and "@revision" behind it or not.
  Nothing is looked up.
  """
  return bool(_HUB_NAME.fullmatch(name.removeprefix(HUB)))


def local(name: str, wanted: Sequence[str] = _WANTED) -> Path:
  """Returns the path of a folder or file, or of a hub repository that is fetched.

  An existing path is returned as it is. Otherwise a name of the hub, with or without `hf:`, is
  fetched. So is all that is at an address such as gs://, each time. Any other name is returned as
  it is, as a path.

  `wanted` are patterns of the files that are fetched.

  Raises: FormatError when the repository cannot be fetched.
  """
  if storage.remote(name):
    return storage.of(there := storage.place(name)).local(there)
  if not name.startswith(HUB) and (Path(name).exists() or not is_hub_name(name)):
    return Path(name)
  return fetched(name, "", wanted)


def tokenizer(name: str) -> Path:
  """Returns the folder of a tokenizer: `name` itself, or that of a hub repository.

  A repository is fetched without its weights. Raises: FormatError when it cannot be fetched.
  """
  return local(name, [f"{start}*" for start in _OF_TOKENIZER])


def fetched(name: str, flag: str, wanted: Sequence[str] = _WANTED) -> Path:
  """Fetches a hub repository, and returns its folder in the hub's local cache.

  Args:
    name: "organization/name", with "hf:" before it or not, and "@revision" behind it or not.
    flag: the option that names a local folder instead, for the message; "" for none.
    wanted: patterns of the files that are fetched.

  Raises: FormatError for a name of another form, or when the repository cannot be fetched.
  """
  repository, _, revision = name.removeprefix(HUB).partition("@")
  instead = f"; name a folder with {flag}" if flag else ""
  if not is_hub_name(repository):
    raise FormatError(f"{name}: expected {HUB}organization/name, or with @revision behind it")
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

  try:
    return Path(
      snapshot_download(repository, revision=revision or None, allow_patterns=list(wanted))
    )
  except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
    said = " ".join(str(error).split())
    raise FormatError(
      f"{name}: no such folder, and not fetched from the hub ({said:.300}){instead}"
    ) from None


def resolve(name: str, beside: Path, flag: str) -> Path:
  """Returns a local folder: `name` itself, one next to `beside`, or one fetched from the hub.

  `beside` is the checkpoint that needs it, and `flag` the option that names another folder.

  Raises: FormatError that names `flag`, when `name` is empty or nothing is found.
  """
  if not name:
    raise FormatError(f"{beside} does not say what it was trained on; name it with {flag}")
  if storage.remote(name):
    return local(name)
  if not name.startswith(HUB):
    for path in (Path(name), beside.parent / name, beside.parent.parent / name):
      if path.exists():
        return path
    if not is_hub_name(name):
      raise FormatError(f"{name}: no such folder, but {beside} needs it; name another with {flag}")
  return fetched(name, flag)


def lasting(name: str) -> str:
  """Returns the absolute path of an existing folder; any other name, as of the hub, as it is."""
  return str(Path(name).absolute()) if name and Path(name).exists() else name


def reachable(name: str) -> str:
  """Returns the name of a folder if it exists or is a hub name; "" otherwise."""
  return name if name and (storage.place(name).exists() or is_hub_name(name)) else ""


# Settings files that are checked, but not used.
_CHECKED: dict[str, keys.Table] = {
  "generation_config.json": key_tables.GENERATION,
  "tokenizer_config.json": key_tables.TOKENIZER,
}


def check_settings(folders: Sequence[Path], allow_unknown: bool) -> None:
  """Checks the settings of generation and tokenizer, each in the first folder that has their file.

  Raises: FormatError for unknown keys, unless `allow_unknown`, and for wrong values.
  """
  for name, table in _CHECKED.items():
    path = next((f / name for f in folders if (f / name).is_file()), None)
    if path:
      keys.read(settings.read_json(path), table, str(path), allow_unknown)


def copy_tokenizer(folder: Path, out: Path) -> None:
  """Copies the files of a tokenizer from `folder` to `out`, and no others; makes `out`."""
  out.mkdir(exist_ok=True)
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name.startswith(_OF_TOKENIZER):
      shutil.copy(path, out / path.name)


def has_tokenizer(path: Path) -> bool:
  """Returns whether a folder has a tokenizer.json or a tokenizer.model."""
  return any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))
