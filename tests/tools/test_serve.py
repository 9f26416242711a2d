"""`llava-sp serve`: a process that opens a checkpoint, answers, and stops at a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import cli
from llava_sp_jax.config import ConfigError
from llava_sp_jax.serve.limits import DEFAULT
from llava_sp_jax.tools import serve
from tests.conftest import REPOSITORY
from tests.serve.pictures import data_url
from tests.serve.requests import body, text, user

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
READY = re.compile(r"ready: (http://127\.0\.0\.1:\d+)/v1 \(a key is needed\)")


@contextlib.contextmanager
def started(run_folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
  """A process that serves a run, once it is ready: the process, its URL, and what it has printed."""
  command = [sys.executable, "-m", "llava_sp_jax.cli", "serve", str(run_folder), "--port", "0"]
  process = subprocess.Popen(
    [*command, "--batch-size", "1", "--max-new-tokens", "4", "--limit", "new_tokens=64", *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=REPOSITORY,
    env={**os.environ, serve.KEY: "secret"},
  )
  try:
    assert process.stdout is not None
    said: list[str] = []
    while not (ready := READY.search("".join(said))):
      line = process.stdout.readline()
      assert line, "".join(said)
      said.append(line)
    yield process, ready[1], said
  finally:
    process.kill()
    process.communicate()


@pytest.mark.guard
def test_a_server_from_start_to_stop(run_folder: Path) -> None:
  with started(run_folder) as (process, url, said):
    first, second, _ = said
    assert first.startswith(f"{run_folder} as tiny-pooling-finetune: variant pooling, ")
    assert "GB in use by this process (cpu); warming up on http://127.0.0.1:" in second
    with urllib.request.urlopen(f"{url}/health") as found:
      assert found.status == 200
    talk: Any = [{"role": "user", "content": "what is it?"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
      with pytest.raises(openai.AuthenticationError):
        client.models.list()
      client = client.with_options(api_key="secret")
      (model,) = client.models.list().data
      assert model.id == "tiny-pooling-finetune"
      answer = client.chat.completions.create(model=model.id, messages=talk)
      assert answer.usage.completion_tokens <= 4
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=300)
    assert rest.strip() == "stopped"
    assert process.returncode == 0
    with pytest.raises(urllib.error.URLError):
      urllib.request.urlopen(f"{url}/health")


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat(run_folder: Path) -> None:
  """Each has a picture that was not seen before, and half of them stream."""
  small = ["--limit", "feature_bytes=1000000", "--limit", "prefix_bytes=1000000"]
  rng = np.random.default_rng(0)
  headers = {"content-type": "application/json", "authorization": "Bearer secret"}

  with started(run_folder, *small) as (process, url, _):

    def ask(count: int) -> float:
      """MB of memory that the server has after so many requests more."""
      connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
      for turn in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, "PNG")
        part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
        content = user(part, text(f"what is it, {turn % 10}?"))
        asked = body(messages=[content], max_tokens=1, stream=turn % 2 == 0)
        connection.request("POST", "/v1/chat/completions", asked, headers)
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        reply.read()
      connection.close()
      pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
      return pages * resource.getpagesize() / 1e6

    before = ask(2000)  # caches fill up
    after = ask(8000)
  print(f"{before:.0f} MB after 2,000 requests, {after:.0f} MB after 10,000")
  assert after - before < 50


def test_a_port_in_use_is_found_before_a_model_is_loaded(
  capsys: pytest.CaptureFixture[str],
) -> None:
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    assert cli.main(["serve", "no such folder", "--port", str(port)]) == 1
  assert capsys.readouterr().err == f"llava-sp serve: 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
  ("words", "code", "says"),
  [
    (["no such folder", "--port", "0"], 1, "no such folder"),
    (["x", "--max-new-tokens", "0"], 2, "--max-new-tokens: expected from 1"),
    (["x", "--temperature", "-1"], 2, "--temperature: expected 0"),
    (["x", "--tls-cert", "a"], 2, "--tls-cert and --tls-key: expected both or none"),
    (["x", "--limit", "picture=3"], 1, "--limit: unknown 'picture'"),
    (["x", "--limit", "pictures=many"], 1, "--limit pictures: expected a number as in pictures=16"),
    (["x", "--limit", "pictures"], 1, "found ''"),
    (["x", "--limit", "pictures=0"], 1, "limit pictures: expected a number above 0"),
    (["x", "--drain", "0"], 1, "limit stop_seconds: expected a number above 0"),
    (["x", "--host", "no.such.host.invalid"], 1, "no.such.host.invalid"),
    (["x", "--port", "70000"], 2, "--port: expected 0 to 65535, found 70000"),
    ([], 2, "CHECKPOINT"),
  ],
)
def test_wrong_options_are_one_line(
  capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
  try:
    found = cli.main(["serve", *words])
  except SystemExit as left:
    found = left.code
  error = capsys.readouterr().err
  assert (found, error.count("\n")) == (code, 1), error
  assert says in error


def test_limits() -> None:
  found = serve.limits_of(["pictures=4", "request_seconds=2.5"], 7)
  assert found == dataclasses.replace(DEFAULT, pictures=4, request_seconds=2.5, stop_seconds=7)
  assert serve.limits_of([], None) == DEFAULT
  with pytest.raises(ConfigError):
    serve.limits_of(["pictures=1.5"], None)
