"""A plan that no compiler made."""

from __future__ import annotations

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import cost, memory, report, topologies

GIB = 1 << 30


def plan(total: int, seconds: float = 2.0, **about: float) -> report.Plan:
  largest = (
    (4 * GIB, "bf16[32,8,2048,4096]", "jit(run)/jvp(LlavaSP)/layers/dynamic_update_slice"),
  )
  found = memory.Memory(
    {"frozen": total // 4, memory.TEMPORARIES: total - total // 4}, total, largest
  )
  compiled = compile_lib.Compiled(found, 9.0, {"mesh": {"fsdp": 16}, **about})
  config = config_lib.from_dict({"name": "x", "train": {"batch_size": 128, "steps": 1000}})
  return report.Plan(config, topologies.topology("v5e-16"), "train", compiled, cost.Cost(seconds))
