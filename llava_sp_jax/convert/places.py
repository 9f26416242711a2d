"""Where the folders lie that a checkpoint names, and the files of its tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from llava_sp_jax.convert import key_tables, keys, settings
from llava_sp_jax.convert.torch_io import FormatError

HUB = "hf:"  # in front of a name that is meant to be the hub's, whatever lies here
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # organization/name, @revision
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"]
# How the names of a tokenizer's files begin.
_OF_TOKENIZER = (
  "tokenizer",
  "special_tokens_map",
  "added_tokens",
  "vocab",
  "merges",
  "chat_template",
)


def is_hub_name(name: str) -> bool:
  """Whether a text could be the name of a repository of the hub, with HUB in front or without."""
  return bool(_HUB_NAME.fullmatch(name.removeprefix(HUB)))


def local(name: str, wanted: Sequence[str] = _WANTED) -> Path:
  """A path as it is if it exists; otherwise a name of the hub, with `hf:` or without, fetched.

  `wanted` are patterns of the files that are needed. Raises: FormatError when the hub does not give
  it. A path that is no such name is returned as it is.
  """
  if not name.startswith(HUB) and (Path(name).exists() or not is_hub_name(name)):
    return Path(name)
  return fetched(name, "", wanted)


def tokenizer(name: str) -> Path:
  """The folder of a tokenizer, as `local` finds it; of a repository, without its weights."""
  return local(name, [f"{start}*" for start in _OF_TOKENIZER])


def fetched(name: str, flag: str, wanted: Sequence[str] = _WANTED) -> Path:
  """The folder of the hub's local cache that holds a repository. Raises: FormatError."""
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
  """A local folder: `name` itself, one next to `beside`, or a copy fetched from the hub.

  Raises: FormatError that says which flag names it.
  """
  if not name:
    raise FormatError(f"{beside} does not say what it was trained on; name it with {flag}")
  if not name.startswith(HUB):
    for path in (Path(name), beside.parent / name, beside.parent.parent / name):
      if path.exists():
        return path
    if not is_hub_name(name):
      raise FormatError(f"{name}: no such folder, but {beside} needs it; name another with {flag}")
  return fetched(name, flag)


def lasting(name: str) -> str:
  """A name as it leads to its folder from everywhere on this machine."""
  return str(Path(name).absolute()) if name and Path(name).exists() else name


def reachable(name: str) -> str:
  """A name that was kept, if it leads somewhere from here; "" otherwise."""
  return name if name and (Path(name).exists() or is_hub_name(name)) else ""


# Settings that are read only to see that nothing in them is missed.
_CHECKED: dict[str, keys.Table] = {
  "generation_config.json": key_tables.GENERATION,
  "tokenizer_config.json": key_tables.TOKENIZER,
}


def check_settings(folders: Sequence[Path], allow_unknown: bool) -> None:
  """Raises: FormatError for settings of generation or tokenizer that are unknown or wrong.

  The first folder that has a file of a name is the one that counts.
  """
  for name, table in _CHECKED.items():
    path = next((f / name for f in folders if (f / name).is_file()), None)
    if path:
      keys.read(settings.read_json(path), table, str(path), allow_unknown)


def copy_tokenizer(folder: Path, out: Path) -> None:
  """The files of a tokenizer, and no others."""
  out.mkdir(exist_ok=True)
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name.startswith(_OF_TOKENIZER):
      shutil.copy(path, out / path.name)


def has_tokenizer(path: Path) -> bool:
  return any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))
