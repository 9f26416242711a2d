"""Asks the same questions in many ways and counts answers whose greedy tokens change.

Usage: python scripts/batch_invariance.py --checkpoint runs/finetune --data data/easy_vqa [--limit N]

Batch sizes, bucket layouts, meshes of simulated devices (on a CPU) and a run that two processes
share. Every way but the first is compared with the first; a changed answer is printed with the
margin of its closest choice, in logits. In float32 none may change: the exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# name: what differs from the first; `layout` are fields of infer.engine.Layout.
WAYS: dict[str, dict[str, Any]] = {
  "batch 16": {},
  "batch 1": {"batch": 1},
  "batch 4": {"batch": 4},
  "buckets of 64": {"layout": {"prefix": 64, "suffix": 64, "slots": 128}},
  "buckets of 8": {"layout": {"prefix": 8, "suffix": 8, "slots": 8, "groups": 2}},
  "nothing shared": {"layout": {"share": False}},
  "4 devices, data 4": {"mesh": {"data": 4, "fsdp": 1, "tensor": 1}},
  "8 devices, data 2, fsdp 2, tensor 2": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
  "2 processes": {"processes": 2},
}


def answers(options: argparse.Namespace, way: dict[str, Any], part: int, parts: int) -> list[Any]:
  """[number, ids, margin] of every question of a part."""
  import jax

  from llava_sp_jax import config as config_lib
  from llava_sp_jax import mesh as mesh_lib
  from llava_sp_jax.eval.tasks.easy_vqa import EasyVqa
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine, Generation, Layout, Request

  items = EasyVqa(options.data).items()[: options.limit or None][part::parts]
  model = pretrained.from_run(options.checkpoint, dtype=options.dtype)
  mesh = None
  if "mesh" in way:
    sizes = config_lib.Mesh(**way["mesh"])
    count = sizes.data * sizes.fsdp * sizes.tensor
    mesh = mesh_lib.create(sizes, devices=jax.devices()[:count])
  engine = Engine(
    model, way.get("batch", 16), Generation(max_new_tokens=options.max_new_tokens), mesh,
    Layout(**way.get("layout", {})),
  )  # fmt: skip
  requests = (Request(i.question, i.images) for i in items)
  found = [
    [part + parts * n, a.ids, a.margin, a.text == i.truth, a.error]
    for (n, a), i in zip(enumerate(engine.answer(requests)), items, strict=True)
  ]
  print(f"    {engine.counts}", file=sys.stderr, flush=True)
  return found


def child(options: argparse.Namespace, name: str) -> list[Any]:
  """The answers of one way, by a process for each part: jax's devices are counted at its start."""
  way = WAYS[name]
  parts = way.get("processes", 1)
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = {**os.environ, "XLA_FLAGS": flags if "mesh" in way else flags.rsplit(" ", 1)[0]}
  command = [sys.executable, __file__, *sys.argv[1:], "--way", name]
  running = [
    subprocess.Popen([*command, "--part", f"{i}/{parts}"], stdout=subprocess.PIPE, text=True,
                     env=environment)
    for i in range(parts)
  ]  # fmt: skip
  found = []
  for process in running:
    text = process.communicate()[0]
    if process.returncode:
      raise SystemExit(f"{name}: a process failed; its message is above")
    found += json.loads(text.splitlines()[-1])
  return sorted(found)


def check(name: str, found: list[Any]) -> list[Any]:
  """The answers. Raises: SystemExit when a question has none: two errors would count as the same."""
  if errors := [f for f in found if f[4]]:
    raise SystemExit(
      f"{name}: {len(errors)} of {len(found)} questions have no answer, question {errors[0][0]}: "
      f"{errors[0][4]}"
    )
  return found


def compare(first: list[Any], other: list[Any]) -> list[str]:
  """Lines about the answers that differ."""
  return [
    f"    question {a[0]}: {a[1]} became {b[1]}; closest choice {min(a[2], b[2]):.2e}"
    for a, b in zip(first, other, strict=True)
    if a[1] != b[1]
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], epilog="ways: " + "; ".join(WAYS)
  )
  parser.add_argument("--checkpoint", required=True, help="run folder of llava-sp train")
  parser.add_argument("--data", required=True, help="folder of scripts/prepare_easy_vqa.py")
  parser.add_argument("--limit", type=int, default=0, help="only the first N questions")
  parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
  parser.add_argument("--max-new-tokens", type=int, default=8)
  parser.add_argument("--out", default="", help="write the counts to this JSON file")
  parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
  parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.way:
    part, parts = map(int, options.part.split("/"))
    print(json.dumps(answers(options, WAYS[options.way], part, parts)))
    return
  first: list[Any] = []
  report: dict[str, Any] = {"dtype": options.dtype, "ways": {}}
  for number, name in enumerate(WAYS, 1):
    started = time.monotonic()
    found = check(name, child(options, name))
    first = first or found
    changed = compare(first, found)
    right = sum(f[3] for f in found) / len(found)
    margins = sorted(f[2] for f in found)
    print(f"{number}/{len(WAYS)} {name}: {len(changed)} of {len(found)} answers changed, right "
          f"{100 * right:.2f}%, {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    print("\n".join(changed[:20]), end="\n" if changed else "", flush=True)
    report["ways"][name] = {"changed": len(changed), "answers": len(found), "right": right}
    report["closest_choices"] = margins[:5]
  print(f"closest choices, in logits: {', '.join(f'{m:.2e}' for m in report['closest_choices'])}")
  if options.out:
    Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
  total = sum(way["changed"] for way in report["ways"].values())
  if total and options.dtype == "float32":
    raise SystemExit(f"{total} answers changed: in float32 none may")


if __name__ == "__main__":
  main()
