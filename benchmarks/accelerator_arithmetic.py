"""Measures speed and accuracy of the device's arithmetic, against jax on the CPU."""

from __future__ import annotations

from typing import Any

import accelerator_models as models
import jax
import jax.numpy as jnp
import numpy as np
from accelerator_record import Record
from flax import linen as nn
from flax.traverse_util import flatten_dict

from llava_sp_jax.data import packing
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import attention, build
from llava_sp_jax.training import measure, state, step

# (dtype, model.matmul_precision) of square products.
PRODUCTS = (("bfloat16", "default"), ("float32", "default"), ("float32", "highest"))


def rates(record: Record) -> None:
  """Measures TFLOP/s of large products and GB/s of reading, and the memory that programs may use."""
  d = models.device()
  record.say(
    "rates",
    device=d.device_kind,
    memory_gib=models.memory_limit() / models.GIB,
    peak_tflops=models.peak_flops(record) / 1e12,
  )
  size = 256 if record.options.tiny else 8192

  def product(dtype: str, precision: str) -> dict[str, Any]:
    x = jnp.ones((size, size), dtype)
    run = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    return {"tflops": 2 * size**3 / models.best(lambda: run(x), 5) / 1e12}

  for dtype, precision in PRODUCTS:
    record.part("rates", 20, lambda: product(dtype, precision), product=dtype, precision=precision)  # noqa: B023

  def read() -> dict[str, Any]:
    wide = jnp.ones((1 << 16 if record.options.tiny else 1 << 24, 64), jnp.float32)
    run = jax.jit(lambda x: x.sum())
    return {"read_gb_s": wide.nbytes / models.best(lambda: run(wide), 5) / 1e9}

  record.part("rates", 20, read)


def correct(record: Record) -> None:
  """Compares loss, logits and gradients by part in each arithmetic and attention."""
  size = models.SIZES["tiny" if record.options.tiny else "small"]
  platform = models.device().platform
  cases = [
    ("float32", {"matmul_precision": "default"}),
    ("float32", {}),
    *(("bfloat16", {"attention": name}) for name in attention.PLATFORMS.get(platform, ("xla",))),
  ]
  config = models.config_of(size, 2, dropout=0.0, dtype="float32")
  values = _values(config)
  reference = _computed(config, jax.devices("cpu")[0], values)
  record.say("correct", case="float32 on the CPU", loss=reference[0])
  for dtype, more in cases:
    case = " ".join([dtype, *(f"{k}={v}" for k, v in more.items())])

    def compare(dtype: str = dtype, more: dict[str, str] = more) -> dict[str, Any]:
      config = models.config_of(size, 2, dropout=0.0, dtype=dtype, **more)
      return _compared(_computed(config, models.device(), values), reference)

    record.part("correct", 40, compare, case=case)


def _values(config: Any) -> dict[str, np.ndarray]:
  """Makes random float32 parameters by path, on the host; adapters as small as trained ones."""
  rng, values = np.random.default_rng(0), {}
  for path, s in flatten_dict(build.abstract(config.model), sep="/").items():
    fan = s.shape[-2] if len(s.shape) > 1 else 2500
    size = fan**-0.5 * (0.1 if path.endswith("lora_b") else 1.0)
    made = rng.standard_normal(s.shape, np.float32) * np.float32(size)
    values[path] = made + np.float32(path.endswith("/scale"))
  return values


def _computed(config: Any, where: Any, values: Any) -> tuple[float, dict[str, Any], np.ndarray]:
  """Computes loss, gradients by path, and logits at every 37th position, on one device."""
  device_mesh = models.one_mesh(where)
  samples = packing.most_samples(config.data)
  module = build.compiled_for(build.model(config.model), where.platform, False, samples)

  def run(held: Any, batch: Any, rng: Any) -> Any:
    with nn.logical_axis_rules(sharding.activation_rules()):
      sums, grads = step.gradients(module, config.train, held, batch, rng)
      variables = {"params": state.join(held.trainable, held.frozen)}
      hidden = module.apply(
        variables,
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        batch["images"],
        batch["slots"],
      )
      return sums, grads, module.apply(variables, hidden[:, ::37], method="logits")

  with jax.set_mesh(device_mesh):
    held, places, _ = models.train_state(config, device_mesh, values)
    batch, _ = models.batch_of(config, device_mesh)
    rng = jax.device_put(jax.random.key(0), places.step)
    sums, grads, logits = jax.device_get(jax.jit(run)(held, batch, rng))
  found = {path: np.asarray(g, np.float64) for path, g in grads.items()}
  return float(sums["loss"] / sums["count"]), found, np.asarray(logits, np.float64)


def _compared(ours: Any, reference: Any) -> dict[str, Any]:
  """Computes norms of differences, divided by the norm of the reference."""
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for path, grad in ours[1].items():
    parts.setdefault(measure.part_of(path), []).append((grad.ravel(), reference[1][path].ravel()))
  errors = {}
  for part, pairs in sorted(parts.items()):
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    errors[f"gradient_error_{part}"] = _distance(a, b)
  return {
    "loss": ours[0],
    "loss_error": abs(ours[0] - reference[0]),
    "logits_error": _distance(ours[2], reference[2]),
    **errors,
  }


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
