"""Serves objects in memory as Cloud Storage does: `python -m tests.object_store` prints its address.

`python -m tests.object_store SECONDS` answers each request so much later. Of an object with
UNRELIABLE in its name, each range fails once: the first read of it. One with SILENT in it is answered
the first time after SILENCE only.

It speaks the part of the JSON API that gcsfs, google-cloud-storage and tensorstore use. A put is
atomic and may have a precondition. There is no rename, no append, no lock and no folder: what a
program wants of these, it must do without.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"  # the only one
PAGE = 1000  # objects in one answer of a listing
UNRELIABLE, SILENT = "unreliable", "silent"
SILENCE = 100.0  # in seconds


@dataclasses.dataclass(frozen=True)
class Stored:
  """An object: its bytes, and a number that is new with each put."""

  data: bytes
  generation: int
  made: str

  def about(self, name: str) -> dict[str, Any]:
    return {
      "kind": "storage#object",
      "id": f"{BUCKET}/{name}/{self.generation}",
      "bucket": BUCKET,
      "name": name,
      "size": str(len(self.data)),
      "generation": str(self.generation),
      "metageneration": "1",
      "contentType": "application/octet-stream",
      "timeCreated": self.made,
      "updated": self.made,
      "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
    }


@dataclasses.dataclass
class Upload:
  """What has come of an object that is sent in pieces; not to be seen before the last one."""

  name: str
  wanted: dict[str, str]
  data: bytearray = dataclasses.field(default_factory=bytearray)


def parts(body: bytes, kind: str) -> tuple[bytes, bytes]:
  """Returns the metadata and the bytes of an upload in two parts; `kind` is its content type."""
  mark = b"--" + kind.partition("boundary=")[2].strip("\"'").encode()
  _, first, rest = body.split(mark, 2)
  second = rest[: rest.rindex(mark)]
  about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (first, second))
  return about, re.sub(rb"\r?\n\Z", b"", data)


class RefusedError(Exception):
  """An answer other than 200: (status, what it says)."""


class Objects:
  """Holds the objects of the bucket; each method is atomic."""

  def __init__(self) -> None:
    self._lock, self._held = threading.Lock(), dict[str, Stored]()
    self._failed = set[tuple[str, str]]()  # objects and ranges
    self.numbers, self.uploads = itertools.count(1), dict[str, Upload]()

  def get(self, name: str, wanted: dict[str, str]) -> Stored:
    with self._lock:
      self._check(name, wanted)
      if name not in self._held:
        raise RefusedError(404, f"no such object: {name}")
      return self._held[name]

  def may_fail(self, name: str, span: str) -> None:
    with self._lock:
      fails = (
        any(mark in name for mark in (UNRELIABLE, SILENT)) and (name, span) not in self._failed
      )
      self._failed.add((name, span))
    if fails and SILENT in name:
      time.sleep(SILENCE)
    elif fails:
      raise RefusedError(503, "try again")

  def put(self, name: str, data: bytes, wanted: dict[str, str]) -> dict[str, Any]:
    with self._lock:
      self._check(name, wanted)
      made = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
      self._held[name] = Stored(data, time.time_ns() // 1000 * 1000 + next(self.numbers), made)
      return self._held[name].about(name)

  def delete(self, name: str, wanted: dict[str, str]) -> None:
    with self._lock:
      self._check(name, wanted)
      if self._held.pop(name, None) is None:
        raise RefusedError(404, f"no such object: {name}")

  def _check(self, name: str, wanted: dict[str, str]) -> None:
    held = self._held.get(name)
    found = held.generation if held else 0
    if "ifGenerationMatch" in wanted and int(wanted["ifGenerationMatch"]) != found:
      raise RefusedError(412, f"{name} has generation {found}")
    if "ifGenerationNotMatch" in wanted and int(wanted["ifGenerationNotMatch"]) == found:
      raise RefusedError(304 if found else 412, f"{name} has generation {found}")

  def listing(self, wanted: dict[str, str]) -> dict[str, Any]:
    prefix, sign = wanted.get("prefix", ""), wanted.get("delimiter", "")
    after, most = wanted.get("pageToken", ""), int(wanted.get("maxResults") or PAGE)
    least, end = wanted.get("startOffset", ""), wanted.get("endOffset", "")
    with self._lock:
      held = dict(self._held)
    names, folders = list[str](), list[str]()
    for name in sorted(held):
      if not name.startswith(prefix) or name < least or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      entry = prefix + rest.split(sign)[0] + sign if sign and sign in rest else name
      if entry <= after or entry in folders:
        continue
      if len(names) + len(folders) == min(most, PAGE):
        page = {"nextPageToken": max([*names, *folders])}
        break
      (names if entry == name else folders).append(entry)
    else:
      page = {}
    items = [held[name].about(name) for name in names]
    return {"kind": "storage#objects", "items": items, "prefixes": folders, **page}


class Handler(BaseHTTPRequestHandler):
  """Answers requests for the objects of its server."""

  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Server

  def log_message(self, *_: Any) -> None:
    pass

  def _serve(self) -> None:
    parts = urlsplit(self.path)
    self.wanted = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    self.body = self._read()
    time.sleep(self.server.latency)
    try:
      self._answer_to(parts.path.removeprefix("/download").removeprefix("/storage/v1"))
    except RefusedError as refused:
      status, said = refused.args
      self._answer({"error": {"code": status, "message": said}}, status)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

  def _read(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    data = b""
    while size := int(self.rfile.readline().split(b";")[0], 16):
      data += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return data

  def _answer_to(self, path: str) -> None:
    objects, method = self.server.objects, self.command
    where = f"/b/{BUCKET}"
    if path == where and method == "GET":
      self._answer({"kind": "storage#bucket", "id": BUCKET, "name": BUCKET, "location": "HERE"})
    elif path == f"{where}/o" and method == "GET":
      self._answer(objects.listing(self.wanted))
    elif path.startswith(f"/upload/storage/v1{where}/o"):
      self._upload()
    elif path.startswith(f"{where}/o/"):
      name, _, other = path.removeprefix(f"{where}/o/").partition("/")
      self._object(unquote(name), other)
    else:
      raise RefusedError(404, f"{method} {self.path}: not here")

  def _object(self, name: str, other: str) -> None:
    objects, method = self.server.objects, self.command
    if method == "DELETE":
      objects.delete(name, self.wanted)
      self._answer(None, 204)
    elif method == "GET" and self.wanted.get("alt") == "media":
      objects.may_fail(name, self.headers.get("Range", ""))
      self._media(objects.get(name, self.wanted))
    elif method == "GET":
      self._answer(objects.get(name, self.wanted).about(name))
    elif method == "POST" and other.startswith("rewriteTo/"):
      to = unquote(other.rpartition("/o/")[2])
      made = objects.put(to, objects.get(name, {}).data, self.wanted)
      self._answer({"kind": "storage#rewriteResponse", "done": True, "resource": made})
    else:
      raise RefusedError(501, f"{method} {self.path}: an object store has no such thing")

  def _media(self, held: Stored) -> None:
    data, status, more = held.data, 200, {}
    if span := self.headers.get("Range", "").removeprefix("bytes="):
      first, _, last = span.partition("-")
      start = int(first) if first else max(len(data) - int(last), 0)
      stop = min(int(last) + 1, len(data)) if first and last else len(data)
      if start >= len(data):
        raise RefusedError(416, "beyond the end")
      more = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
      data, status = data[start:stop], 206
    self._send(status, data, {**more, "x-goog-generation": str(held.generation)})

  def _upload(self) -> None:
    objects, wanted, way = self.server.objects, self.wanted, self.wanted.get("uploadType")
    if "upload_id" in wanted:
      self._go_on(wanted["upload_id"])
    elif way == "media":
      self._answer(objects.put(wanted["name"], self.body, wanted))
    elif way == "multipart":
      about, data = parts(self.body, self.headers["Content-Type"])
      self._answer(objects.put(json.loads(about)["name"], data, wanted))
    elif way == "resumable":
      number = str(next(objects.numbers))
      name = wanted.get("name") or json.loads(self.body)["name"]
      objects.uploads[number] = Upload(name, wanted)
      place = f"{self.server.url}{urlsplit(self.path).path}?uploadType=resumable&upload_id={number}"
      self._send(200, b"", {"Location": place})
    else:
      raise RefusedError(501, f"{self.command} {self.path}: no upload of that kind")

  def _go_on(self, number: str) -> None:
    """Takes the next bytes of an upload; the object exists when all have come."""
    upload = self.server.objects.uploads[number]
    upload.data += self.body
    if self.headers["Content-Range"].endswith("/*"):
      self._send(308, b"", {"Range": f"bytes=0-{len(upload.data) - 1}"})
    else:
      self._answer(self.server.objects.put(upload.name, bytes(upload.data), upload.wanted))

  def _answer(self, values: Any, status: int = 200) -> None:
    body = b"" if values is None else json.dumps(values).encode()
    self._send(status, body, {"Content-Type": "application/json; charset=UTF-8"})

  def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
    self.send_response(status)
    if status in (204, 304):  # these never have a body: the next answer would begin with it
      data = b""
    else:
      headers = {**headers, "Content-Length": str(len(data))}
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)


class Server(ThreadingHTTPServer):
  """Listens at a free port of this machine."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, latency: float = 0.0) -> None:
    super().__init__(("127.0.0.1", 0), Handler)
    self.latency = latency
    self.objects = Objects()
    self.url = f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, *_: Any) -> None:
    pass  # a client was killed


def settings(url: str) -> dict[str, str]:
  """The environment in which gs:// leads to the store at `url`, without credentials."""
  return {
    "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
    "TENSORSTORE_GCS_HTTP_URL": url,
    "FSSPEC_GCS_TOKEN": "anon",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask a second service, over gRPC
    "NO_GCE_CHECK": "true",
  }


@contextlib.contextmanager
def running(latency: float = 0.0) -> Iterator[str]:
  """Runs a store as a process of its own, and makes gs:// lead there; yields its address."""
  command = [sys.executable, "-m", "tests.object_store", str(latency)]
  place = Path(__file__).parents[1]
  before = dict(os.environ)
  with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout
      url = process.stdout.readline().strip()
      os.environ.update(settings(url))
      if "fsspec" in sys.modules:
        sys.modules["fsspec"].config.set_conf_env(sys.modules["fsspec"].config.conf)
      yield url
    finally:
      os.environ.clear()
      os.environ.update(before)
      process.kill()


def main() -> None:
  server = Server(*map(float, sys.argv[1:]))
  print(server.url, flush=True)
  server.serve_forever()


if __name__ == "__main__":
  main()
