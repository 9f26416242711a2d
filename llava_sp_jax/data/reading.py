"""The one way from text to ids: training, validation, the engine and likelihoods all read here.

A stretch of text between two images is one text to the tokenizer, and is then divided into what is
supervised and what is not. So a border between pieces is no border between tokens, but for two, at
which generation begins and ends: a reply starts with a token of its own, since the ids of a prompt
are there before it; and an end mark of ordinary text does, since it must be found behind any reply.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

from llava_sp_jax.data import conversation
from llava_sp_jax.data.conversation import IMAGE, Template, TextPiece, Turns
from llava_sp_jax.data.example import IMAGE_ID, Run
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer, TokenizerError

AGAIN = 1 << 23  # characters of a text that are read anew, over all its replies


def dialogue(
  turns: Turns, template: Template, layout: str, tokenizer: Tokenizer, system: str | None = None
) -> list[Run]:
  """Ids of a dialogue to train on; `layout` names a row of `conversation.TURNS`.

  `system` stands in place of the template's own text. Raises: SampleError for turns that do not fit
  the layout, and for a system text that has no place.
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
) -> list[Run]:
  """Ids of one open question, as training would have them in front of its reply.

  `images` stand in front of a question that does not place them, `system` in place of the template's
  own text. A `reply` is read as the beginning of the answer: its ids are supervised, and no end mark
  follows. Raises: SampleError for a system text that has no place.
  """
  template = conversation.saying(template, system)
  pieces = conversation.prompt(text, template, images)
  said = reply.removeprefix(" ")  # the template's own blank stands there
  if said:
    pieces.append(TextPiece(template.answer + said, True, 0))
  return tokenize(pieces, tokenizer)


def tokenize(pieces: list[TextPiece], tokenizer: Tokenizer) -> list[Run]:
  """Ids of pieces; `<image>` becomes IMAGE_ID.

  As in the original, each stretch of text between images is a text of its own to the tokenizer, and
  only the first has a begin-of-sequence token.
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
  """Pieces without images; a stretch ends where an image stands."""
  stretch: list[TextPiece] = []
  for piece in pieces:
    *before, last = piece.text.split(IMAGE)
    for text in before:
      yield [*stretch, dataclasses.replace(piece, text=text, end=0)]
      stretch = []
    stretch.append(dataclasses.replace(piece, text=last))
  yield stretch


def _read(stretch: list[TextPiece], branch: int, tokenizer: Tokenizer) -> list[Run]:
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
  """Where a token must begin: at replies, and at end marks without a special token."""
  found, at = [], 0
  for piece in stretch:
    if piece.supervised:
      found.append(at)
    at += len(piece.text)
    if piece.end and not tokenizer.has_special(piece.text[-piece.end :]):
      found.append(at - piece.end)
  return sorted({cut for cut in found if 0 < cut < at})


def _cut(text: str, cuts: list[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
  """The spans of `text`, read in parts where a token would reach over a cut.

  What becomes of blanks can depend on what follows them, so a cut behind one always parts the text.
  """
  parting = [cut for cut in cuts if text[cut - 1].isspace()]
  try:
    parts = [
      _part(text, start, end, _between(cuts, start, end), tokenizer)
      for start, end in itertools.pairwise([0, *parting, len(text)])
    ]
  except TokenizerError:  # it puts a blank in front of texts, and never looks at what follows one
    parts = [_part(text, 0, len(text), cuts, tokenizer)]
  return [span for part in parts for span in part]


def _between(cuts: list[int], start: int, end: int) -> list[int]:
  """Those of the sorted `cuts` that are neither `start` nor `end`, nor beyond."""
  return cuts[bisect.bisect_right(cuts, start) : bisect.bisect_left(cuts, end)]


def _part(
  text: str, start: int, end: int, cuts: list[int], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
  """The spans of text[start:end], read anew from a cut on that a token reaches over."""
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
  """Why generation could not see the end of a reply; empty where it can.

  An end mark is seen when it has a special token, or is one token. The `###` family ends in text for
  every tokenizer, in the original as well.
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
  """The templates whose replies end in a way that generation sees."""
  known = conversation.TEMPLATES.items()
  return [name for name, t in known if not t.training and not end_of_replies(t, tokenizer)]


def misfit(name: str, tokenizer: Tokenizer) -> str:
  """Why the template `name` does not go with a tokenizer, and which do; empty where it goes."""
  why = end_of_replies(conversation.TEMPLATES[name], tokenizer)
  return why and f"template {name!r}: {why}; that fit: {', '.join(fitting(tokenizer))}"
