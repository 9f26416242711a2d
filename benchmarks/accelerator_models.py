"""Makes configs, random parameters and batches of the accelerator benchmark."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_record import Record
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax import hardware as devices
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.models.layers import BRANCHES
from llava_sp_jax.models.quantize import is_quantized
from llava_sp_jax.training import optimizer, state

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Size:
  """A model and its workload; missing config keys are those of a 7B model."""

  model: dict[str, Any]
  rank: int  # of its adapters
  row_length: int
  images: int  # of a row
  prompt: int  # positions, of decoding and prefill
  steps: int  # of decoding, for each measurement
  batches: tuple[int, ...]  # that are decoded
  questions: int


CROPPING = {"variant": "cropping"}
SIZES = {
  # Vicuna 7B and CLIP L/14 at 336 pixels.
  "7b": Size({"projector": CROPPING}, 128, 2048, 3, 640, 32, (64, 8, 1), 96),
  # TinyLlama's decoder, for devices with less memory.
  "1b": Size({"projector": CROPPING, "language_model": {
    "width": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "head_dim": 64, "mlp_width": 5632,
  }}, 128, 2048, 3, 640, 32, (64, 8, 1), 96),
  # Small enough to compare every figure with a CPU's.
  "small": Size({
    "tower": {"image_size": 112, "width": 256, "layers": 4, "heads": 4, "mlp_width": 1024},
    "language_model": {"vocab_size": 4096, "width": 512, "layers": 4, "heads": 4, "kv_heads": 4,
                       "mlp_width": 1408},
    "projector": {"variant": "cropping", "token_width": 128},
  }, 8, 512, 3, 64, 8, (2,), 4),
  "tiny": Size({
    "tower": {"image_size": 84, "width": 16, "layers": 2, "heads": 2, "mlp_width": 32},
    "language_model": {"vocab_size": 1024, "width": 32, "layers": 1, "heads": 2, "kv_heads": 2,
                       "head_dim": 16, "mlp_width": 64, "max_positions": 512},
    "projector": {"variant": "cropping", "token_width": 16, "scales": (3, 6)},
  }, 4, 128, 2, 32, 2, (2,), 4),
}  # fmt: skip
ROOM_OF_7B = 40 * GIB  # of the device's memory


def size_of(record: Record) -> Size:
  """Chooses the size for measurements of speed."""
  name = record.options.size
  if name == "auto":
    name = "7b" if memory_limit() > ROOM_OF_7B else "1b"
  return SIZES["tiny" if record.options.tiny else name]


def device() -> Any:
  return jax.devices()[0]


def memory_limit() -> int:
  """Returns the bytes that programs may use; 8 GiB if the device does not report them (a CPU)."""
  return int((device().memory_stats() or {}).get("bytes_limit", 8 * GIB))


def peak_flops(record: Record) -> float:
  """Returns the dense bf16 FLOP/s; nan if neither `hardware` nor `--peak` has them."""
  known = record.options.peak or devices.peak_tflops(device().device_kind)
  return known * 1e12 if known else float("nan")


def one_mesh(of: Any) -> Any:
  return mesh_lib.create(config_lib.MeshConfig(), devices=[of])


def best(run: Callable[[], Any], times: int = 3) -> float:
  """Returns the seconds of the fastest of some calls, after one that compiles."""
  jax.block_until_ready(run())
  found = []
  for _ in range(times):
    started = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - started)
  return min(found)


def config_of(
  size: Size, rows: int = 1, rank: int | None = None, dropout: float = 0.05, **model: Any
) -> Any:
  """Makes a config to finetune `size` with adapters (or to answer, with rank 0), in bfloat16 by
  default.
  """
  rank = size.rank if rank is None else rank
  values = {"dtype": "bfloat16", **model}
  return config_lib.from_dict(
    {
      "name": "accelerator",
      "model": {
        **size.model,
        "lora": {"rank": rank, "alpha": 2.0 * rank, "dropout": dropout},
        "frozen_dtype": values["dtype"],
        **values,
      },
      "data": {
        "row_length": size.row_length,
        "packing": "first_fit",
        "images_per_row": size.images,
        "samples_per_row": size.images,  # as `batch_of` makes them
        "threads": 8,
      },
      "train": {"steps": 100, "batch_size": rows},
    }
  )


@functools.cache
def _maker(kind: str, shape: tuple[int, ...], dtype: Any, place: Any) -> Callable[..., jax.Array]:
  """Returns a function from a key to a random leaf, made on the device without a float32 copy."""

  def run(key: jax.Array) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):  # codes of a quantized kernel
      low = 0 if dtype == jnp.uint8 else -100
      return jax.random.randint(key, shape, low, 100, jnp.int32).astype(dtype)
    if kind.startswith("kernel_scale"):
      return jnp.full(shape, 0.02 / 64, dtype)
    if kind == "scale":  # of a norm
      return jnp.ones(shape, dtype)
    fan = shape[-2] if len(shape) > 1 else 2500
    made = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    return (jax.random.normal(key, shape, made) * fan**-0.5).astype(dtype)

  return jax.jit(run, out_shardings=place)


def random_leaves(shapes: dict[str, Any], places: dict[str, Any]) -> dict[str, jax.Array]:
  made = {}
  for i, (path, s) in enumerate(sorted(shapes.items())):
    name = path.rpartition("/")[2]
    kind = name if "scale" in name else "values"
    made[path] = _maker(kind, s.shape, s.dtype, places[path])(jax.random.key(i))
  return made


def answering_params(config: Any, device_mesh: Any) -> Any:
  """Makes nested random parameters in the dtype of the computation, or quantized."""
  tree = build.abstract(config.model)
  places = flatten_dict(sharding.shardings(tree, device_mesh), sep="/")
  dtype = jnp.dtype(config.model.dtype)
  shapes = {
    p: s if is_quantized(p) else jax.ShapeDtypeStruct(s.shape, dtype)
    for p, s in flatten_dict(tree, sep="/").items()
  }
  return unflatten_dict(random_leaves(shapes, places), sep="/")


def train_state(config: Any, device_mesh: Any, values: Any = None) -> tuple[Any, Any, Any]:
  """Returns state at step 0, its shardings, and the optimizer, of random leaves or `values` by
  path.
  """
  shapes = build.abstract(config.model)
  trainable, frozen = jax.eval_shape(functools.partial(state.split, config=config), shapes)
  tx = optimizer.build(config.optimizer, config.train.steps, list(trainable))
  whole = jax.eval_shape(functools.partial(state.start, tx=tx), trainable, frozen)
  places = sharding.shardings(whole, device_mesh, config.mesh.base)

  def make(tree: Any, where: Any) -> Any:
    if values is None:
      return random_leaves(tree, where)
    return {p: jax.device_put(values[p].astype(s.dtype), where[p]) for p, s in tree.items()}

  masters, stays = make(trainable, places.trainable), make(frozen, places.frozen)
  moments = jax.jit(tx.init, out_shardings=places.opt_state)(masters)
  first = jax.device_put(jnp.zeros((), jnp.int32), places.step)
  return state.TrainState(first, masters, stays, moments), places, tx


def batch_of(config: Any, device_mesh: Any) -> tuple[Any, np.ndarray]:
  """Makes full rows of several samples, each with one image, like data.packing=first_fit.

  The placed batch, and its segments [B, T] on the host.
  """
  rng = np.random.default_rng(0)
  rows, length = config.train.batch_size, config.data.row_length
  count, each = config.data.images_per_row, build.image_token_count(config.model)
  side, vocabulary = config.model.tower.image_size, config.model.language_model.vocab_size
  slots = np.full((rows, length), -1, np.int32)
  segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
  bounds = np.linspace(0, length, count + 1).astype(int)
  for n, (a, b) in enumerate(itertools.pairwise(bounds)):
    start = min(a + 4, b - each)
    slots[:, start : start + each] = n * each + np.arange(each)
    segments[:, a:b], positions[:, a:b] = (n + 1) * BRANCHES, np.arange(b - a)
  arrays = {
    "tokens": rng.integers(0, vocabulary, (rows, length), dtype=np.int32),
    "targets": rng.integers(0, vocabulary, (rows, length), dtype=np.int32),
    "weights": ((slots < 0) & (rng.random((rows, length)) < 0.5)).astype(np.float32),
    "positions": positions,
    "segments": segments,
    "slots": slots,
    "images": rng.standard_normal((rows, count, side, side, 3), np.float32),
  }
  return mesh_lib.put_batch(arrays, device_mesh), segments
