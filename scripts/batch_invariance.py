"""Asks the same questions in many ways and counts the answers whose greedy tokens change.

Usage: python scripts/batch_invariance.py --checkpoint runs/finetune --data data/easy_vqa [--limit N]

The ways are batch sizes, bucket layouts, meshes of simulated devices (on a CPU), two processes, and
clients that ask one question after another at the same time.
Each is compared with the first. A changed answer is printed with its margin, the smallest lead of a
chosen token in logits. In float32 no answer may change; otherwise the script exits with code 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp_jax import provenance

if TYPE_CHECKING:
  from llava_sp_jax.infer.engine import Answer, Engine, Request

# name: the difference to the first; `layout` holds fields of infer.engine.EngineLayout.
WAYS: dict[str, dict[str, Any]] = {
  "batch 16": {},
  "batch 1": {"batch": 1},
  "batch 4": {"batch": 4},
  "buckets of 64": {"layout": {"prefix": 64, "suffix": 64, "capacity": 128}},
  "buckets of 8": {"layout": {"prefix": 8, "suffix": 8, "capacity": 8, "groups": 2}},
  "nothing shared": {"layout": {"share": False}},
  "4 devices, data 4": {"mesh": {"data": 4, "fsdp": 1, "tensor": 1}},
  "8 devices, data 2, fsdp 2, tensor 2": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
  "2 processes": {"processes": 2},
  "16 clients": {"clients": 16},
}


def answers(options: argparse.Namespace, way: dict[str, Any], part: int, parts: int) -> list[Any]:
  """Returns number, ids, margin, verdict and error of every question of a part."""
  import jax

  from llava_sp_jax import config as config_lib
  from llava_sp_jax.distributed import mesh as mesh_lib
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
  from llava_sp_jax.tasks.easy_vqa import EasyVqa

  items = EasyVqa(options.data).items()[: options.limit or None][part::parts]
  model = pretrained.from_run(options.checkpoint, dtype=options.dtype)
  mesh = None
  if "mesh" in way:
    sizes = config_lib.MeshConfig(**way["mesh"])
    count = sizes.data * sizes.fsdp * sizes.tensor
    mesh = mesh_lib.create(sizes, devices=jax.devices()[:count])
  engine = Engine(
    model,
    way.get("batch", 16),
    Generation(max_new_tokens=options.max_new_tokens),
    mesh,
    EngineLayout(**way.get("layout", {})),
  )
  requests = [Request(i.question, i.images) for i in items]
  clients = way.get("clients", 0)
  given = served(engine, requests, clients) if clients else engine.answer(requests)
  found = [
    [part + parts * n, a.ids, a.margin, a.text == i.truth, a.error]
    for (n, a), i in zip(enumerate(given), items, strict=True)
  ]
  print(f"    {engine.counts}", file=sys.stderr, flush=True)
  return found


def served(engine: Engine, requests: list[Request], clients: int) -> list[Answer]:
  """Returns the answers of a service, of which each client waits for one before it asks the next."""
  from llava_sp_jax.infer.service import Service

  service = Service(engine)
  service.start()

  def ask(request: Request) -> Answer:
    last: queue.Queue[Answer] = queue.Queue()
    service.submit(request, lambda update: update.answer and last.put(update.answer))
    return last.get()

  with concurrent.futures.ThreadPoolExecutor(clients) as threads:
    found = list(threads.map(ask, requests))
  service.close()
  return found


def child(options: argparse.Namespace, name: str) -> list[Any]:
  """Returns the answers of one way; each part is a process, because jax counts devices at its
  start.
  """
  way = WAYS[name]
  parts = way.get("processes", 1)
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = {**os.environ, "XLA_FLAGS": flags if "mesh" in way else flags.rsplit(" ", 1)[0]}
  command = [sys.executable, __file__, *sys.argv[1:], "--way", name]
  running = [
    subprocess.Popen(
      [*command, "--part", f"{i}/{parts}"], stdout=subprocess.PIPE, text=True, env=environment
    )
    for i in range(parts)
  ]
  found = []
  for process in running:
    text = process.communicate()[0]
    if process.returncode:
      raise SystemExit(f"{name}: a process failed; its message is above")
    found += json.loads(text.splitlines()[-1])
  return sorted(found)


def check(name: str, found: list[Any]) -> list[Any]:
  """Returns the answers. Raises: SystemExit if one is an error: two errors would count as equal."""
  if errors := [f for f in found if f[4]]:
    raise SystemExit(
      f"{name}: {len(errors)} of {len(found)} questions have no answer, question {errors[0][0]}: "
      f"{errors[0][4]}"
    )
  return found


def compare(first: list[Any], other: list[Any]) -> list[dict[str, Any]]:
  """Returns the answers that differ, with their margins in logits."""
  return [
    {"question": a[0], "was": a[1], "became": b[1], "margin": min(a[2], b[2])}
    for a, b in zip(first, other, strict=True)
    if a[1] != b[1]
  ]


def write(out: Path, report: dict[str, Any]) -> None:
  """Adds the counts of a dtype to those of others in `out`.json, and writes the page `out`.md."""
  reports = provenance.read(out, {}, current=True)
  reports[report["dtype"]] = report
  provenance.write(out, reports)
  lines = [
    "# Batch invariance: the same questions, asked in many ways",
    "",
    "Made by `python scripts/batch_invariance.py`. Changed: answers with other tokens than in the "
    "first way. Margin: the lead, in logits, of the closest choice among an answer's tokens.",
  ]
  for dtype, found in reports.items():
    lines += [
      "",
      f"## {dtype}",
      "",
      f"{found['answers']} questions; the closest choices of the first way, in "
      f"logits: {', '.join(f'{m:.1e}' for m in found['closest_choices'])}.",
      "",
      "| way | changed | right | margins of the changed: median, largest |",
      "|---|---|---|---|",
    ]
    for name, way in found["ways"].items():
      margins = sorted(flip["margin"] for flip in way["changed"])
      shown = f"{margins[len(margins) // 2]:.1e}, {margins[-1]:.1e}" if margins else "-"
      lines.append(f"| {name} | {len(margins)} | {100 * way['right']:.2f}% | {shown} |")
  provenance.named(out, "md").write_text("\n".join(lines) + "\n")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], epilog="ways: " + "; ".join(WAYS)
  )
  parser.add_argument("--checkpoint", required=True, help="run folder of llava-sp train")
  parser.add_argument("--data", required=True, help="folder of scripts/prepare_easy_vqa.py")
  parser.add_argument("--limit", type=int, default=0, help="only the first N questions")
  parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
  parser.add_argument("--max-new-tokens", type=int, default=8)
  parser.add_argument(
    "--out", default="", help="put the counts into OUT.json, and a table into OUT.md"
  )
  parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
  parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.way:
    part, parts = map(int, options.part.split("/"))
    print(json.dumps(answers(options, WAYS[options.way], part, parts)))
    return
  first: list[Any] = []
  ways: dict[str, Any] = {}
  for number, name in enumerate(WAYS, 1):
    started = time.monotonic()
    found = check(name, child(options, name))
    first = first or found
    changed = compare(first, found)
    right = sum(f[3] for f in found) / len(found)
    print(
      f"{number}/{len(WAYS)} {name}: {len(changed)} of {len(found)} answers changed, right "
      f"{100 * right:.2f}%, {time.monotonic() - started:.0f} s",
      flush=True,
    )
    for flip in changed[:20]:
      print(
        "    question {question}: {was} became {became}; closest choice {margin:.2e}".format(**flip)
      )
    ways[name] = {"changed": changed, "right": right}
  closest = sorted(f[2] for f in first)[:5]
  print(f"closest choices, in logits: {', '.join(f'{m:.2e}' for m in closest)}")
  if options.out:
    write(
      Path(options.out),
      {"dtype": options.dtype, "answers": len(first), "ways": ways, "closest_choices": closest},
    )
  total = sum(len(way["changed"]) for way in ways.values())
  if total and options.dtype == "float32":
    raise SystemExit(f"{total} answers changed: in float32 none may")


if __name__ == "__main__":
  main()
