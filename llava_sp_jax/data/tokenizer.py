"""Text to ids and back, as the original does it: sentencepiece folders, or any Hugging Face one.

Source of the sentencepiece rules: `LlamaTokenizer` of transformers 4.37, which tokenised the
original's training data; transformers 5 treats leading blanks and `legacy` otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from llava_sp_jax import files, json_files
from llava_sp_jax.errors import LlavaSPError

MODEL_FILE, SETTINGS_FILE = "tokenizer.model", "tokenizer_config.json"
SIDE_FILES = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
BLANK = "\u2581"  # how sentencepiece writes a blank

# Protocol buffers merge when joined: these bytes say normalizer_spec.add_dummy_prefix = false.
NO_DUMMY_PREFIX = bytes((0x1A, 2, 0x18, 0))

MAX_IDS = 1 << 24
SHORT = 256  # characters of a text whose ids are kept: questions and answers come again and again
Spans = tuple[tuple[int, int], ...]  # each token's id, and the index of its last character


class TokenizerError(LlavaSPError, ValueError):
  """A tokenizer that cannot do what is asked; the message names it and says what to do."""


class Backend(Protocol):
  bos_id: int | None  # put in front of a row; None where the tokenizer has none
  eos_id: int | None
  special_ids: frozenset[int]
  mark_ids: frozenset[int]  # special tokens that a text can name: not what stands for unknown text

  def __len__(self) -> int: ...  # one more than the largest id
  def spans(self, text: str, inside: bool) -> Spans: ...
  def decode(self, ids: list[int]) -> str: ...
  def save(self, folder: Path) -> None: ...


class Tokenizer:
  """Text in, ids out, special tokens recognised; the same in training and in inference."""

  def __init__(self, path: str | Path):
    """Loads `path`, a folder with tokenizer.json or tokenizer.model and tokenizer_config.json.

    Raises:
      FileNotFoundError: when the folder is missing or holds no tokenizer.
      TokenizerError: when its files are none of a tokenizer.
    """
    folder = Path(path)
    names = ("tokenizer.json", MODEL_FILE)
    if not any((folder / n).is_file() for n in names):
      raise FileNotFoundError(f"{folder}: no tokenizer here; expected one of {', '.join(names)}")
    kind = _json(folder / SETTINGS_FILE).get("tokenizer_class", LLAMA_CLASSES[0])
    as_llama = (folder / MODEL_FILE).is_file() and kind in LLAMA_CLASSES
    self._backend: Backend = _opened(SentencePiece if as_llama else HuggingFace, folder)
    self.path = folder
    self.bos_id, self.eos_id = self._backend.bos_id, self._backend.eos_id

  def __len__(self) -> int:
    """One more than the largest id: the rows that an embedding needs."""
    return len(self._backend)

  def fingerprint(self) -> str:
    """A hash of the files it was loaded from."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", MODEL_FILE, *SIDE_FILES):
      if (self.path / name).is_file():
        digest.update(name.encode() + hashlib.sha256((self.path / name).read_bytes()).digest())
    return digest.hexdigest()

  def encode(self, text: str) -> tuple[int, ...]:
    """Ids of `text` alone, without a begin-of-sequence token."""
    return tuple(id_ for id_, _ in self.spans(text))

  def spans(self, text: str, inside: bool = False) -> Spans:
    """Ids of `text` with the index of each token's last character, in the order of the text.

    `inside` says that the text continues another one, so no blank is put in front of it.

    Raises: TokenizerError where the tokenizer cannot continue a text.
    """
    return self._backend.spans(text, inside)

  @property
  def special_ids(self) -> frozenset[int]:
    """Ids that no plain text becomes."""
    return self._backend.special_ids

  def has_special(self, text: str) -> bool:
    """Whether a special token stands in `text`, other than that of unknown text."""
    return any(id_ in self._backend.mark_ids for id_, _ in self.spans(text))

  def decode(self, ids: Any) -> str:
    """Text of `ids` without special tokens."""
    return self._backend.decode([int(i) for i in ids])

  def end_ids(self, end: str) -> tuple[int, ...]:
    """Ids of the mark `end` behind a reply."""
    return tuple(id_ for id_, last in self.spans("a" + end) if last)

  def stop_ids(self, end: str) -> tuple[int, ...]:
    """Tokens that show that a reply is over, when replies are followed by `end`.

    The first special token of `end`, or just its first, and the end of a sequence.
    """
    ids = self.end_ids(end)
    mark = next((i for i in ids if i in self._backend.mark_ids), ids[0])
    return tuple(sorted({mark} if self.eos_id is None else {mark, self.eos_id}))

  def save(self, path: str | Path) -> None:
    """Writes the files that `Tokenizer(path)` needs."""
    Path(path).mkdir(parents=True, exist_ok=True)
    self._backend.save(Path(path))


def _opened(kind: Callable[[Path], Backend], folder: Path) -> Backend:
  """Raises: TokenizerError in one line, whatever a library raises for files of something else."""
  for name in ("tokenizer.json", MODEL_FILE):
    if files.is_regular(folder / name):
      with files.open_regular(folder / name) as file:
        files.refuse_pointer(folder / name, files.read_at(file, folder / name, 0, 64))
  try:
    return kind(folder)
  except (TokenizerError, files.FormatError):
    raise
  except Exception as error:
    said = " ".join(str(error).split())
    raise TokenizerError(
      f"{folder}: no tokenizer can be read from its files ({said:.200})"
    ) from None


class SentencePiece:
  """A `tokenizer.model` with the settings beside it.

  A blank goes in front of the whole text (`legacy` false), or of every stretch of text between
  special tokens (`legacy` true, and where the settings do not say).
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
    self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    self._blank = self._without.piece_to_id(BLANK)
    self.special_ids = frozenset(self._ids.values())
    self.mark_ids = self.special_ids - {self._ids[_content(settings.get("unk_token") or "<unk>")]}
    self.eos_id: int | None = self._ids[_content(settings.get("eos_token") or "</s>")]
    bos = self._ids[_content(settings.get("bos_token") or "<s>")]
    self.bos_id: int | None = bos if settings.get("add_bos_token", True) else None

  def _added(self, settings: dict[str, Any], extra: dict[str, int]) -> dict[str, int]:
    """{text: id} of the tokens that stand outside of sentencepiece's text."""
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
    """See `Tokenizer.spans`."""
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
    return self._with_blank.decode([i for i in ids if i not in self.special_ids])

  def save(self, folder: Path) -> None:
    for name in (MODEL_FILE, *SIDE_FILES):
      if (self._folder / name).is_file():
        shutil.copyfile(self._folder / name, folder / name)


class HuggingFace:
  """Whatever `transformers` makes of a folder."""

  def __init__(self, folder: Path):
    from transformers import AutoTokenizer  # slow to import

    # Code that a folder brings is never run, and nobody is asked whether it may be.
    self._inner: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    self.eos_id: int | None = self._inner.eos_token_id
    marked = {i for i, token in self._inner.added_tokens_decoder.items() if token.special}
    self.special_ids = frozenset({*self._inner.all_special_ids, *marked})
    self.mark_ids = self.special_ids - {self._inner.unk_token_id}
    # By what it does: flags of `transformers` do not know of a post-processor that adds a token.
    bare = self._inner("a", add_special_tokens=False).input_ids
    ids = self._inner("a").input_ids
    self.bos_id: int | None = ids[0] if ids and ids[1 : 1 + len(bare)] == bare else None
    # Not how many there are: some leave gaps in front of what was added.
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
    """See `Tokenizer.spans`."""
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
    return self._inner.decode(ids, skip_special_tokens=True)

  def save(self, folder: Path) -> None:
    self._inner.save_pretrained(str(folder))


def _last(text: str, start: int, end: int) -> int:
  """The last character of a token from offsets of `tokenizers`, which leave blanks out."""
  if end > start:
    return end - 1
  return start - 1 if start and text[start - 1].isspace() else start


def _content(token: Any) -> str:
  """Text of a token that a settings file gives as text or as {"content": text, ..}."""
  return token["content"] if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
  return json_files.read_object(path) if path.is_file() else {}


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
