"""Turns text into ids, for training, validation, the engine and likelihoods alike.

All text between two images is tokenized at once, and its ids are divided into supervised and
context afterwards. So tokens may cross the border between two pieces, with two exceptions. A reply
starts with a token of its own, because at inference the ids of the prompt are fixed before it. An
end mark of ordinary text starts with a token of its own, because generation must recognize it after
any reply.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from llava_sp_jax.data import conversation
from llava_sp_jax.data.conversation import IMAGE, Template, TextPiece, Turns
from llava_sp_jax.data.example import IMAGE_ID, Run
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer, TokenizerError

AGAIN = 1 << 23  # the most characters of a text that are tokenized again, over all its replies


def dialogue(
  turns: Turns, template: Template, layout: str, tokenizer: Tokenizer, system: str | None = None
) -> list[Run]:
  """Tokenizes a dialogue to train on.

  Args:
    turns: (question, reply) pairs.
    template: the conversation template.
    layout: "chain" or "branch", a row of `conversation.TURNS`.
    tokenizer: the tokenizer.
    system: replaces the template's system text (None: keeps it).

  Raises: SampleError for turns that do not fit the layout, and for a system text that the template
    cannot hold.
  """
  template = conversation.saying(template, system)
  return tokenize(conversation.TURNS[layout](turns, template), tokenizer)


def question(
  text: str,
  images: int,
  template: Template,
  tokenizer: Tokenizer,
  system: str | None = None,
  reply: str = "",
  history: Sequence[tuple[str, str]] = (),
) -> list[Run]:
  """Tokenizes a question to be answered, to the ids that training has before the reply.

  Args:
    text: the question.
    images: the number of images that are put in front of a question without image marks.
    template: the template.
    tokenizer: the tokenizer.
    system: replaces the template's system text (None: keeps it).
    reply: the beginning of the answer; its ids are supervised, and no end mark follows.
    history: the (question, answer) turns before it; the ids of their answers, with end marks, are
      supervised.

  Raises: SampleError for a system text that the template cannot hold.
  """
  template = conversation.saying(template, system)
  pieces = conversation.prompt(text, template, images, history)
  begun = reply.removeprefix(" ")  # the template's `answer` has the space
  if begun:
    pieces.append(TextPiece(template.answer + begun, True, 0))
  return tokenize(pieces, tokenizer)


def tokenize(pieces: list[TextPiece], tokenizer: Tokenizer) -> list[Run]:
  """Tokenizes pieces; `<image>` becomes IMAGE_ID.

  As in the original, each stretch of text between images is tokenized as a separate text, and only
  the first one is preceded by a begin-of-sequence token.
  """
  runs = []
  if tokenizer.bos_id is not None:
    runs.append(Run((tokenizer.bos_id,), (False,)))
  for branch, group in itertools.groupby(pieces, key=lambda piece: piece.branch):
    for number, stretch in enumerate(_stretches(group)):
      if number:
        runs.append(Run((IMAGE_ID,), (False,), branch))
      runs += _read(stretch, branch, tokenizer)
  return runs


def _stretches(pieces: Iterator[TextPiece]) -> Iterator[list[TextPiece]]:
  """Splits the text of pieces at images and yields the pieces between two images."""
  stretch: list[TextPiece] = []
  for piece in pieces:
    *before, last = piece.text.split(IMAGE)
    for text in before:
      yield [*stretch, dataclasses.replace(piece, text=text, end=0)]
      stretch = []
    stretch.append(dataclasses.replace(piece, text=last))
  yield stretch


def _read(stretch: list[TextPiece], branch: int, tokenizer: Tokenizer) -> list[Run]:
  """Tokenizes the pieces of a stretch as one text, and divides the ids among the pieces."""
  text = "".join(piece.text for piece in stretch)
  if not text:
    return []
  spans = iter(_cut(text, _cuts(stretch, tokenizer), tokenizer))
  runs, at, waiting = [], 0, next(spans, None)
  for piece in stretch:
    at += len(piece.text)
    ids: list[int] = []
    while waiting is not None and waiting[1] < at:
      ids.append(waiting[0])
      waiting = next(spans, None)
    if ids:
      runs.append(Run(tuple(ids), (piece.supervised,) * len(ids), branch))
  return runs


def _cuts(stretch: list[TextPiece], tokenizer: Tokenizer) -> list[int]:
  """Returns where a token must begin: at replies, and at end marks without a special token."""
  found, at = [], 0
  for piece in stretch:
    if piece.supervised:
      found.append(at)
    at += len(piece.text)
    if piece.end and not tokenizer.has_special(piece.text[-piece.end :]):
      found.append(at - piece.end)
  return sorted({cut for cut in found if 0 < cut < at})


def _cut(text: str, cuts: list[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
  """Tokenizes `text` so that no token crosses a cut.

  Splits the text at a cut only where a token crosses it, or after whitespace, whose tokens may
  depend on the text that follows.
  """
  parting = [cut for cut in cuts if text[cut - 1].isspace()]
  try:
    parts = [
      _part(text, start, end, _between(cuts, start, end), tokenizer)
      for start, end in itertools.pairwise([0, *parting, len(text)])
    ]
  except TokenizerError:
    # A tokenizer that prefixes texts with a space; its tokens of spaces do not depend on what
    # follows.
    parts = [_part(text, 0, len(text), cuts, tokenizer)]
  return [span for part in parts for span in part]


def _between(cuts: list[int], start: int, end: int) -> list[int]:
  """Returns the sorted `cuts` that are strictly between `start` and `end`."""
  return cuts[bisect.bisect_right(cuts, start) : bisect.bisect_left(cuts, end)]


def _part(
  text: str, start: int, end: int, cuts: list[int], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
  """Tokenizes text[start:end], and again from every cut that a token crosses.

  Raises: SampleError when this would tokenize more than AGAIN characters, or the tokenizer cannot
    split a text.
  """
  done: list[tuple[int, int]] = []
  rest, at, again = _spans(text, start, end, tokenizer), 0, 0  # rest[:at] is done
  for cut in cuts:
    count = bisect.bisect_left(rest, cut, at, key=lambda span: span[1])
    if (rest[count - 1][1] + 1 if count > at else start) != cut:
      if (again := again + end - start) > AGAIN:
        raise SampleError(f"{len(cuts):,} replies that share tokens with the text before them")
      try:
        before, rest = (_spans(text, *ends, tokenizer) for ends in ((start, cut), (cut, end)))
      except TokenizerError as error:
        raise SampleError(f"a reply shares a token with the text before it; {error}") from None
      done, at = done + before, 0
    else:
      done += rest[at:count]
      at = count
    start = cut
  return done + rest[at:]


def _spans(text: str, start: int, end: int, tokenizer: Tokenizer) -> list[tuple[int, int]]:
  found = tokenizer.spans(text[start:end], inside=start > 0)
  return [(id_, start + last) for id_, last in found]


def end_of_replies(template: Template, tokenizer: Tokenizer) -> str:
  """Returns why generation could not detect the end of a reply; "" if it can.

  Generation detects an end mark that contains a special token or is a single token. Templates of
  the `###` family pass, since the original closes their replies with ordinary text, too.
  """
  ids = tokenizer.end_ids(template.end)
  if template.training or len(ids) == 1 or tokenizer.has_special(template.end):
    return ""
  parts = ", ".join(repr(tokenizer.decode([i])) for i in ids)
  return (
    f"replies end with {template.end!r}, which this tokenizer reads as {len(ids)} ordinary tokens "
    f"({parts}): the mark would be learned as text, and answers might never stop"
  )


def fitting(tokenizer: Tokenizer) -> list[str]:
  """Returns the names of the templates whose end marks generation can detect with a tokenizer.

  Leaves out the `###` family.
  """
  known = conversation.TEMPLATES.items()
  return [name for name, t in known if not t.training and not end_of_replies(t, tokenizer)]


def misfit(name: str, tokenizer: Tokenizer) -> str:
  """Returns why the template `name` does not fit a tokenizer, and which ones do; "" if it fits."""
  why = end_of_replies(conversation.TEMPLATES[name], tokenizer)
  return why and f"template {name!r}: {why}; that fit: {', '.join(fitting(tokenizer))}"
