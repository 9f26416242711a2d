"""Measures a LoRA step of packed rows at the largest batch that fits, and the vision part alone."""

from __future__ import annotations

import time
from typing import Any

import accelerator_models as models
import jax
import jax.numpy as jnp
import numpy as np
from accelerator_record import Record
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax.models import attention, build, flops
from llava_sp_jax.plan import lower, memory
from llava_sp_jax.training import optimizer, setup

SPARE = 2 * models.GIB  # kept free beside the memory that the compiler counts
FEWER = 7 / 8  # share of the rows to try if they did not fit after all
TRIES = 3


def train(record: Record) -> None:
  """Measures the step with its default settings."""
  record.part("train", 120, lambda: _step(record, {}), remat="projections", attention="auto")
  record.part("train", 30, lambda: _vision(record), part="vision alone")


def variants(record: Record) -> None:
  """Measures the step with more recomputation, and with each other attention of the platform."""
  others = attention.PLATFORMS.get(models.device().platform, ("xla",))[1:]
  for more in ({"remat": "full"}, *({"attention": name} for name in others)):
    labels = {"remat": "projections", "attention": "auto", **more}
    record.part("variants", 110, lambda: _step(record, more), **labels)  # noqa: B023


def _step(record: Record, more: dict[str, str]) -> dict[str, Any]:
  """Estimates the memory of a row from two rows, then measures as many as fit."""
  size, d = models.size_of(record), models.device()
  device_mesh = models.one_mesh(d)
  spent: list[float] = []
  rows = 2

  with jax.set_mesh(device_mesh):
    config = models.config_of(size, 2, **more)
    held, places, tx = models.train_state(config, device_mesh)

    def compiled(rows: int) -> tuple[Any, Any, memory.Memory, Any, Any]:
      config = models.config_of(size, rows, **more)
      batch, segments = models.batch_of(config, device_mesh)
      step = setup.compile_step(build.model(config.model), tx, config, places)
      started = time.monotonic()
      lowered = step.lower(held, batch, jax.random.key(0))
      program = lowered.compile()
      spent.append(round(time.monotonic() - started, 1))
      return config, program, planned(lowered, program), batch, segments

    made = compiled(2)
    if not record.options.tiny:
      rows, made = fitting(made[2], 2), None
    for attempt in range(TRIES):
      try:
        config, program, plan, batch, segments = made or compiled(rows)

        def once() -> Any:
          nonlocal held
          held, metrics = program(held, batch, jax.random.key(0))  # noqa: B023
          return metrics["loss"]

        seconds = models.best(once)
        break
      except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or attempt == TRIES - 1 or rows <= 2:
          raise
        rows = max(2, int(rows * FEWER))
        if any(x.is_deleted() for x in jax.tree.leaves(held)):  # the step had taken them
          held = None
          held, places, tx = models.train_state(config, device_mesh)
    loss = float(once())
  rows_of = size.row_length * rows
  stage = config.optimizer.stage
  costs = flops.costs(config.model, lambda p: optimizer.group_of(p, stage) != optimizer.FROZEN)
  pairs = sum(
    int(n) * (int(n) + 1) // 2
    for row in segments
    for n in np.unique(row[row > 0], return_counts=True)[1]
  )
  needed = costs.step(rows_of, pairs, rows * size.images)
  return {
    "rows": rows,
    "row_length": size.row_length,
    "images": size.images,
    "lora_dropout": config.model.lora.dropout,
    "seconds": seconds,
    "tokens_per_s": rows_of / seconds,
    "of_peer": rows_of / seconds / (record.last("peer", "tokens_per_s") or float("nan")),
    "mfu": needed / seconds / models.peak_flops(record),
    "loss": loss,
    "compile_s": spent,
    "plan_gib": plan.total / models.GIB,
    "plan_parts_gib": {k: round(v / models.GIB, 3) for k, v in plan.parts.items()},
    "peak_gib": _peak_gib(),
  }


def planned(lowered: Any, program: Any) -> memory.Memory:
  """Returns the memory that `llava-sp plan` counts for a program."""
  found = program.memory_analysis()
  sizes = {f: getattr(found, f) for f in dir(found) if f.endswith("_in_bytes")}
  return memory.of_analysis({**sizes, "arguments": lower.argument_bytes(lowered, program)})


def fitting(plan: memory.Memory, rows: int) -> int:
  """Computes how many rows fit: temporaries grow with `rows`, the rest does not."""
  fixed = plan.total - plan.parts[memory.TEMPORARIES]
  each = plan.parts[memory.TEMPORARIES] / rows
  return max(rows, int((models.memory_limit() - fixed - SPARE) / each))


def _peak_gib() -> float | None:
  """Returns the peak memory of this process, if the device reports it."""
  peak = (models.device().memory_stats() or {}).get("peak_bytes_in_use")
  return None if peak is None else peak / models.GIB


def _vision(record: Record) -> dict[str, Any]:
  """Measures tower and projector forward, and the projector with its gradients."""
  size, d = models.size_of(record), models.device()
  count = 2 if record.options.tiny else 24
  config = models.config_of(size, 1, 0)
  module = build.compiled_for(build.model(config.model), d.platform, branches=False)
  shapes = flatten_dict(build.abstract(config.model), sep="/")
  dtype = jnp.dtype(config.model.dtype)
  shapes = {
    p: jax.ShapeDtypeStruct(s.shape, dtype)
    for p, s in shapes.items()
    if not p.startswith("language_model/")
  }
  with jax.set_mesh(models.one_mesh(d)):
    params = unflatten_dict(models.random_leaves(shapes, dict.fromkeys(shapes)), sep="/")
    pixels = jnp.ones((count, *[config.model.tower.image_size] * 2, 3), jnp.float32)

    def tower(params: Any, pixels: Any) -> Any:
      return module.apply({"params": params}, pixels, method=lambda m, x: m.vision_tower(x))

    def project(params: Any, grid: Any) -> Any:
      return module.apply({"params": params}, grid, method=lambda m, x: m.projector(x))

    def gradients(params: Any, grid: Any) -> Any:
      return jax.grad(lambda p: project(p, grid).astype(jnp.float32).sum())(params)["projector"]

    runs = [jax.jit(f) for f in (tower, project, gradients)]
    grid = runs[0](params, pixels)
    return {
      "images": count,
      "tower_s": models.best(lambda: runs[0](params, pixels)),
      "projector_s": models.best(lambda: runs[1](params, grid)),
      "projector_with_gradients_s": models.best(lambda: runs[2](params, grid)),
    }
