"""Opens the tokenizer of a checkpoint, and compares it with the embedding and the template."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import weakref
from pathlib import Path

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import formats
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.tokenizer import Tokenizer, TokenizerError


def open_tokenizer(source: Loaded) -> Tokenizer | None:
  """Opens the tokenizer of a checkpoint, or returns None if it has none.

  The tokenizer is compared with the embedding and the template. Special tokens without a row in the
  embedding only cause a warning: published folders have a padding token that no text names.

  Raises: TokenizerError for files that are not a tokenizer; FormatError when other tokens have no
    row in the embedding, or generation would not see the end of a reply.
  """
  if not source.tokenizer:
    return None
  tokenizer = _tokenizer(source.tokenizer)
  rows = source.config.model.language_model.vocab_size
  special = sum(id_ >= rows for id_ in tokenizer.special_ids)
  if len(tokenizer) > rows + special:
    raise FormatError(
      f"{source.tokenizer}: a tokenizer of {len(tokenizer):,} tokens, but the embedding has "
      f"{rows:,} rows; put the tokenizer there that the model was trained with"
    )
  if special:
    print(
      f"llava-sp: WARNING: {source.tokenizer}: {special} special tokens have no row in the "
      f"embedding of {rows:,}; no text may name them",
      file=sys.stderr,
      flush=True,
    )
  if "projector" not in source.parts:
    return tokenizer
  name = source.config.data.template
  config_lib.lookup("--template", name, conversation.TEMPLATES)
  if why := reading.misfit(name, tokenizer):
    raise FormatError(f"{source.tokenizer}: {why}; name one with --template")
  return tokenizer


def _tokenizer(folder: Path) -> Tokenizer:
  """Opens a copy of the tokenizer files: transformers would read a model's config beside them."""
  with contextlib.ExitStack() as copied:
    copy = copied.enter_context(tempfile.TemporaryDirectory(prefix="llava-sp-tokenizer-"))
    formats.copy_tokenizer(folder, Path(copy))
    try:
      tokenizer = Tokenizer(copy)
    except TokenizerError as error:
      raise TokenizerError(str(error).replace(copy, str(folder))) from None
    weakref.finalize(tokenizer, copied.pop_all().close)
  return tokenizer
