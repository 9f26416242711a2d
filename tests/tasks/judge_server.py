"""A real HTTP server in place of a judge's, which fails on purpose."""

from __future__ import annotations

import contextlib
import http.server
import json
from typing import Any

KEY = "sk-secret-123"


class Server(http.server.ThreadingHTTPServer):
  """Answers with what `script` holds, one (status, body) a call; then with "fine".

  A body that is a function of the handler writes itself, as a server that misbehaves.
  """

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), Handler)
    self.script: list[tuple[int, Any]] = []
    self.headers: dict[str, str] = {}
    self.seen: list[tuple[str, str | None, dict[str, Any]]] = []


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self) -> None:
    assert isinstance(self.server, Server)
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.seen.append((self.path, self.headers.get("Authorization"), body))
    fine = {"choices": [{"message": {"content": "fine"}}]}
    status, answer = self.server.script.pop(0) if self.server.script else (200, fine)
    if callable(answer):
      with contextlib.suppress(OSError):  # the judge has gone away
        answer(self)
      return
    text = answer if isinstance(answer, str) else json.dumps(answer)
    self.send_response(status)
    if status == 429:
      self.send_header("Retry-After", "7")
    for name, value in self.server.headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *args: Any) -> None:
    """Nothing is printed."""
