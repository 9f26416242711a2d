"""Reads samples in all supported forms.

Tables say which keys hold the dialogue, the system text and the images. Refuses a sample with a key
or mark of a medium that is not read, rather than dropping the medium silently. docs/data.md shows
the tables to users.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from llava_sp_jax.data.conversation import IMAGE, Turns
from llava_sp_jax.data.failure import SampleError

DIALOGUES = ("conversations", "messages")  # keys of a list of turns
PAIRS = (("from", "value"), ("role", "content"))  # keys of a turn: who, what
ASKS, REPLIES, SYSTEM = "human", "gpt", "system"
ROLES = {"human": ASKS, "user": ASKS, "gpt": REPLIES, "assistant": REPLIES, "system": SYSTEM}
IMAGES = ("image", "images")  # keys of a file name, or a list of them; in TFDS also of bytes
LONGEST_NAME = 4096  # characters of a path
LONGEST_TEXT = 1 << 20  # characters of a dialogue; far beyond any row, yet tokenized in seconds
# Type of a part of a `content` list -> the key that holds its value.
PARTS = {"text": "text", "image": "image"}

# Patterns of keys of other media, or of images in a form that is not read.
_PICTURES = r"(image|img|picture|photo|pixel|frame)s?"
_OTHERS = r"(video|audio|speech|sound|voice|music)s?"
_HOLDS = r"([_-]?(path|file|file_?name|name|url|uri|base64|b64|byte|value|data|list)s?)?"
_PICTURE_KEY = re.compile(_PICTURES + _HOLDS, re.IGNORECASE)
_NUMBERED_KEY = re.compile(rf"{_PICTURES}{_HOLDS}[_-]?\d+", re.IGNORECASE)  # e.g. image_2
_OTHER_KEY = re.compile(rf"{_OTHERS}{_HOLDS}([_-]?\d+)?", re.IGNORECASE)
# Values that are a medium or the name of its file, whatever their key.
_MEDIUM = re.compile(
  r"data:(image|video|audio)/.*|[^\n]+\."
  r"(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)",
  re.IGNORECASE | re.DOTALL,
)
NAMES = ("id", "sample_id", "question_id")  # name the sample, and may look like a file name
# Marks of other media before a question, after its image mark, or on a line after it. Anywhere else
# a text may merely mention such a mark.
_OTHER_MARK = re.compile(
  r"^\s*(?:<image>\s*)*<{0}>|\n\s*<{0}>\s*$".format(_OTHERS + r"([ _-]?\d+)?"), re.IGNORECASE
)
_FILE_WITHIN = re.compile(r"<img>[^<>]*</img>", re.IGNORECASE)
# Image marks of other code. They are refused only in samples without images: beside an image that
# is read, a text may refer to one.
_PICTURE_MARK = re.compile(
  r"<(image|img|picture)[ _-]?(\d+|here|pad|token|placeholder|context)>|<\|(image|vision)\w*\|>",
  re.IGNORECASE,
)
# Keys that weight a reply in the loss: of a turn, or of a sample with a value for each turn.
WEIGHTS = ("loss", "loss_mask", "loss_scale", "loss_weight", "weight", "train", "trainable")

Image = str | bytes  # a file's name, or its bytes


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """Holds a sample in the form that the rest of the package uses.

  `system` is None where the template's own system text applies.
  """

  turns: Turns
  images: tuple[Image, ...] = ()
  system: str | None = None


def read(sample: Any) -> Dialogue:
  """Reads a sample in any of the supported forms.

  Raises: SampleError for what is not a dialogue, or has a medium or a weight of a reply that is not
    supported; a sample that is a SampleError itself is raised.
  """
  if isinstance(sample, SampleError):  # its source could not read it
    raise sample
  if not isinstance(sample, dict):
    raise SampleError(f"expected a dictionary, found {_shown(sample)}")
  messages = [_message(number, turn) for number, turn in enumerate(_dialogue(sample))]
  if (length := sum(len(message.text) for message in messages)) > LONGEST_TEXT:
    raise SampleError(f"a dialogue of {length:,} characters; at most {LONGEST_TEXT:,} are read")
  named = _images(sample)
  _refuse_media(sample, bool(named))
  _refuse_weights(sample, messages)
  within = tuple(image for message in messages for image in message.images)
  if within and named:
    raise SampleError("images stand in the turns and beside them; expected one of the two")
  system, rest = _system(sample, messages)
  turns = _turns(rest, len(messages) - len(rest))
  _refuse_marks(turns, bool(within or named))
  return Dialogue(turns, within or named, system)


@dataclasses.dataclass(frozen=True)
class _Message:
  role: str  # ASKS, REPLIES or SYSTEM
  text: str
  images: tuple[Image, ...]
  turn: Any  # as it stands in the sample


def _dialogue(sample: dict[str, Any]) -> list[Any]:
  held = {key: sample[key] for key in DIALOGUES if _held(sample, key)}
  _only_one(held)
  key, messages = next(iter(held.items()), ("", None))
  if not isinstance(messages, list) or not messages:
    found = f"`{key}` {_shown(messages)}" if key else f"keys {', '.join(map(_shown, sample))}"
    raise SampleError(
      f"`{key or DIALOGUES[0]}` must be a list of {{from, value}} or {{role, content}} with at "
      f"least one turn; found {found}"
    )
  return messages


def _held(sample: dict[str, Any], key: str) -> bool:
  """Returns whether a key is present with a value that is not empty."""
  return sample.get(key) not in (None, "", b"", [])


def _only_one(found: dict[str, Any]) -> None:
  """Raises: SampleError for two keys with different values."""
  first, *others = found or [""]
  if other := [key for key in others if found[key] != found[first]]:
    raise SampleError(f"both `{first}` and `{other[0]}` are given; expected one of them")


def _message(number: int, turn: Any) -> _Message:
  known = turn if isinstance(turn, dict) else {}
  for who, what in PAIRS:
    role = known.get(who)
    if isinstance(role, str) and role in ROLES and what in known:
      text, images = _content(number, known[what])
      _check_text(f"turn {number}", text)
      roles = {k: known[k] for k, _ in PAIRS if known.get(k) not in (None, "")}
      if len({ROLES.get(name) if isinstance(name, str) else None for name in roles.values()}) > 1:
        raise SampleError(f"turn {number}: {_shown(roles)} are two speakers; expected one")
      if others := [k for _, k in PAIRS if k != what and known.get(k) not in (None, "", text)]:
        raise SampleError(f"turn {number}: both `{what}` and `{others[0]}` are given; expected one")
      if media := [key for key in known if _holds_media(known, key)]:
        raise SampleError(f"turn {number}: `{media[0]}` is not read within a turn")
      return _Message(ROLES[role], text, images, turn)
  raise SampleError(
    f"turn {number}: expected a text from one of {', '.join(ROLES)}, found {_shown(turn)}"
  )


def _check_text(where: str, text: str) -> None:
  """Checks that a text is valid Unicode; tokenizers differ in how they treat one that is not.

  Raises: SampleError for half of a surrogate pair.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    found = text[error.start : error.end]
    raise SampleError(f"{where}: half of a surrogate pair, {found!r}, at {error.start}") from None


def _content(number: int, content: Any) -> tuple[str, tuple[Image, ...]]:
  """Returns the text of a turn, and the images of its parts."""
  if isinstance(content, str):
    return content, ()
  if not isinstance(content, list):
    raise SampleError(f"turn {number}: expected a text or a list of parts, found {_shown(content)}")
  texts: list[str] = []
  images: list[Image] = []
  for part in content:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
      raise SampleError(
        f"turn {number}: expected parts of type {', '.join(PARTS)}, found {_shown(part)}"
      )
    own = ("type", PARTS[kind])
    if media := [key for key in part if key not in own and _holds_media(part, key)]:
      raise SampleError(f"turn {number}: `{media[0]}` is not read in a part of type {kind}")
    value = part.get(PARTS[kind])
    if kind == "image":
      images += _names("image", value)
      texts.append(IMAGE)
    elif isinstance(value, str):
      texts.append(value)
    else:
      raise SampleError(f"turn {number}: expected a text, found {_shown(part)}")
  return "\n".join(texts), tuple(images)


def _images(sample: dict[str, Any]) -> tuple[Image, ...]:
  found = {key: tuple(_names(key, sample[key])) for key in IMAGES if _held(sample, key)}
  _only_one(found)
  return next(iter(found.values()), ())


def _names(key: str, value: Any) -> Iterator[Image]:
  if value is None:
    return
  for name in value if isinstance(value, list | tuple) else [value]:
    if not isinstance(name, str | bytes) or not name:
      raise SampleError(f"`{key}` must be a file name or a list of them, found {_shown(value)}")
    if isinstance(name, str) and (len(name) > LONGEST_NAME or name.startswith("data:")):
      raise SampleError(
        f"`{key}` must be a file name, found {len(name):,} characters that begin {name[:20]!r}; "
        "write pictures in base64 to files"
      )
    yield name


def _refuse_media(sample: dict[str, Any], has_image: bool) -> None:
  """Checks the other keys of a sample for media.

  In a sample with an image, keys such as `image_url` are taken to describe it and pass; numbered
  ones such as `image_2` do not.

  Raises: SampleError for media that are not read.
  """
  for key, value in sample.items():
    if key in (*IMAGES, *DIALOGUES, "system"):
      continue
    held = _holds_media(sample, key)
    if has_image:
      held = held and not _PICTURE_KEY.fullmatch(key)
    else:
      held = held or (key not in NAMES and is_medium(value))
    if held:
      raise SampleError(
        f"`{key}` {_shown(value)} is not read; images are read from {' or '.join(IMAGES)}"
      )


def _holds_media(values: dict[str, Any], key: Any) -> bool:
  known = (_PICTURE_KEY, _NUMBERED_KEY, _OTHER_KEY)
  if not isinstance(key, str) or not any(pattern.fullmatch(key) for pattern in known):
    return False
  value = values[key]
  if value is None or isinstance(value, bool | int | float):  # a count or a flag, no medium
    return False
  return len(value) > 0 if hasattr(value, "__len__") else True


def is_medium(value: Any) -> bool:
  """Returns whether a value is bytes or the name of a media file, or contains one."""
  if isinstance(value, str):
    return len(value) <= LONGEST_NAME and _MEDIUM.fullmatch(value) is not None
  if isinstance(value, dict):
    return any(isinstance(part, str | bytes) and is_medium(part) for part in value.values())
  if isinstance(value, list | tuple):
    return bool(value) and is_medium(value[0])
  return isinstance(value, bytes) and bool(value)


def _refuse_weights(sample: dict[str, Any], messages: list[_Message]) -> None:
  """Raises: SampleError for a reply whose weight in the loss is not 1."""
  for key in WEIGHTS:
    every = sample.get(key)
    spread = every if isinstance(every, list) and len(every) == len(messages) else None
    for number, message in enumerate(messages):
      for value in (message.turn.get(key), spread[number] if spread else None):
        if message.role == REPLIES and value is not None and value != 1:
          raise SampleError(
            f"turn {number}: `{key}` {_shown(value)} is not read; all replies count alike"
          )


def _refuse_marks(turns: Turns, has_image: bool) -> None:
  """Refuses questions whose image marks would be read as text.

  A mark that names a file is never read. Other programs' marks, such as <img>, may stand as text in
  a sample with an image (`has_image`), but in one without they mean an image that is missing.

  Raises: SampleError that names the mark.
  """
  for question, _ in turns:
    mark = _FILE_WITHIN.search(question)
    if not mark and not has_image:
      mark = _PICTURE_MARK.search(question)
    if mark:
      raise SampleError(
        f"{_shown(mark[0])} in a question is not read; expected {IMAGE}, and its file in "
        f"`{IMAGES[0]}`"
      )


def _system(sample: dict[str, Any], messages: list[_Message]) -> tuple[str | None, list[_Message]]:
  """Returns the system text, of the key or of the first turn, and the other turns."""
  key, first = sample.get("system"), messages[0]
  if key is not None and not isinstance(key, str):
    raise SampleError(f"`system` must be a text, found {_shown(key)}")
  _check_text("`system`", key or "")
  if first.role != SYSTEM:
    return key or None, messages
  if key and key != first.text:
    raise SampleError("`system` and the first turn are two system texts; expected one")
  return first.text or None, messages[1:]


def _turns(messages: list[_Message], first: int) -> Turns:
  """Returns (question, reply) pairs; the reply of an open last question is None.

  Drops a reply before the first question, as in the original. `first` is the number of turns that
  were removed from the front, for messages.

  Raises:
    SampleError: when the turns do not alternate.
  """
  greets = len(messages) > 1 and messages[0].role == REPLIES
  pairs: Turns = []
  for number, message in enumerate(messages[greets:]):
    wanted = (ASKS, REPLIES)[number % 2]
    if message.role != wanted:
      raise SampleError(
        f"turn {number + greets + first}: expected a text from {wanted!r}, found {_shown(message.turn)}"
      )
    if wanted == ASKS and (mark := _OTHER_MARK.search(message.text)):
      raise SampleError(f"turn {number + greets + first}: {mark[0].strip()} is not read")
    if wanted == REPLIES:
      pairs[-1] = (pairs[-1][0], message.text)
    else:
      pairs.append((message.text, None))
  if not pairs:
    raise SampleError(f"no turn from {ASKS!r}")
  return pairs


def _shown(value: Any) -> str:
  """Returns the beginning of a value, for messages."""
  return f"{value[:80]!r:.80}" if isinstance(value, str | bytes) else f"{value!r:.80}"
