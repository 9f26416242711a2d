"""Tokenizes and detokenizes like the original, from folders of sentencepiece or Hugging Face.

Source of the sentencepiece rules: `LlamaTokenizer` of transformers 4.37, which tokenized the
original's training data; transformers 5 treats leading spaces and `legacy` differently.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llava_sp_jax import files, json_files, storage
from llava_sp_jax.errors import LlavaSPError

MODEL_FILE, SETTINGS_FILE = "tokenizer.model", "tokenizer_config.json"
SIDE_FILES = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
BLANK = "\u2581"  # stands for a space in the pieces of sentencepiece

# Concatenated protocol buffers merge; these bytes set normalizer_spec.add_dummy_prefix to false.
NO_DUMMY_PREFIX = bytes((0x1A, 2, 0x18, 0))

MAX_IDS = 1 << 24
SHORT = 256  # the most characters of a text whose ids are cached: short texts recur
Spans = tuple[tuple[int, int], ...]  # each token's id, and the index of its last character


class TokenizerError(LlavaSPError, ValueError):
  """Reports a tokenizer that cannot be read or cannot do what is asked."""


class Backend(Protocol):
  """Defines what `Tokenizer` needs of a library."""

  bos_id: int | None  # the begin-of-sequence token; None if the tokenizer adds none
  eos_id: int | None
  special_ids: frozenset[int]
  mark_ids: frozenset[int]  # special tokens except the one for unknown text
  added: Mapping[str, int]  # ids of tokens that are found in a text before it is split

  def __len__(self) -> int: ...  # one more than the largest id
  def spans(self, text: str, inside: bool) -> Spans: ...
  def decode(self, ids: list[int]) -> str: ...
  def save(self, folder: Path) -> None: ...


class Tokenizer:
  """Converts text to ids, with special tokens recognized, and ids to text."""

  def __init__(self, path: str | Path):
    """Loads a folder with tokenizer.json or tokenizer.model, and tokenizer_config.json.

    Raises:
      FileNotFoundError: when the folder is missing or holds no tokenizer.
      TokenizerError: when its files are not those of a tokenizer.
    """
    there = storage.place(path)
    folder = storage.of(there).local(there)
    names = ("tokenizer.json", MODEL_FILE)
    if not any((folder / n).is_file() for n in names):
      raise FileNotFoundError(f"{folder}: no tokenizer here; expected one of {', '.join(names)}")
    kind = _json(folder / SETTINGS_FILE).get("tokenizer_class", LLAMA_CLASSES[0])
    as_llama = (folder / MODEL_FILE).is_file() and kind in LLAMA_CLASSES
    self._backend: Backend = _opened(SentencePiece if as_llama else HuggingFace, folder)
    self.path = folder
    self.bos_id, self.eos_id = self._backend.bos_id, self._backend.eos_id

  def __len__(self) -> int:
    """Returns one more than the largest id, the number of rows that an embedding needs."""
    return len(self._backend)

  def fingerprint(self) -> str:
    """Returns a SHA-256 hash of the files that the tokenizer was loaded from."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", MODEL_FILE, *SIDE_FILES):
      if (self.path / name).is_file():
        digest.update(name.encode() + hashlib.sha256((self.path / name).read_bytes()).digest())
    return digest.hexdigest()

  def encode(self, text: str) -> tuple[int, ...]:
    """Returns the ids of `text`, without a begin-of-sequence token."""
    return tuple(id_ for id_, _ in self.spans(text))

  def spans(self, text: str, inside: bool = False) -> Spans:
    """Returns the ids of `text`, each with the index of the token's last character.

    `inside` says that the text continues another one, so that no space is put in front of it.

    Raises: TokenizerError if `inside` is set and the tokenizer always puts a space in front.
    """
    return self._backend.spans(text, inside)

  @property
  def special_ids(self) -> frozenset[int]:
    """Returns the ids of special tokens, which `decode` leaves out."""
    return self._backend.special_ids

  @property
  def added(self) -> Mapping[str, int]:
    """Returns {text: id} of the tokens that are found in a text before the rest of it is split."""
    return self._backend.added

  @property
  def model_file(self) -> Path | None:
    """Returns the file of sentencepiece that texts are split with; None for other tokenizers."""
    return self.path / MODEL_FILE if isinstance(self._backend, SentencePiece) else None

  def has_special(self, text: str) -> bool:
    """Returns whether `text` contains a special token, other than that of unknown text."""
    return any(id_ in self._backend.mark_ids for id_, _ in self.spans(text))

  def decode(self, ids: Any) -> str:
    """Returns the text of `ids`, without special tokens."""
    return self._backend.decode([int(i) for i in ids])

  def end_ids(self, end: str) -> tuple[int, ...]:
    """Returns the ids of the mark `end` when it follows a reply, such as "</s>"."""
    return tuple(id_ for id_, last in self.spans("a" + end) if last)

  def stop_ids(self, end: str) -> tuple[int, ...]:
    """Returns the ids, ascending, at which generation stops, for replies that `end` follows.

    These are the end-of-sequence token, if there is one, and the first special token of `end`, or
    its first token if it has none.
    """
    ids = self.end_ids(end)
    mark = next((i for i in ids if i in self._backend.mark_ids), ids[0])
    return tuple(sorted({mark} if self.eos_id is None else {mark, self.eos_id}))

  def save(self, path: str | Path) -> None:
    """Writes the files that `Tokenizer(path)` needs."""
    Path(path).mkdir(parents=True, exist_ok=True)
    self._backend.save(Path(path))


def _opened(kind: Callable[[Path], Backend], folder: Path) -> Backend:
  """Loads a backend.

  Raises: TokenizerError of one line for any exception of the library, FormatError for a pointer
    file.
  """
  for name in ("tokenizer.json", MODEL_FILE):
    if files.is_regular(folder / name):
      with files.open_regular(folder / name) as file:
        files.refuse_pointer(folder / name, files.read_at(file, folder / name, 0, 64))
  try:
    return kind(folder)
  except (TokenizerError, files.FormatError):
    raise
  except Exception as error:
    why = " ".join(str(error).split())
    raise TokenizerError(
      f"{folder}: no tokenizer can be read from its files ({why:.200})"
    ) from None


class SentencePiece:
  """Reads a `tokenizer.model` with the settings beside it.

  Puts a space in front of the whole text if the setting `legacy` is false, and otherwise (also if
  it is missing) in front of every stretch of text between special tokens.
  """

  def __init__(self, folder: Path):
    import sentencepiece

    model = (folder / MODEL_FILE).read_bytes()
    self._folder = folder
    self._with_blank = sentencepiece.SentencePieceProcessor(model_proto=model)
    self._without = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
    settings = _json(folder / "special_tokens_map.json") | _json(folder / SETTINGS_FILE)
    self._legacy = settings.get("legacy") in (None, True)
    self._ids = self._added(settings, _json(folder / "added_tokens.json"))
    longest_first = sorted(self._ids, key=len, reverse=True)
    self.added: Mapping[str, int] = self._ids
    self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    self._blank = self._without.piece_to_id(BLANK)
    self.special_ids = frozenset(self._ids.values())
    self.mark_ids = self.special_ids - {self._ids[_content(settings.get("unk_token") or "<unk>")]}
    self.eos_id: int | None = self._ids[_content(settings.get("eos_token") or "</s>")]
    bos = self._ids[_content(settings.get("bos_token") or "<s>")]
    self.bos_id: int | None = bos if settings.get("add_bos_token", True) else None

  def _added(self, settings: dict[str, Any], extra: dict[str, int]) -> dict[str, int]:
    """Returns {text: id} of the special and added tokens.

    Raises: TokenizerError for an id out of range.
    """
    ids = {
      _content(t): int(i) for i, t in (settings.get("added_tokens_decoder") or {}).items()
    } | extra
    named = [settings.get(name) or "" for name in NAMED_TOKENS]
    named += ["<s>", "</s>", "<unk>", *(settings.get("additional_special_tokens") or ())]
    for text in filter(None, map(_content, named)):
      own = self._with_blank.piece_to_id(text)
      new = max([self._with_blank.vocab_size(), *(i + 1 for i in ids.values())])
      ids.setdefault(text, own if self._with_blank.id_to_piece(own) == text else new)
    if odd := [text for text, id_ in ids.items() if not 0 <= id_ < MAX_IDS]:
      raise TokenizerError(f"{self._folder}: the id of {odd[0]!r:.40} is {ids[odd[0]]}")
    return ids

  def __len__(self) -> int:
    return max(self._with_blank.vocab_size(), max(self._ids.values()) + 1)

  def spans(self, text: str, inside: bool) -> Spans:
    """Returns (id, index of the last character) of each token, as `Tokenizer.spans` describes."""
    blank = "" if inside or self._legacy or not text else BLANK
    result, at = [], -len(blank)
    for number, stretch in enumerate(self._split.split(blank + text)):
      if stretch in self._ids:
        result.append((self._ids[stretch], at + len(stretch) - 1))
      else:
        continues = inside and not number
        encoder = self._with_blank if self._legacy and not continues else self._without
        found = encoder.encode(stretch, return_type="offset_mapping")
        spans = zip(found["ids"], found["offsets"], strict=True)
        result += [(i, max(0, at + max(start, end - 1))) for i, (start, end) in spans]
      at += len(stretch)
    alone = blank and len(result) > 1 and result[0][0] == self._blank
    return tuple(result[1:] if alone and result[1][0] in self.special_ids else result)

  def decode(self, ids: list[int]) -> str:
    result: str = self._with_blank.decode([i for i in ids if i not in self.special_ids])
    return result

  def save(self, folder: Path) -> None:
    for name in (MODEL_FILE, *SIDE_FILES):
      if (self._folder / name).is_file():
        shutil.copyfile(self._folder / name, folder / name)


class HuggingFace:
  """Reads any folder of a fast tokenizer with `transformers`."""

  def __init__(self, folder: Path):
    from transformers import AutoTokenizer  # slow to import

    # Never runs code from the folder, and does not prompt for permission to do so.
    self._inner: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    self.eos_id: int | None = self._inner.eos_token_id
    self.added: Mapping[str, int] = {
      t.content: i for i, t in self._inner.added_tokens_decoder.items()
    }
    marked = {i for i, token in self._inner.added_tokens_decoder.items() if token.special}
    self.special_ids = frozenset({*self._inner.all_special_ids, *marked})
    self.mark_ids = self.special_ids - {self._inner.unk_token_id}
    # Found by a trial: the flags of `transformers` ignore a post-processor that adds the token.
    bare = self._inner("a", add_special_tokens=False).input_ids
    ids = self._inner("a").input_ids
    self.bos_id: int | None = ids[0] if ids and ids[1 : 1 + len(bare)] == bare else None
    # Not the number of tokens: some vocabularies have gaps before added tokens.
    self._count = max(self._inner.get_vocab().values()) + 1
    self._puts_blank = self._inner.tokenize("a")[0] != "a"  # in front of every text
    if not self._inner.is_fast:
      raise TokenizerError(
        f"{folder}: {type(self._inner).__name__} does not say where its tokens stand in a text; "
        "expected a tokenizer.json (transformers' `save_pretrained` of a fast tokenizer writes one)"
      )

  def __len__(self) -> int:
    return self._count

  def spans(self, text: str, inside: bool) -> Spans:
    """Returns (id, index of the last character) of each token, as `Tokenizer.spans` describes."""
    return self._kept(text, inside) if len(text) <= SHORT else self._read(text, inside)

  @functools.lru_cache(maxsize=1 << 14)  # noqa: B019 - a tokenizer lives as long as its process
  def _kept(self, text: str, inside: bool) -> Spans:
    return self._read(text, inside)

  def _read(self, text: str, inside: bool) -> Spans:
    if inside and self._puts_blank:
      raise TokenizerError(f"the tokenizer puts a blank in front of {text!r:.40}, which has none")
    found = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
    lasts = itertools.accumulate((_last(text, *o) for o in found.offset_mapping), max)
    return tuple(zip(found.input_ids, lasts, strict=True))

  def decode(self, ids: list[int]) -> str:
    result: str = self._inner.decode(ids, skip_special_tokens=True)
    return result

  def save(self, folder: Path) -> None:
    self._inner.save_pretrained(str(folder))


def _last(text: str, start: int, end: int) -> int:
  """Returns the index of a token's last character from offsets of `tokenizers`.

  The offsets of a token of whitespace alone may be empty.
  """
  if end > start:
    return end - 1
  return start - 1 if start and text[start - 1].isspace() else start


def _content(token: Any) -> str:
  """Returns the text of a token that a settings file gives as text or as {"content": text, ..}."""
  result: str = token["content"] if isinstance(token, dict) else token
  return result


def _json(path: Path) -> dict[str, Any]:
  return json_files.read_object(path) if path.is_file() else {}


def train_bpe(texts: Iterable[str], out: str | Path, vocab_size: int) -> None:
  """Trains a byte-level BPE tokenizer on `texts`, for models from scratch, and writes it to `out`.

  `out` is a folder. The tokenizer has at most `vocab_size` tokens. Its special tokens are `<unk>`,
  `<s>` (begin of sequence) and `</s>` (end of sequence).
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
