"""Rebuilds byte-level BPE tokenizers from the metadata of GGUF files.

SPLITS is shared with `gguf_vocabulary`, which writes those metadata.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert import gguf
from llava_sp_jax.convert.gguf_file import Container
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.files import FormatError

# Types of tokens in llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Splits:
  """Describes what a byte-level BPE splits texts at before it merges.

  `steps` are the pre-tokenizers of a tokenizer.json. `whole` says that a piece which is a token
  itself is not merged (`ignore_merges`). `starts` says that texts begin with the begin-of-sequence
  token where a file does not say it.
  """

  steps: tuple[Json, ...]
  whole: bool = False
  starts: bool = False


def _bytes(split: bool) -> Json:
  return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split}


def _gpt4(digits: str) -> tuple[Json, Json]:
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
  return cut, _bytes(False)


SPLITS = {  # by `tokenizer.ggml.pre`
  "gpt-2": Splits((_bytes(True),)),
  "smollm": Splits(({"type": "Digits", "individual_digits": True}, _bytes(True))),
  "qwen2": Splits(_gpt4(r"\p{N}")),
  "llama-bpe": Splits(_gpt4(r"\p{N}{1,3}"), whole=True, starts=True),
  "dbrx": Splits(_gpt4(r"\p{N}{1,3}")),
}


def write_tokenizer(path: Path, out: Path) -> None:
  """Rebuilds a byte-level BPE from the GGUF's metadata as a Hugging Face folder.

  Raises: FormatError for a pre-tokenizer that is not in SPLITS, and for inconsistent parts.
  """
  container = gguf.open_llama(path)
  if (pre := gguf.text(container, "tokenizer.ggml.pre")) not in SPLITS:
    raise FormatError(f"{path}: knows the pre-tokenizers {', '.join(SPLITS)}, found {pre!a:.60}")
  tokens, merges = _texts(container, "tokens"), _texts(container, "merges")
  kinds = container.values.get("tokenizer.ggml.token_type")
  if (
    len(set(tokens)) < len(tokens) or not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens)
  ):
    raise FormatError(
      f"{path}: tokenizer.ggml: a token twice, or not one token_type for each token"
    )
  named = {
    f"{name}_token": tokens[number]
    for name, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))
    if (number := _number(container, tokens, f"{long}_token_id")) is not None
  }
  starts = container.values.get("tokenizer.ggml.add_bos_token", SPLITS[pre].starts)
  first = named.get("bos_token", "") if starts else ""
  try:
    save(out, pre, tokens, [tuple(m.split(" ")) for m in merges], kinds.tolist(), named, first)
  except ValueError as error:
    raise FormatError(
      f"{path}: tokenizer.ggml: its merges do not fit its tokens ({error})"
    ) from None


def save(
  out: Path,
  pre: str,
  tokens: list[str],
  merges: Any,
  kinds: list[int],
  named: dict[str, str],
  first: str,
) -> None:
  """Writes a byte-level BPE as a Hugging Face folder.

  Args:
    out: the folder.
    pre: a row of SPLITS.
    tokens: the texts of the ids, in the alphabet of byte-level BPE.
    merges: pairs of tokens, the first ones merged first.
    kinds: llama.cpp's type of each token.
    named: tokens by their names in `tokenizer_config.json`, such as "eos_token".
    first: the token that texts begin with; "" for none.

  Raises: ValueError for merges of other tokens.
  """
  from tokenizers import AddedToken, Tokenizer, decoders, models, processors
  from transformers import PreTrainedTokenizerFast

  row, ids = SPLITS[pre], {token: number for number, token in enumerate(tokens)}
  try:
    bpe = models.BPE(vocab=ids, merges=merges, fuse_unk=False, ignore_merges=row.whole)
  except Exception as error:  # any error of the library
    raise ValueError(str(error)) from None
  tokenizer = Tokenizer(bpe)
  tokenizer.pre_tokenizer = _pre_tokenizer(row.steps)
  tokenizer.decoder = decoders.ByteLevel()
  add: dict[int, Callable[[Any], Any]] = {
    CONTROL: tokenizer.add_special_tokens,
    USER_DEFINED: tokenizer.add_tokens,
  }
  for kind, method in add.items():
    special = kind == CONTROL
    found = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
    method([AddedToken(t, special=special, normalized=False) for t in found])
  if first:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[first, "$A"], special_tokens=[(first, ids[first])]
    )
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(str(out))


def _pre_tokenizer(steps: tuple[Json, ...]) -> Any:
  """Returns the library's object of pre-tokenizers, which can only be read within a tokenizer."""
  from tokenizers import Tokenizer

  one = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
  empty: Json = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
  model = {"type": "BPE", "vocab": {}, "merges": []}
  said: Json = {"version": "1.0", "added_tokens": [], **empty, "pre_tokenizer": one, "model": model}
  return Tokenizer.from_str(json.dumps(said)).pre_tokenizer


def _texts(container: Container, key: str) -> list[str]:
  try:
    return [text.decode() for text in container.values[f"tokenizer.ggml.{key}"]]
  except (KeyError, AttributeError, TypeError, UnicodeDecodeError):
    raise FormatError(
      f"{container.file.path}: no list of UTF-8 texts under tokenizer.ggml.{key}"
    ) from None


def _number(container: Container, tokens: list[str], key: str) -> int | None:
  """Returns the id of a named token; None if the file has none. Raises: FormatError."""
  number = container.values.get(f"tokenizer.ggml.{key}")
  if number is None:
    return None
  if type(number) is not int or not 0 <= number < len(tokens):
    raise FormatError(f"{container.file.path}: tokenizer.ggml.{key} is no token: {number!a:.40}")
  return number
