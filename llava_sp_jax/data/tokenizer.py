"""Text to ids and back, as the original does it: sentencepiece folders, or any Hugging Face one.

Source of the sentencepiece rules: `LlamaTokenizer` of transformers 4.37, which tokenised the
original's training data; transformers 5 treats leading blanks and `legacy` otherwise.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

MODEL_FILE, SETTINGS_FILE = "tokenizer.model", "tokenizer_config.json"
SIDE_FILES = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
BLANK = "\u2581"  # how sentencepiece writes a blank

# Protocol buffers merge when joined: these bytes say normalizer_spec.add_dummy_prefix = false.
NO_DUMMY_PREFIX = bytes((0x1A, 2, 0x18, 0))


class Backend(Protocol):
  bos_id: int | None  # put in front of a row; None where the tokenizer has none
  eos_id: int | None
  special_ids: frozenset[int]

  def __len__(self) -> int: ...
  def encode_parts(self, texts: Sequence[str]) -> list[tuple[int, ...]]: ...
  def decode(self, ids: list[int]) -> str: ...
  def save(self, folder: Path) -> None: ...


class Tokenizer:
  """Text in, ids out, special tokens recognised; the same in training and in inference."""

  def __init__(self, path: str | Path):
    """Loads `path`, a folder with tokenizer.json or tokenizer.model and tokenizer_config.json.

    Raises:
      FileNotFoundError: when the folder is missing or holds no tokenizer.
    """
    folder = Path(path)
    names = ("tokenizer.json", MODEL_FILE)
    if not any((folder / n).is_file() for n in names):
      raise FileNotFoundError(f"{folder}: no tokenizer here; expected one of {', '.join(names)}")
    kind = _json(folder / SETTINGS_FILE).get("tokenizer_class", LLAMA_CLASSES[0])
    as_llama = (folder / MODEL_FILE).is_file() and kind in LLAMA_CLASSES
    self._backend: Backend = SentencePiece(folder) if as_llama else HuggingFace(folder)
    self.path = folder
    self.bos_id, self.eos_id = self._backend.bos_id, self._backend.eos_id

  def __len__(self) -> int:
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
    return self._backend.encode_parts((text,))[0]

  def encode_parts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids of each of several texts that follow each other without a gap.

    With sentencepiece the texts are read as one, and a token belongs to the text that its last
    character is from. Otherwise a border between two texts is always a border between tokens.
    """
    return self._backend.encode_parts(texts)

  def decode(self, ids: Any) -> str:
    """Text of `ids` without special tokens."""
    return self._backend.decode([int(i) for i in ids])

  def stop_ids(self, end: str) -> tuple[int, ...]:
    """Tokens that show that a reply is over, when replies are followed by `end`.

    The first special token of `end`, or just its first, and the end of a sequence.
    """
    ids = self.encode_parts(("a", end))[1]
    mark = next((i for i in ids if i in self._backend.special_ids), ids[0])
    return tuple(sorted({mark} if self.eos_id is None else {mark, self.eos_id}))

  def save(self, path: str | Path) -> None:
    """Writes the files that `Tokenizer(path)` needs."""
    Path(path).mkdir(parents=True, exist_ok=True)
    self._backend.save(Path(path))


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
    self.eos_id: int | None = self._ids[_content(settings.get("eos_token") or "</s>")]
    bos = self._ids[_content(settings.get("bos_token") or "<s>")]
    self.bos_id: int | None = bos if settings.get("add_bos_token", True) else None

  def _added(self, settings: dict[str, Any], extra: dict[str, int]) -> dict[str, int]:
    """{text: id} of the tokens that stand outside of sentencepiece's text."""
    ids = {_content(t): int(i) for i, t in settings.get("added_tokens_decoder", {}).items()} | extra
    named = [settings.get(name) or "" for name in NAMED_TOKENS]
    named += ["<s>", "</s>", "<unk>", *settings.get("additional_special_tokens", ())]
    for text in filter(None, map(_content, named)):
      own = self._with_blank.piece_to_id(text)
      new = max([self._with_blank.vocab_size(), *(i + 1 for i in ids.values())])
      ids.setdefault(text, own if self._with_blank.id_to_piece(own) == text else new)
    return ids

  def __len__(self) -> int:
    return max(self._with_blank.vocab_size(), max(self._ids.values()) + 1)

  def encode_parts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """See `Tokenizer.encode_parts`."""
    return _divide(self._tokens("".join(texts)), texts)

  def _tokens(self, text: str) -> list[tuple[int, int]]:
    """Each token's id and the index of its last character."""
    encoder = self._with_blank if self._legacy else self._without
    blank = "" if self._legacy or not text else BLANK
    result, at = [], -len(blank)
    for stretch in self._split.split(blank + text):
      if stretch in self._ids:
        result.append((self._ids[stretch], at + len(stretch) - 1))
      else:
        found = encoder.encode(stretch, return_type="offset_mapping")
        spans = zip(found["ids"], found["offsets"], strict=True)
        result += [(i, max(0, at + max(start, end - 1))) for i, (start, end) in spans]
      at += len(stretch)
    alone = blank and len(result) > 1 and result[0][0] == self._blank
    return result[1:] if alone and result[1][0] in self.special_ids else result

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

    self._inner: Any = AutoTokenizer.from_pretrained(str(folder))
    self.eos_id: int | None = self._inner.eos_token_id
    self.special_ids = frozenset(self._inner.all_special_ids)
    # By what it does: flags of `transformers` do not know of a post-processor that adds a token.
    ids = self._inner("a").input_ids
    adds_bos = bool(ids) and ids[0] == self._inner.bos_token_id
    self.bos_id: int | None = self._inner.bos_token_id if adds_bos else None
    # A blank in front of every text must not come in front of every part of a text.
    self._as_one = self._inner.tokenize("a")[0] != "a"

  def __len__(self) -> int:
    return len(self._inner)

  def _encode(self, text: str, **options: Any) -> Any:
    return self._inner(text, add_special_tokens=False, **options)

  def encode_parts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """See `Tokenizer.encode_parts`."""
    if not self._as_one:
      return [self._encode_alone(text) for text in texts]
    found = self._encode("".join(texts), return_offsets_mapping=True)
    spans = zip(found.input_ids, found.offset_mapping, strict=True)
    return _divide([(i, max(start, end - 1)) for i, (start, end) in spans], texts)

  @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - a tokenizer lives as long as its process
  def _encode_alone(self, text: str) -> tuple[int, ...]:
    return tuple(self._encode(text).input_ids)

  def decode(self, ids: list[int]) -> str:
    return self._inner.decode(ids, skip_special_tokens=True)

  def save(self, folder: Path) -> None:
    self._inner.save_pretrained(str(folder))


def _divide(tokens: list[tuple[int, int]], texts: Sequence[str]) -> list[tuple[int, ...]]:
  """(id, index of the last character) of joined texts -> the ids of each text."""
  ends = list(itertools.accumulate(map(len, texts)))
  found: list[list[int]] = [[] for _ in texts]
  for id_, last in tokens:
    found[bisect.bisect_right(ends, last)].append(id_)
  return [tuple(ids) for ids in found]


def _content(token: Any) -> str:
  """Text of a token that a settings file gives as text or as {"content": text, ..}."""
  return token["content"] if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.is_file() else {}


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
