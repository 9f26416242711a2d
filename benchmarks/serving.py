"""Measures the server: times to the first token and between tokens, and throughput, by clients.

Usage: python benchmarks/serving.py [--size smol] [--questions 48] [--out docs/results/serving]

Compares `llava-sp serve` with the offline engine on the same questions, and with a torch loop behind
Starlette on the same weights, in one run. Random weights of realistic shapes (eval_sides.py); every
answer has the same number of tokens, and every question a picture of its own. Needs the extras
`serve` and `test`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from eval_sides import SIZES, THINGS, TOWER, config_of, weights, write_images, write_tokenizer

from llava_sp_jax import provenance

CLIENTS = (1, 4, 16)
VARIANT, BATCH = "pooling", 16
SIDES = {"ours": "llava-sp serve", "torch": "torch and Starlette"}
Timed = dict[str, float]  # first: seconds to the first token; between: to the next; tokens


def body(picture: Path, question: str, tokens: int) -> dict[str, Any]:
  """Returns a request for exactly `tokens` tokens."""
  data = base64.b64encode(picture.read_bytes()).decode()
  content = [
    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
    {"type": "text", "text": question},
  ]
  return {
    "messages": [{"role": "user", "content": content}],
    "max_tokens": tokens,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
  }


async def ask(http: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> Timed:
  """Asks one question, and reads its stream."""
  begun, first, tokens = time.perf_counter(), 0.0, 0
  async with http.post(f"{url}/chat/completions", json=request) as response:
    if response.status != 200:
      raise SystemExit(f"{url}: {response.status}: {await response.text()}")
    async for line in response.content:
      if not line.startswith(b"data: {"):
        continue
      event = json.loads(line.removeprefix(b"data: "))
      if "error" in event:
        raise SystemExit(f"{url}: {event['error']}")
      # Of random weights many a token is no whole character, so its text comes later.
      if not first and event["choices"]:
        first = time.perf_counter()
      tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
  ended = time.perf_counter()
  first = first or ended
  return {"first": first - begun, "between": (ended - first) / max(1, tokens - 1), "tokens": tokens}


async def load(url: str, requests: Sequence[dict[str, Any]], clients: int) -> dict[str, Any]:
  """Asks all questions by `clients`, each of which waits for its answer before the next one."""
  waiting, found = iter(requests), []
  timeout = aiohttp.ClientTimeout(total=None)
  async with aiohttp.ClientSession(timeout=timeout) as http:

    async def client() -> None:
      for request in waiting:
        found.append(await ask(http, url, request))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
  return {
    "clients": clients,
    "first_token_s": statistics.median(each["first"] for each in found),
    "between_tokens_s": statistics.median(each["between"] for each in found),
    "tokens_per_s": sum(each["tokens"] for each in found) / seconds,
    "seconds": seconds,
  }


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[str]:
  """Starts a server; yields its URL once it is ready, and stops it."""
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
  assert process.stdout
  try:
    for line in process.stdout:
      if line.startswith("ready: "):
        url = line.split()[1]
        wait_for(url)
        yield url
        break
    else:
      raise SystemExit(f"{command[1]} ended; its message is above")
  finally:
    process.send_signal(signal.SIGINT)
    process.communicate()


def wait_for(url: str, seconds: float = 30) -> None:
  """Waits until a server listens."""
  address = urllib.parse.urlsplit(url)
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    with contextlib.suppress(OSError):
      socket.create_connection((address.hostname, address.port)).close()
      return
    time.sleep(0.1)
  raise SystemExit(f"{url} does not listen after {seconds:.0f} s")


def offline(model: Any, pictures: Sequence[Path], questions: Sequence[str], tokens: int) -> float:
  """Returns tokens per second of the engine without a server, after it has compiled."""
  from llava_sp_jax.infer.engine import Engine, Generation, Request

  generation = Generation(max_new_tokens=tokens, ignore_eos=True)
  engine = Engine(model, BATCH, generation)
  asked = [Request(q, (p.read_bytes(),)) for p, q in zip(pictures, questions, strict=True)]
  for request in (asked[:1], asked[:4], asked):  # compiles
    list(engine.answer(request))
  engine.forget()
  before, begun = engine.counts.compiles, time.perf_counter()
  made = sum(answer.tokens for answer in engine.answer(asked))
  seconds = time.perf_counter() - begun
  assert engine.counts.compiles == before, "nothing compiles after the warm-up"
  return made / seconds


def free_port() -> int:
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return int(one.getsockname()[1])


def page(result: dict[str, Any]) -> str:
  """Writes the figures as a table."""
  lines = [
    "# Serving: the server, the offline engine, and torch behind Starlette",
    "",
    f"Made by `{result['command']}`. Random weights: a decoder of the shape `{result['size']}`, variant "
    f"{VARIANT}, float32. {result['questions']} questions with a picture each, {result['tokens']} tokens "
    "an answer, streamed. Medians of times. A step of the engine computes all of its rows, also those "
    "without a request.",
    "",
    "| server | clients | first token | between tokens | tokens/s | of the offline engine |",
    "|---|---|---|---|---|---|",
  ]
  for side, name in SIDES.items():
    for row in result[side]:
      share = row["tokens_per_s"] / result["offline_tokens_per_s"]
      lines.append(
        f"| {name} | {row['clients']} | {1e3 * row['first_token_s']:,.0f} ms | "
        f"{1e3 * row['between_tokens_s']:.1f} ms | {row['tokens_per_s']:.1f} | {share:.2f} |"
      )
  lines += [
    f"| the engine without a server, {BATCH} at a time | - | - | - | "
    f"{result['offline_tokens_per_s']:.1f} | 1.00 |",
    "",
    f"Machine: {result['machine']}.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="smol", help="of the decoder")
  parser.add_argument("--questions", type=int, default=48, help="of each measurement (%(default)s)")
  parser.add_argument("--tokens", type=int, default=32, help="of an answer (%(default)s)")
  parser.add_argument("--out", type=Path, default=Path("docs/results/serving"))
  options = parser.parse_args()
  from flax.traverse_util import flatten_dict

  from llava_sp_jax.checkpoints import writing
  from llava_sp_jax.convert import formats, leaves
  from llava_sp_jax.convert.loaded import Loaded
  from llava_sp_jax.models import build

  result: dict[str, Any] = {
    "size": options.size,
    "questions": options.questions,
    "tokens": options.tokens,
    "machine": provenance.machine(),
    "command": f"python benchmarks/serving.py --size {options.size} --questions {options.questions} "
    f"--tokens {options.tokens}",
  }
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_tokenizer(folder / "tokenizer")
    config = config_of(VARIANT, options.size, folder / "tokenizer")
    model = weights(config, folder)
    source = Loaded(
      "memory",
      config,
      leaves.in_memory(flatten_dict(model.params, sep="/")),
      formats.PARTS,
      folder / "tokenizer",
    )
    writing.write(source, folder / "model")
    count = options.questions
    pictures = write_images(folder / "images", count * (1 + len(CLIENTS)))
    questions = [f"Is there a {THINGS[i % len(THINGS)]} in the image?" for i in range(count)]
    result["offline_tokens_per_s"] = offline(model, pictures[:count], questions, options.tokens)
    print(f"offline: {result['offline_tokens_per_s']:.1f} tokens/s", flush=True)
    port, layers = free_port(), build.tower_layers(config.model)
    torch_server = str(Path(__file__).with_name("torch_server.py"))
    commands = {
      "ours": ["-m", "llava_sp_jax.cli", "serve", str(folder / "model"), "--port=0",
               f"--batch-size={BATCH}"],
      "torch": [torch_server, str(folder), VARIANT, str(layers), str(folder / "tokenizer"),
                str(TOWER["image_size"]), str(port)],
    }  # fmt: skip
    for side, command in commands.items():
      result[side] = []
      with running([sys.executable, *command]) as url:
        for number, clients in enumerate(CLIENTS, 1):
          some = pictures[number * count : (number + 1) * count]
          asked = [body(p, q, options.tokens) for p, q in zip(some, questions, strict=True)]
          first = [body(p, questions[0], options.tokens) for p in pictures[: clients + 1]]
          asyncio.run(load(url, first, clients))  # compiles what the warm-up has not
          result[side].append(asyncio.run(load(url, asked, clients)))
          print(f"{side}: {result[side][-1]}", flush=True)
  provenance.write(options.out, result)
  provenance.named(options.out, "md").write_text(page(result))
  print(f"written: {options.out}.md, {options.out}.json")


if __name__ == "__main__":
  main()
