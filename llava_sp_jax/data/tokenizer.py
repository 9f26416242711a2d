"""Text to ids and back, through any Hugging Face tokenizer folder."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Tokenizer:
  """A thin face of a `transformers` tokenizer: text in, ids out, special tokens recognised."""

  def __init__(self, path: str | Path):
    """Loads `path`, a folder with tokenizer.json or tokenizer.model and tokenizer_config.json.

    Raises:
      FileNotFoundError: when the folder is missing or holds no tokenizer.
    """
    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / n).is_file() for n in names):
      raise FileNotFoundError(f"{folder}: no tokenizer here; expected one of {', '.join(names)}")
    from transformers import AutoTokenizer  # slow to import

    self._inner: Any = AutoTokenizer.from_pretrained(str(folder))
    self.path = folder
    self.bos_id: int | None = self._inner.bos_token_id if self._adds_bos() else None

  def __len__(self) -> int:
    return len(self._inner)

  def _adds_bos(self) -> bool:
    """By what it does: flags of `transformers` do not know of a post-processor that adds it."""
    ids = self._inner("a").input_ids
    return bool(ids) and ids[0] == self._inner.bos_token_id

  @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - a tokenizer lives as long as its process
  def encode(self, text: str) -> tuple[int, ...]:
    """Ids of `text` alone, without a begin-of-sequence token."""
    return tuple(self._inner(text, add_special_tokens=False).input_ids)

  def decode(self, ids: Any) -> str:
    """Text of `ids` without special tokens."""
    return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

  def save(self, path: str | Path) -> None:
    """Writes the files that `Tokenizer(path)` needs."""
    self._inner.save_pretrained(str(path))


def train_bpe(texts: Iterable[str], out: str | Path, vocab_size: int) -> None:
  """Learns a byte-level BPE from `texts` and writes it as a folder that `Tokenizer` reads.

  For models from scratch: `<s>` goes in front of a text, `</s>` ends an answer.
  """
  from tokenizers import Tokenizer as Bpe
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers
  from transformers import PreTrainedTokenizerFast

  bpe = Bpe(models.BPE(unk_token="<unk>"))
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<unk>", "<s>", "</s>"],
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  bpe.train_from_iterator(texts, trainer)
  bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  fast = PreTrainedTokenizerFast(
    tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
  )
  fast.save_pretrained(str(out))
