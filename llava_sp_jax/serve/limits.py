"""Defines the limits of the server: how much a client may send, ask for, and keep open."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds requests and connections; bytes and counts are checked before a picture is decoded.

  Raises: ValueError for a limit that is not above 0 (`fetch_redirects`: below 0).
  """

  # Bodies
  body_bytes: int = 32 << 20  # of a request; larger pictures belong behind fewer requests
  body_seconds: float = 30.0  # until a body has arrived as a whole
  header_bytes: int = 16 << 10  # of a request's line and headers
  quotes: int = 400_000  # `"` in a body, in texts too: bounds its strings and objects
  text_bytes: int = 4 << 20  # of a body without the long strings of pictures
  field_bytes: int = 64 << 10  # of the JSON of a field that is neither messages nor prompt

  # Messages
  messages: int = 256  # of a conversation
  characters: int = 1 << 20  # of all texts of a conversation, or of a prompt
  parts: int = 1024  # of all messages of a conversation together
  stop_strings: int = 16  # of a request
  stop_characters: int = 1024  # of a stop string
  stop_ids: int = 128  # `stop_token_ids` of a request
  biases: int = 1024  # entries of `logit_bias`

  # Pictures
  pictures: int = 16  # of a request
  picture_bytes: int = 20 << 20  # of an encoded picture, inline or fetched
  all_picture_bytes: int = 64 << 20  # of all encoded pictures of a request together
  picture_pixels: int = 1 << 26  # of the square around a picture: 8192 x 8192
  fetch_seconds: float = 5.0  # for a picture's URL, with all its redirects
  fetch_redirects: int = 3  # followed for a picture's URL

  # Answers
  new_tokens: int = 1 << 16  # of an answer; the model's length bounds it as well
  choices: int = 16  # answers to one request (`n`)

  # The server
  connections: int = 1024  # open at the same time
  held_bytes: int = 512 << 20  # of the bodies of all requests that are read or answered
  feature_bytes: int = 2 << 30  # of features that are kept; at most an eighth of free memory
  prefix_bytes: int = 1 << 30  # of keys and values of earlier turns that are kept; likewise
  waiting: int = 256  # requests that wait for the engine
  waiting_tokens: int = 1 << 20  # of the prompts that wait for the engine
  request_seconds: float = 600.0  # until a request has its whole answer
  idle_seconds: float = 30.0  # that a connection stays open without a request
  stop_seconds: float = 30.0  # that running requests have when the server stops

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name == "fetch_redirects" else 1e-9
      if not least <= value < float("inf"):
        raise ValueError(f"limit {field.name}: expected a number above 0, found {value!r}")


DEFAULT = Limits()
