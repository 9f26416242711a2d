"""Describes a tokenizer as GGUF's metadata, and reads texts as llama.cpp does with them.

A tokenizer is written only if llama.cpp reads the prompts of its template as the ids of training.
Source: llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax.convert import gguf_tokenizer
from llava_sp_jax.convert.gguf_tokenizer import (
  BYTE,
  CONTROL,
  NORMAL,
  SPLITS,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
)
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.places import copy_tokenizer
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.conversation import IMAGE, Template
from llava_sp_jax.data.example import IMAGE_ID
from llava_sp_jax.data.tokenizer import BLANK, Tokenizer

PROBE = "It's 3.14 in 2024: naïve café\n\n  two  tabs\t(日本語 🙂)!"
_PREFIXES = (  # of a tokenizer.json that was made of sentencepiece: whether a space is put in front
  ({"type": "Metaspace", "prepend_scheme": "always"}, True),
  ({"type": "Metaspace", "prepend_scheme": "first"}, True),
  ({"type": "Metaspace", "prepend_scheme": "never"}, False),
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Holds a tokenizer as llama.cpp knows it.

  `model` is "gpt2" for byte-level BPE, whose `pre` is a row of SPLITS, or "llama" for sentencepiece,
  which has `scores` instead of `merges`. `ends` are the ids at which an answer ends.
  """

  model: str
  tokens: tuple[str, ...]
  kinds: tuple[int, ...]
  pre: str = "default"
  merges: tuple[str, ...] = ()
  scores: tuple[float, ...] = ()
  prefix: bool = False  # whether a space is put in front of texts
  bos: int | None = None  # the token that texts begin with
  unk: int | None = None
  ends: tuple[int, ...] = ()

  def metadata(self) -> Json:
    """Returns the keys of the file, without "tokenizer.", in the order of llama.cpp's files."""
    named = dict(zip(("eos", "eot"), self.ends, strict=False))
    ids = {"bos": self.bos, **named, "unknown": self.unk}
    return {
      "ggml.model": self.model,
      "ggml.pre": self.pre,
      "ggml.tokens": list(self.tokens),
      **({"ggml.scores": list(self.scores)} if self.scores else {}),
      "ggml.token_type": list(self.kinds),
      **({"ggml.merges": list(self.merges)} if self.merges else {}),
      **{f"ggml.{name}_token_id": i for name, i in ids.items() if i is not None},
      "ggml.add_bos_token": self.bos is not None,
      "ggml.add_eos_token": False,
      "ggml.add_space_prefix": self.prefix,
    }


def of(folder: Path, template: str) -> Vocabulary:
  """Returns a tokenizer as llama.cpp will read it.

  Args:
    folder: the tokenizer's folder.
    template: the conversation template, whose end mark ends an answer.

  Raises: FormatError for a tokenizer that llama.cpp does not know, or that it reads otherwise.
  """
  with tempfile.TemporaryDirectory() as place:  # AutoTokenizer also reads a config.json beside
    copy_tokenizer(folder, Path(place))
    ours = Tokenizer(place)
    found = _sentencepiece(ours) if ours.model_file else _from_json(ours, folder)
  repeated = len(set(found.tokens)) < len(found.tokens)
  if repeated:
    raise FormatError(f"{folder}: two ids have the same token, which llama.cpp does not load")
  mark = conversation.TEMPLATES[template]
  ends = ours.stop_ids(mark.end)
  first = ours.eos_id if ours.eos_id is not None else ends[0]
  found = dataclasses.replace(
    found, bos=ours.bos_id, ends=(first, *(i for i in ends if i != first))
  )
  _check(ours, found, mark, folder)
  return found


def _kinds(ours: Tokenizer, kinds: dict[int, int]) -> tuple[int, ...]:
  """Returns the type of every id: as in `kinds`, or that of an added token, or of a gap."""
  added = {i: CONTROL if i in ours.special_ids else USER_DEFINED for i in ours.added.values()}
  return tuple({**dict.fromkeys(range(len(ours)), UNUSED), **added, **kinds}.values())


def _tokens(ours: Tokenizer, pieces: dict[int, str]) -> tuple[str, ...]:
  gaps = {i: f"[UNUSED_{i}]" for i in range(len(ours))}
  return tuple({**gaps, **pieces, **{i: text for text, i in ours.added.items()}}.values())


def _sentencepiece(ours: Tokenizer) -> Vocabulary:
  """Reads a `tokenizer.model`."""
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor(model_file=str(ours.model_file))
  pieces = {i: model.id_to_piece(i) for i in range(model.vocab_size())}
  of_piece = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED),
              (model.is_byte, BYTE))  # fmt: skip
  kinds = {i: next((kind for test, kind in of_piece if test(i)), NORMAL) for i in pieces}
  added = set(ours.added.values())
  kinds = {i: kind for i, kind in kinds.items() if kind != NORMAL or i not in added}
  scores = [model.get_score(i) if i in pieces else 0.0 for i in range(len(ours))]
  return Vocabulary(
    "llama", _tokens(ours, pieces), _kinds(ours, kinds), scores=tuple(scores), prefix=True,
    unk=model.unk_id(),
  )  # fmt: skip


def _from_json(ours: Tokenizer, folder: Path) -> Vocabulary:
  """Reads a tokenizer.json. Raises: FormatError for one that llama.cpp does not know."""
  from transformers import AutoTokenizer

  inner: Any = AutoTokenizer.from_pretrained(str(ours.path))
  said: Json = json.loads(inner.backend_tokenizer.to_str())
  model = said["model"]
  if model["type"] != "BPE":
    raise FormatError(
      f"{folder}: llama.cpp is given byte-pair encoders only, found {model['type']}; export "
      "'language_model', and try llama.cpp's convert_hf_to_gguf.py"
    )
  odd = [
    t["content"] for t in said["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]
  ]
  if odd:
    raise FormatError(
      f"{folder}: llama.cpp cannot hold tokens that take the spaces beside them, or whole words "
      f"only: {', '.join(map(repr, odd[:4]))}"
    )
  pieces = {i: text for text, i in model["vocab"].items()}
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  tokens = _tokens(ours, pieces)
  plain = {i: NORMAL for i in pieces if i not in set(ours.added.values())}
  if model["byte_fallback"]:
    return _scored(said, merges, tokens, _kinds(ours, plain), inner.unk_token_id, folder)
  pre = next((n for n, row in SPLITS.items() if _steps(said) == (row.steps, row.whole)), None)
  if pre is None or (said["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}:
    raise FormatError(
      f"{folder}: this byte-pair encoder splits texts in another way than the kinds that are "
      f"written: {', '.join(SPLITS)} (gguf_tokenizer.SPLITS); found normalizer "
      f"{_short(said['normalizer'])}, pre-tokenizer {_short(said['pre_tokenizer'])}"
    )
  return Vocabulary("gpt2", tokens, _kinds(ours, plain), pre, tuple(merges), unk=inner.unk_token_id)


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 160 else text[:160] + ".."


def _steps(said: Json) -> tuple[tuple[Json, ...], bool]:
  """Returns the pre-tokenizers of a tokenizer.json in the form of SPLITS."""
  one = said["pre_tokenizer"] or {}
  steps = one.get("pretokenizers", [one])
  return (
    tuple({**s, "trim_offsets": True} if s.get("type") == "ByteLevel" else s for s in steps),
    bool(said["model"].get("ignore_merges")),
  )


def _scored(
  said: Json,
  merges: list[str],
  tokens: tuple[str, ...],
  kinds: tuple[int, ...],
  unk: int | None,
  folder: Path,
) -> Vocabulary:
  """Returns sentencepiece's vocabulary from a tokenizer.json that was made of it.

  The order of merges gives the scores. llama.cpp merges all pairs whose text is a token, so all of
  them must be in that order.

  Raises: FormatError otherwise.
  """
  normal = {t for t, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
  ranks: dict[str, int] = {}
  for rank, merge in enumerate(merges):
    ranks.setdefault(merge.replace(" ", ""), rank)
  pairs = {f"{t[:i]} {t[i:]}" for t in normal & set(ranks) for i in range(1, len(t))}
  all_pairs = {p for p in pairs if set(p.split(" ")) <= normal}
  order = [ranks[merge.replace(" ", "")] for merge in merges]
  blank = _prefix(said)
  if all_pairs != set(merges) or order != sorted(order) or blank is None:
    raise FormatError(
      f"{folder}: this byte-pair encoder with bytes is none of sentencepiece's, which llama.cpp "
      "reads; put the tokenizer.model beside it, or export 'language_model'"
    )
  scores = tuple(-float(ranks.get(token, 0)) for token in tokens)
  kinds = tuple(BYTE if re.fullmatch("<0x[0-9A-F]{2}>", t) else kind
                for t, kind in zip(tokens, kinds, strict=True))  # fmt: skip
  kinds = tuple(UNKNOWN if i == unk else kind for i, kind in enumerate(kinds))
  return Vocabulary("llama", tokens, kinds, scores=scores, prefix=blank, unk=unk)


def _prefix(said: Json) -> bool | None:
  """Returns whether a tokenizer.json puts a space in front of texts; None for another kind."""
  steps = (said["normalizer"] or {}).get("normalizers", [said["normalizer"]])
  spaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
  before, splitter = [s for s in steps if s and s != spaces], said["pre_tokenizer"]
  if (
    splitter is None and spaces in steps and before in ([], [{"type": "Prepend", "prepend": BLANK}])
  ):
    return bool(before)
  for row, blank in _PREFIXES:
    if splitter and not before and all(splitter.get(key) == row[key] for key in row):
      return blank
  return None


# ---- reading as llama.cpp does ---------------------------------------------------------------------


def _check(ours: Tokenizer, found: Vocabulary, template: Template, folder: Path) -> None:
  """Raises FormatError unless llama.cpp reads a prompt as training does."""
  before = template.system + (template.first or template.before)
  prompt = f"{before}{IMAGE}\n{PROBE}{template.after}"
  runs = reading.tokenize([conversation.TextPiece(prompt, False, 0)], ours)
  wanted = [i for run in runs for i in run.ids]
  read = READERS[found.model](found)
  head, tail = prompt.split(IMAGE)
  ids = [*([found.bos] if found.bos is not None else []), *read(head), IMAGE_ID, *read(tail)]
  if ids != wanted:
    at = next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), 0)
    raise FormatError(
      f"{folder}: llama.cpp reads a prompt of this tokenizer as other ids than training did: "
      f"{ids[at : at + 4]} instead of {wanted[at : at + 4]} behind {at} equal ones; its answers "
      "would differ, so it is not written"
    )


def _read_bytes(found: Vocabulary) -> Callable[[str], list[int]]:
  """Reads texts with what `gguf_tokenizer` rebuilds of a byte-level BPE."""
  with tempfile.TemporaryDirectory() as place:
    merges = [tuple(merge.split(" ")) for merge in found.merges]
    kinds, tokens = list(found.kinds), list(found.tokens)
    named = {"eos_token": tokens[found.ends[0]]}
    gguf_tokenizer.save(Path(place), found.pre, tokens, merges, kinds, named, "")
    tokenizer = Tokenizer(place)
  return lambda text: list(tokenizer.encode(text))


def _read_pieces(found: Vocabulary) -> Callable[[str], list[int]]:
  """Reads texts as sentencepiece, with a space in front of each stretch between added tokens."""
  ids = {token: i for i, token in enumerate(found.tokens)}
  bytes_ = {b: ids[text] for b in range(256) if (text := f"<0x{b:02X}>") in ids}
  marks = [t for t, kind in zip(found.tokens, found.kinds, strict=True)
           if kind in (CONTROL, USER_DEFINED, UNKNOWN)]  # fmt: skip
  cut = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))

  def merged(text: str) -> list[int]:
    symbols = list(text)
    while True:
      pairs = [a + b for a, b in itertools.pairwise(symbols)]
      known = [(found.scores[ids[pair]], -i) for i, pair in enumerate(pairs) if pair in ids]
      if not known:
        break
      at = -max(known)[1]
      symbols[at : at + 2] = [pairs[at]]
    return [i for symbol in symbols for i in one(symbol)]

  def one(symbol: str) -> list[int]:
    return [ids[symbol]] if symbol in ids else [bytes_.get(b, -1) for b in symbol.encode()]

  def read(text: str) -> list[int]:
    result: list[int] = []
    at = 0
    for mark in [*cut.finditer(text), None]:
      stretch = text[at : mark.start() if mark else None]
      if stretch:
        blank = " " if found.prefix else ""
        result += merged((blank + stretch).replace(" ", BLANK))
      if mark:
        result.append(ids[mark[0]])
        at = mark.end()
    return result

  return read


READERS: dict[str, Callable[[Vocabulary], Callable[[str], list[int]]]] = {
  "gpt2": _read_bytes,
  "llama": _read_pieces,
}
