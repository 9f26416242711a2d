"""Plans that no compiler made."""

from __future__ import annotations

from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import cost, memory, report, topologies

GIB = 1 << 30


def plan(total: int, seconds: float = 2.0, **about: Any) -> report.Plan:
  largest = (
    (4 * GIB, "bf16[32,8,2048,4096]", "jit(run)/jvp(LlavaSP)/layers/dynamic_update_slice"),
  )
  found = memory.Memory(
    {"frozen": total // 4, memory.TEMPORARIES: total - total // 4}, total, largest
  )
  compiled = compile_lib.Compiled(found, 9.0, {"mesh": {"fsdp": 16}, **about})
  config = config_lib.from_dict({"name": "x", "train": {"batch_size": 128, "steps": 1000}})
  programs = {"train": report.Program(compiled, cost.Cost(seconds))}
  return report.Plan(config, topologies.topology("v5e-16"), "train", programs)


def evaluation(**model: str) -> report.Plan:
  """A plan of the engine's programs, each of 1 GiB and 1 s, a decode step of .5 s."""
  found = memory.Memory({"parameters": GIB}, GIB)
  config = config_lib.from_dict({"name": "x", "train": {"batch_size": 128}, "model": model})
  programs = {}
  for name in compile_lib.PROGRAMS["eval"]:
    runs = 1 if name in ("admit", "decode") else 8
    about = {"mesh": {"tensor": 16}, "rows": 128, "runs": runs, "beside": {"state": GIB}}
    loops = {"while": cost.Cost(0.5)} if name == "decode" else {}
    compiled = compile_lib.Compiled(found, 9.0, about)
    programs[name] = report.Program(compiled, cost.Cost(1.0, loops=loops))
  return report.Plan(config, topologies.topology("v5e-16"), "eval", programs)
