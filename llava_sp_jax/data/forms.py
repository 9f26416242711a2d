"""The forms of a sample that are read, as tables: where dialogue, system text and images stand.

Nothing that a sample carries is left out in silence: a key or a mark of a medium that is not read
costs the sample, with the reason. docs/data.md shows the tables to users.
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
LONGEST_TEXT = 1 << 20  # characters of a dialogue; far beyond any row, and read within seconds
# Kinds of parts of a `content` that is a list -> the key that holds their value.
PARTS = {"text": "text", "image": "image"}

# Keys of other media, or of images in a form that is not read.
_PICTURES = r"(image|img|picture|photo|pixel|frame)s?"
_OTHERS = r"(video|audio|speech|sound|voice|music)s?"
_HOLDS = r"([_-]?(path|file|file_?name|name|url|uri|base64|b64|byte|value|data|list)s?)?"
_PICTURE_KEY = re.compile(_PICTURES + _HOLDS, re.IGNORECASE)
_NUMBERED_KEY = re.compile(rf"{_PICTURES}{_HOLDS}[_-]?\d+", re.IGNORECASE)  # one of several
_OTHER_KEY = re.compile(rf"{_OTHERS}{_HOLDS}([_-]?\d+)?", re.IGNORECASE)
# A text that is a medium whatever its key.
_MEDIUM = re.compile(
  r"data:(image|video|audio)/.*|[^\n]+\."
  r"(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)",
  re.IGNORECASE | re.DOTALL,
)
NAMES = ("id", "sample_id", "question_id")  # of the sample, though it may be called like a file
# Marks of other media, before a question, behind its images or on the line behind it; elsewhere a
# text may speak of one.
_OTHER_MARK = re.compile(
  r"^\s*(?:<image>\s*)*<{0}>|\n\s*<{0}>\s*$".format(_OTHERS + r"([ _-]?\d+)?"), re.IGNORECASE
)
_FILE_WITHIN = re.compile(r"<img>[^<>]*</img>", re.IGNORECASE)
# How others write the place of a picture; beside pictures that are read a text may refer to one.
_PICTURE_MARK = re.compile(
  r"<(image|img|picture)[ _-]?(\d+|here|pad|token|placeholder|context)>|<\|(image|vision)\w*\|>",
  re.IGNORECASE,
)
# Keys, of a reply or with a value for each turn, that weigh a reply in the loss.
WEIGHTS = ("loss", "loss_mask", "loss_scale", "loss_weight", "weight", "train", "trainable")

Image = str | bytes  # a file's name, or its bytes


@dataclasses.dataclass(frozen=True)
class Talk:
  """A sample in the one form that is worked with. `system` None: the template's own text."""

  turns: Turns
  images: tuple[Image, ...] = ()
  system: str | None = None


def read(sample: Any) -> Talk:
  """Raises: SampleError for what is no dialogue, or carries what is not read."""
  if isinstance(sample, SampleError):  # why there is no sample
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
  return Talk(turns, within or named, system)


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
  """Whether a key is there and holds something."""
  return sample.get(key) not in (None, "", b"", [])


def _only_one(found: dict[str, Any]) -> None:
  """Raises: SampleError for two keys that say different things."""
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
  """Raises: SampleError for what is no Unicode: some tokenizers refuse it, others read anything."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    found = text[error.start : error.end]
    raise SampleError(f"{where}: half of a surrogate pair, {found!r}, at {error.start}") from None


def _content(number: int, content: Any) -> tuple[str, tuple[Image, ...]]:
  """The text of a turn, and the images that are named in it."""
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
  """Raises: SampleError for media that are not read.

  Beside an image that is read, other keys of pictures say where it is from, but for numbered ones.
  """
  for key, value in sample.items():
    if key in (*IMAGES, *DIALOGUES, "system"):
      continue
    held = _holds_media(sample, key)
    if has_image:
      held = held and not _PICTURE_KEY.fullmatch(key)
    else:
      held = held or (key not in NAMES and _is_medium(value))
    if held:
      raise SampleError(
        f"`{key}` {_shown(value)} is not read; images are read from {' or '.join(IMAGES)}"
      )


def _holds_media(values: dict[str, Any], key: Any) -> bool:
  known = (_PICTURE_KEY, _NUMBERED_KEY, _OTHER_KEY)
  if not isinstance(key, str) or not any(pattern.fullmatch(key) for pattern in known):
    return False
  value = values[key]
  if value is None or isinstance(value, bool | int | float):  # it counts, or says whether
    return False
  return len(value) > 0 if hasattr(value, "__len__") else True


def _is_medium(value: Any) -> bool:
  """Whether a value is bytes or the name of a file, or holds one."""
  if isinstance(value, str):
    return len(value) <= LONGEST_NAME and _MEDIUM.fullmatch(value) is not None
  if isinstance(value, dict):
    return any(isinstance(part, str | bytes) and _is_medium(part) for part in value.values())
  if isinstance(value, list | tuple):
    return bool(value) and _is_medium(value[0])
  return isinstance(value, bytes) and bool(value)


def _refuse_weights(sample: dict[str, Any], messages: list[_Message]) -> None:
  """Raises: SampleError where a reply is to be weighed unlike all others."""
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
  """Raises: SampleError for a picture in a question that is written in another way than IMAGE."""
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
  """The system text of the key or of the first turn, and the other turns."""
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
  """(question, reply) pairs; an open last turn has reply None.

  A greeting in front of the first question is left out, as in the original.

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
  """The beginning of a value that an error quotes."""
  return f"{value[:80]!r:.80}" if isinstance(value, str | bytes) else f"{value!r:.80}"
