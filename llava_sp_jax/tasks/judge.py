"""Asks judges: language models that grade answers. A failed call never becomes a score."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import os
import random
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax import jsonl, storage
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.tasks import web

PASSING = {408, 409, 429, 500, 502, 503, 504, 529}  # HTTP statuses after which a call is repeated
SHOWN = 300  # characters of a server's text that an error quotes
LONGEST_WAIT = 120.0  # the most seconds between two tries, whatever the server asks for
LARGEST = 4 << 20  # the most bytes of an answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """Holds a request to a judge; `turn` distinguishes repetitions of the same request."""

  prompt: str
  system: str = ""
  max_tokens: int = 1024
  temperature: float = 0.0
  turn: int = 0


Judge = Callable[[Ask], str]  # returns the judge's answer; raises if there is none


@dataclasses.dataclass(frozen=True)
class Review:
  """Holds a judge's raw reply, or in `error` why there is none."""

  text: str
  error: str = ""


class JudgeError(LlavaSPError, RuntimeError):
  """Reports a judge that could not be asked; the message never contains the API key."""


class Endpoint:
  """Calls a judge through an OpenAI-compatible `/chat/completions`.

  Reads the API key from an environment variable at each call, sends it to that address alone (it
  follows no redirects), and never puts it into a message. Repeats a call that failed for a reason
  that may pass, after a pause that doubles each time or that the server asks for, of at most
  LONGEST_WAIT (120) seconds.
  """

  def __init__(
    self,
    url: str,
    model: str,
    key: str = "OPENAI_API_KEY",
    tries: int = 5,
    seconds: float = 60.0,
    pause: Callable[[float], Any] = time.sleep,
  ):
    """Checks the address and the key.

    Args:
      url: the base of the API, e.g. `https://api.openai.com/v1`.
      model: the name of the model to ask.
      key: the environment variable that holds the API key ("": the server needs none).
      tries: the most calls for one request.
      seconds: the time limit of one call.
      pause: sleeps between two calls.

    Raises: JudgeError for what is not the address of a web server, and for a variable that is not
      set or cannot hold a key.
    """
    self.name = model
    self._url, self._key, self._tries = _address(model, url), key, tries
    self._seconds, self._pause = seconds, pause
    self._secret()

  def _secret(self) -> str:
    if not self._key:
      return ""
    # A key that was read from a file may end in a newline.
    secret = os.environ.get(self._key, "").strip()
    if not secret:
      raise JudgeError(f"no key for the judge {self.name}: set the variable {self._key}")
    if not (secret.isascii() and secret.isprintable()):  # http.client would quote it, escaped
      raise JudgeError(
        f"the key for the judge {self.name}, in the variable {self._key}, holds characters that no "
        "header can; set it to the key alone, on one line"
      )
    return secret

  def __call__(self, ask: Ask) -> str:
    """Returns the judge's reply to a request.

    Raises: JudgeError when the call fails, after the last try.
    """
    messages = [{"role": "system", "content": ask.system}] if ask.system else []
    asked = {
      "model": self.name,
      "messages": [*messages, {"role": "user", "content": ask.prompt}],
      "max_tokens": ask.max_tokens,
      "temperature": ask.temperature,
    }
    secret, problem = self._secret(), ""
    headers = {"Content-Type": "application/json"}
    if secret:
      headers["Authorization"] = f"Bearer {secret}"
    for attempt in range(self._tries):
      wait = 2.0**attempt * random.uniform(0.75, 1.25)
      try:
        body = json.dumps(asked).encode()
        found = web.post(self._url, body, headers, self._seconds, LARGEST)
        if 200 <= found.status < 300:
          return _content(json.loads(found.body))
        reply = _hidden(found.body.decode(errors="replace"), secret)  # before it is cut
        problem = f"status {found.status}: {found.moved or reply[:SHOWN]}"
        if found.status not in PASSING:
          break
        wait = found.wait(wait)
      except web.TooLargeError as error:
        problem = str(error)
        break
      except (OSError, http.client.HTTPException, ValueError, RecursionError, JudgeError) as error:
        problem = f"{type(error).__name__}: {error}"
        if _lasts(error):
          break
      if attempt + 1 < self._tries:
        self._pause(min(wait, LONGEST_WAIT))
    raise JudgeError(f"{self._url} ({self.name}): {_hidden(problem, secret)}")


def _address(model: str, url: str) -> str:
  """Returns the address of `/chat/completions` below an API's base.

  Raises: JudgeError for a base that is not a plain http or https address.
  """
  expected = (
    f"judge {model}: expected an address http://... or https://..., without a user or a query"
  )
  if "@" in url:  # the text before it may be a password, so it is not quoted
    raise JudgeError(f"{expected}, found one with a user; a key is read from a variable")
  try:
    parts = urllib.parse.urlsplit(url)
    fits = (
      parts.scheme.lower() in ("http", "https")
      and bool(parts.hostname)
      and parts.port != 0
      and bool((parts.hostname or "").encode("idna"))
      and "%" not in parts.netloc
      and not (parts.query or parts.fragment)
      and url.isascii()
      and not re.search(r"[\x00-\x20]", url)
    )
  except ValueError:  # an invalid port, or an invalid IPv6 address
    fits = False
  if not fits:
    raise JudgeError(f"{expected}, found {url!r}")
  return url.rstrip("/") + "/chat/completions"


def _lasts(error: BaseException) -> bool:
  """Returns whether another try would fail, too: an unknown host, or an invalid certificate."""
  cause = getattr(error, "reason", error)  # urllib wraps the errors of sockets
  unknown = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
  return unknown or isinstance(cause, ssl.SSLCertVerificationError)


def _hidden(text: str, secret: str) -> str:
  """Replaces the key in a text by "(key)"."""
  return text.replace(secret, "(key)") if secret else text


def _content(answer: Any) -> str:
  """Returns the text of a chat completion. Raises: JudgeError when there is none."""
  try:
    text = answer["choices"][0]["message"]["content"]
  except (KeyError, IndexError, TypeError):
    found = json.dumps(answer)
    raise JudgeError(f"an answer without choices[0].message.content: {found:.{SHOWN}}") from None
  if isinstance(text, list):  # some servers send a list of parts
    parts = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
    text = "".join(str(part.get("text", "")) for part in parts) or text
  if not isinstance(text, str) or not text.strip():
    empty = text is None or isinstance(text, str)
    raise JudgeError("an empty answer" if empty else f"no text: {json.dumps(text):.{SHOWN}}")
  return text


class Reviews:
  """Caches the raw replies of a judge, in memory and optionally in a file.

  Appends each reply to the file (JSON lines: key, name, text) at once, so that a run that was
  killed pays for no reply twice. Does not write failures. The next run repeats the request of a
  failure, and of a reply that holds no grade.
  """

  def __init__(self, judge: Judge, file: str | Path | None = None):
    """Reads the replies in `file`, if it exists; None keeps replies in memory alone."""
    self.name = str(getattr(judge, "name", getattr(judge, "__name__", type(judge).__name__)))
    self._judge, self._file = judge, storage.place(file) if file else None
    self._kept: dict[str, Review] = {}
    self._asked: set[str] = set()  # keys of the requests of this run
    if self._file:
      rows, _ = jsonl.objects(storage.of(self._file).content(self._file).split(b"\n"))
      for row in rows:  # requests of damaged lines are repeated
        if isinstance(row.get("key"), str) and isinstance(row.get("text"), str):
          self._kept[row["key"]] = Review(row["text"])

  def __call__(self, ask: Ask, reads: Callable[[str], Any] = str) -> Review:
    """Returns the cached or a new reply; returns a Review with an error if the judge raises.

    `reads` returns None for a reply that holds no grade. The request of such a reply in the file is
    repeated once in each run.
    """
    request = json.dumps([self.name, dataclasses.asdict(ask)], sort_keys=True)
    key = hashlib.sha256(request.encode()).hexdigest()
    kept = self._kept.get(key)
    if kept and not kept.error and (key in self._asked or reads(kept.text) is not None):
      return kept
    self._asked.add(key)
    try:
      review = Review(self._judge(ask))
    except Exception as error:  # any failure of a judge is counted, and the benchmark continues
      review = Review("", f"{type(error).__name__}: {error}")
    self._kept[key] = review
    if self._file and not review.error:
      store = storage.of(self._file)
      store.make(self._file.parent)
      torn = store.content(self._file)[-1:] not in (b"", b"\n")
      record = {"key": key, "name": self.name, "text": review.text}
      jsonl.append(self._file, record, "\n" if torn else "")
      store.secure(self._file)
    return review
