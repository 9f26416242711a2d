"""Judges: language models that grade answers. A call that fails never becomes a score."""

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

from llava_sp_jax import jsonl
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.tasks import web

PASSING = {408, 409, 429, 500, 502, 503, 504, 529}  # statuses that are worth another try
SHOWN = 300  # characters of what a server says beside its status
LONGEST_WAIT = 120.0  # seconds before another try, whatever the server asks for
LARGEST = 4 << 20  # bytes of an answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """What a judge is asked; `turn` tells repeated askings of the same apart."""

  prompt: str
  system: str = ""
  max_tokens: int = 1024
  temperature: float = 0.0
  turn: int = 0


Judge = Callable[[Ask], str]  # the judge's answer; raises where it has none


@dataclasses.dataclass(frozen=True)
class Review:
  """A judge's raw answer; with `error`, why there is none."""

  text: str
  error: str = ""


class JudgeError(LlavaSPError, RuntimeError):
  """The judge could not be asked. Its message holds no key."""


class Endpoint:
  """A judge behind an OpenAI-compatible `/chat/completions`.

  `url` is the API's base (`https://api.openai.com/v1`). The key is read from the environment
  variable `key` at each call (`key=""`: the server asks for none) and appears in no message. It goes
  to that address alone: redirects are not followed. A call has `seconds` in all and LARGEST bytes.
  Calls that may pass are repeated `tries` times with doubling pauses, or when the server says so,
  after LONGEST_WAIT at most.
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
    """Raises: JudgeError for what is no address of a web server, and when the variable is not set,
    or holds what cannot be a key."""
    self.name = model
    self._url, self._key, self._tries = _address(model, url), key, tries
    self._seconds, self._pause = seconds, pause
    self._secret()

  def _secret(self) -> str:
    if not self._key:
      return ""
    # A key that is read from a file ends in a newline.
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
    """The judge's answer. Raises: JudgeError after the last try."""
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
        said = _hidden(found.body.decode(errors="replace"), secret)  # before it is cut
        problem = f"status {found.status}: {found.moved or said[:SHOWN]}"
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
  """Where chats are completed below an API's base. Raises: JudgeError for what is no such address."""
  expected = (
    f"judge {model}: expected an address http://... or https://..., without a user or a query"
  )
  if "@" in url:  # what stands before it may be a password
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
  except ValueError:  # no port, or no address of six
    fits = False
  if not fits:
    raise JudgeError(f"{expected}, found {url!r}")
  return url.rstrip("/") + "/chat/completions"


def _lasts(error: BaseException) -> bool:
  """Whether another try would fail alike: a host of no such name, or that is not who it says."""
  cause = getattr(error, "reason", error)  # urllib wraps what a socket raises
  unknown = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
  return unknown or isinstance(cause, ssl.SSLCertVerificationError)


def _hidden(text: str, secret: str) -> str:
  return text.replace(secret, "(key)") if secret else text


def _content(answer: Any) -> str:
  try:
    text = answer["choices"][0]["message"]["content"]
  except (KeyError, IndexError, TypeError):
    said = json.dumps(answer)
    raise JudgeError(f"an answer without choices[0].message.content: {said:.{SHOWN}}") from None
  if isinstance(text, list):  # in parts, as some servers put it
    parts = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
    text = "".join(str(part.get("text", "")) for part in parts) or text
  if not isinstance(text, str) or not text.strip():
    empty = text is None or isinstance(text, str)
    raise JudgeError("an empty answer" if empty else f"no text: {json.dumps(text):.{SHOWN}}")
  return text


class Reviews:
  """A judge whose raw answers are kept: in memory, and in a file when there is one.

  The file (JSON lines: key, name, text) is appended to answer by answer, so that a run that was
  killed pays for no answer twice. Failures are not kept, and an answer that holds nothing to read
  is no better: the next run asks both again.
  """

  def __init__(self, judge: Judge, file: str | Path | None = None):
    self.name = str(getattr(judge, "name", getattr(judge, "__name__", type(judge).__name__)))
    self._judge, self._file = judge, Path(file) if file else None
    self._kept: dict[str, Review] = {}
    self._told: set[str] = set()  # keys of what this run has asked
    if self._file and self._file.is_file():
      rows, _ = jsonl.objects(self._file.read_bytes().split(b"\n"))
      for row in rows:  # what was cut off or damaged is asked again
        if isinstance(row.get("key"), str) and isinstance(row.get("text"), str):
          self._kept[row["key"]] = Review(row["text"])

  def __call__(self, ask: Ask, reads: Callable[[str], Any] = str) -> Review:
    """The kept or a new answer; a judge that raises makes a review with an error.

    `reads` gives None for an answer of no use: such a kept one is asked for once more in each run.
    """
    told = json.dumps([self.name, dataclasses.asdict(ask)], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()
    kept = self._kept.get(key)
    if kept and not kept.error and (key in self._told or reads(kept.text) is not None):
      return kept
    self._told.add(key)
    try:
      review = Review(self._judge(ask))
    except Exception as error:  # whatever a judge fails with, the benchmark goes on and counts it
      review = Review("", f"{type(error).__name__}: {error}")
    self._kept[key] = review
    if self._file and not review.error:
      self._file.parent.mkdir(parents=True, exist_ok=True)
      with self._file.open("a", encoding="utf-8") as file:
        file.write("\n" if self._torn() else "")
        file.write(json.dumps({"key": key, "name": self.name, "text": review.text}) + "\n")
    return review

  def _torn(self) -> bool:
    """Whether the file ends within a line."""
    assert self._file is not None
    with self._file.open("rb") as file:
      size = file.seek(0, os.SEEK_END)
      if not size:
        return False
      file.seek(size - 1)
      return file.read(1) != b"\n"
