"""From tokens to text: stop strings, what is settled, what of it counts."""

from __future__ import annotations

from typing import Any

import pytest

from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.detokenizer import UNFINISHED, Detokenizer
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.layout import bucket


class Letters:
  """One token for each letter; 0 is half a character."""

  def decode(self, ids: Any) -> str:
    return "".join(UNFINISHED if i == 0 else chr(i) for i in ids)


def text(stop: tuple[str, ...] = ()) -> Detokenizer:
  tokenizer: Any = Letters()
  return Detokenizer(tokenizer, Generation(stop=stop))


def ids(said: str) -> list[int]:
  return [ord(c) for c in said]


@pytest.mark.parametrize("step", [1, 2, 3, 50])
@pytest.mark.parametrize(
  ("stop", "answer", "count"),
  [(("ab",), "xx", 4), (("zz", "b"), "xxa", 4), (("b", "xa"), "x", 3), ((), "xxabyy", 6),
   (("yy",), "xxab", 6), (("b", "ab"), "xx", 4), (("never",), "xxabyy", 6)],
)  # fmt: skip
def test_an_answer_ends_before_the_first_stop_string(
  stop: tuple[str, ...], answer: str, count: int, step: int
) -> None:
  """Whatever number of tokens the device reports at a time: to the token that completes the string."""
  made, whole = text(stop), ids("xxabyy")
  for end in range(step, len(whole) + step, step):
    made.extend(whole[:end], end >= len(whole), margin=1.5)
    if made.finished:
      break
  found = made.answer()
  assert (found.text, len(found.ids), found.margin, found.error) == (answer, count, 1.5, "")


def test_only_what_is_settled_is_shown() -> None:
  made = text(("stop", "end"))
  shown = []
  for end in range(1, 10):
    made.extend(ids("a st sto ")[:end], False, 0.0)
    shown.append(made.settled())
  assert shown == ["a", "a", "a", "a", "a st", "a st", "a st", "a st", "a st sto"]
  made.extend([*ids("a st sto b"), 0], False, 0.0)
  assert made.settled() == "a st sto b"
  made.extend(ids(" a "), True, 0.0)
  assert made.settled() == "a"


@pytest.mark.parametrize(("length", "wanted"), [(0, 0), (1, 8), (7, 8), (8, 8), (9, 16)])
def test_lengths_are_rounded_up(length: int, wanted: int) -> None:
  assert bucket(length, 8) == wanted


def test_encoder_calls_for_each_image() -> None:
  assert Counts().encoder_ratio == 1.0
  assert Counts(encoder_calls=6, distinct_images=4).encoder_ratio == 1.5
  assert "encoder calls / distinct images = 1.50" in str(Counts(encoder_calls=6, distinct_images=4))


@pytest.mark.parametrize("kind", ["blanks", "bytes"])
def test_long_texts_are_decoded_in_parts_and_read_the_same(kind: str) -> None:
  """With a tokenizer that drops a leading blank, and one whose characters take several tokens."""

  class Blanks:
    def decode(self, ids: Any) -> str:
      return "".join(f" w{i}" if i % 3 else "." for i in ids).removeprefix(" ")

  class Bytes:
    def decode(self, ids: Any) -> str:
      return bytes(int(i) for i in ids).decode(errors="replace")

  tokenizers: dict[str, Any] = {"blanks": Blanks(), "bytes": Bytes()}
  tokenizer, said = tokenizers[kind], list("aé漢😀b".encode() * 30)
  made = Detokenizer(tokenizer, Generation(max_new_tokens=1000))
  for end in range(1, len(said)):
    made.extend(said[:end], False, 0.0)
    assert made.settled() == tokenizer.decode(said[:end]).rstrip(UNFINISHED).strip()
