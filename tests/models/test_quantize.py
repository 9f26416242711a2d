"""Formats against a plain numpy reading of the paper; the dense class; gradients; memory; sharding."""

from __future__ import annotations

import dataclasses
import functools
from statistics import NormalDist

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, PartitionSpec

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.models.lora import LoraRecipe
from llava_sp_jax.models.quantize import (
  FORMATS,
  NF4_LEVELS,
  is_quantized,
  leaf_shapes,
)
from llava_sp_jax.models.quantized_dense import QuantizedDense

REAL = {name: form for name, form in FORMATS.items() if form}
KERNEL = np.random.default_rng(0).normal(0, 0.02, (256, 48)).astype(np.float32)
KERNEL[:, 3] = 0  # an output that is always zero has no scale
KERNEL[5, 4] = 1.0  # an outlier
X = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32)
# XLA may contract the product and sum that give a double-quantised scale, or a value of int4; all
# else is exact.
ROUNDING = dict.fromkeys(REAL, 0.0) | dict.fromkeys(("nf4_double", "int4", "int4_64"), 1e-6)


def paper_levels() -> np.ndarray:
  """QLoRA's data type from its definition: quantiles of N(0, 1), 8 below zero and 9 from it on.

  Each half runs to the quantile 0.9677083, the mean of 1 - 1/32 and 1 - 1/30.
  """
  quantile, offset = NormalDist().inv_cdf, (1 - 1 / 32 + 1 - 1 / 30) / 2
  positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  values = np.sort([*negative, 0.0, *positive])
  return values / np.abs(values).max()


def test_levels_are_those_of_the_paper() -> None:
  np.testing.assert_allclose(NF4_LEVELS, paper_levels(), atol=3e-7)  # published in float32
  assert len(NF4_LEVELS) == 16
  assert NF4_LEVELS[7] == 0


def simple_nf4(kernel: np.ndarray) -> np.ndarray:
  """The paper's quantisation and its inverse, one value at a time."""
  out = np.zeros_like(kernel)
  for column in range(kernel.shape[1]):
    for start in range(0, kernel.shape[0], 64):
      block = kernel[start : start + 64, column]
      scale = np.abs(block).max()
      for i, value in enumerate(block):
        distance = np.abs(np.asarray(NF4_LEVELS, np.float32) - value / (scale or 1))
        out[start + i, column] = np.float32(NF4_LEVELS[int(distance.argmin())]) * scale
  return out


def test_nf4_is_the_nearest_level_of_each_block() -> None:
  form = REAL["nf4"]
  np.testing.assert_array_equal(
    form.dequantize(form.quantize(KERNEL), np.float32), simple_nf4(KERNEL)
  )


def test_every_code_is_packed_and_found_again() -> None:
  kernel = np.tile(np.asarray(NF4_LEVELS, np.float32), 8)[:, None] * np.asarray([[1.0, 3.0]], "f")
  kernel = np.random.default_rng(2).permuted(kernel, axis=0)
  kernel[::64] = [1.0, 3.0]  # the largest of each block
  leaves = REAL["nf4"].quantize(kernel)
  assert leaves["kernel_q"].shape == (64, 2)
  assert leaves["kernel_q"].dtype == np.uint8
  np.testing.assert_array_equal(REAL["nf4"].dequantize(leaves, np.float32), kernel)


@pytest.mark.parametrize("name", ["int8", "int8_block"])
def test_int8_is_within_half_a_step(name: str) -> None:
  form = REAL[name]
  leaves = form.quantize(KERNEL)
  step = np.repeat(leaves["kernel_scale"], 256 // len(leaves["kernel_scale"]), axis=0)
  error = np.abs(form.dequantize(leaves, np.float32) - KERNEL)
  assert (error <= step * (0.5 + 1e-5)).all()  # and the float32 rounding of the product
  assert np.abs(leaves["kernel_q"]).max() == 127
  assert not error[:, 3].any()


@pytest.mark.parametrize(
  ("name", "error"),
  [("int8", 0.009), ("int8_block", 0.006), ("fp8", 0.026), ("nf4", 0.092), ("nf4_double", 0.092)],
)
def test_the_error_of_a_normal_kernel_is_that_of_the_docs(name: str, error: float) -> None:
  kernel = np.random.default_rng(3).normal(0, 0.02, (4096, 64)).astype(np.float32)
  found = REAL[name].dequantize(REAL[name].quantize(kernel), np.float32)
  assert np.sqrt(np.mean((found - kernel) ** 2)) / 0.02 == pytest.approx(error, abs=6e-4)


@pytest.mark.parametrize(("name", "error"), [("int4", 0.079), ("int4_64", 0.091)])
def test_int4_is_the_nearest_of_16_levels_from_the_lowest_to_the_highest(
  name: str, error: float
) -> None:
  """Levels are even, rounded to bfloat16 as a whole; the RMS of the error is that of the docs."""
  form = REAL[name]
  kernel = np.random.default_rng(3).normal(0, 0.02, (4096, 64)).astype(np.float32)
  leaves = form.quantize(kernel)
  scale, low = (leaves[f"kernel_{n}"].astype(np.float32)[:, None] for n in ("scale", "low"))
  blocks = kernel.reshape(-1, form.block, 64)
  np.testing.assert_allclose(low[:, 0], blocks.min(1), rtol=2**-8)
  np.testing.assert_allclose(scale[:, 0], np.ptp(blocks, axis=1) / 15, rtol=2**-8)
  levels = low[:, None] + np.arange(16)[None, :, None, None] * scale[:, None]
  nearest = np.abs(levels - blocks[:, None]).min(1)
  found = form.dequantize(leaves, np.float32)
  np.testing.assert_allclose(np.abs(found.reshape(blocks.shape) - blocks), nearest, atol=1e-8)
  assert np.sqrt(np.mean((found - kernel) ** 2)) / 0.02 == pytest.approx(error, abs=2e-3)


def test_double_quantization_loses_little_more() -> None:
  """The scales are within half a step of 1/254 of their range, and values are the nearest again."""
  single, double = REAL["nf4"], REAL["nf4_double"]
  kernel = np.delete(KERNEL, [3, 4], axis=1)
  one, two = (f.dequantize(f.quantize(kernel), np.float32) for f in (single, double))
  errors = [np.sqrt(np.mean((x - kernel) ** 2)) / kernel.std() for x in (one, two)]
  assert errors[0] < 0.095
  assert errors[1] < errors[0] * 1.01
  leaves = double.quantize(kernel)
  scale = leaves["kernel_scale"] * leaves["kernel_scale_scale"] + leaves["kernel_scale_middle"]
  true = np.abs(kernel.reshape(4, 64, -1)).max(1)
  assert (np.abs(scale - true) <= leaves["kernel_scale_scale"] * 0.501).all()


@pytest.mark.parametrize("name", REAL)
def test_numpy_and_jax_agree_to_the_bit(name: str) -> None:
  """Loading quantises in numpy, a module's own initialisation in jax."""
  form = REAL[name]
  there, here = form.quantize(jnp.asarray(KERNEL)), form.quantize(KERNEL)
  assert there.keys() == here.keys()
  for key in here:
    np.testing.assert_array_equal(there[key], here[key], err_msg=key)
    assert there[key].dtype == here[key].dtype
    assert leaf_shapes(form, KERNEL.shape)[key].shape == here[key].shape
    assert is_quantized(f"language_model/layers/q_proj/{key}")
  jitted = jax.jit(functools.partial(form.dequantize, dtype=jnp.float32))(there)
  np.testing.assert_allclose(jitted, form.dequantize(here, np.float32), rtol=ROUNDING[name])


@pytest.mark.parametrize(
  ("name", "bits"),
  [
    ("int8", 8.125),
    ("int8_block", 8.5),
    ("int4", 5),
    ("int4_64", 4.5),
    ("nf4", 4.5),
    ("nf4_double", 4.375),
  ],
)
def test_bits_per_value(name: str, bits: float) -> None:
  """Of a kernel with 256 inputs; the scales of a whole output weigh less in longer ones."""
  leaves = REAL[name].quantize(KERNEL)
  assert sum(x.nbytes for x in leaves.values()) * 8 / KERNEL.size == bits


@pytest.mark.parametrize("name", REAL)
def test_dense_computes_with_the_dequantized_kernel(name: str) -> None:
  form = REAL[name]
  dense = QuantizedDense(48, form)
  params = {**form.quantize(jnp.asarray(KERNEL)), "bias": jnp.arange(48.0)}
  plain = {"kernel": form.dequantize(params, jnp.float32), "bias": params["bias"]}
  ours = jax.jit(dense.apply)({"params": params}, X)
  plainly = jax.jit(nn.Dense(48).apply)({"params": plain}, X)
  np.testing.assert_allclose(ours, plainly, rtol=ROUNDING[name], atol=ROUNDING[name])
  fresh = dense.init(jax.random.key(0), X)["params"]
  assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
    lambda x: (x.shape, x.dtype), params
  )
  assert float(jnp.std(form.dequantize(fresh, jnp.float32))) == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("name", REAL)
def test_gradients_reach_activations_only(name: str) -> None:
  form = REAL[name]
  dense = QuantizedDense(48, form, use_bias=False)
  params = form.quantize(jnp.asarray(KERNEL))
  floats = {k: v for k, v in params.items() if v.dtype == jnp.float32}

  def total(x: jax.Array, floats: dict) -> jax.Array:
    return jnp.sum(dense.apply({"params": {**params, **floats}}, x) ** 2)

  dx, dscale = jax.grad(total, argnums=(0, 1))(jnp.asarray(X), floats)
  kernel = form.dequantize(params, jnp.float32)
  np.testing.assert_allclose(dx, 2 * (X @ kernel) @ kernel.T, rtol=2e-4, atol=2e-4)
  assert not any(np.any(g) for g in dscale.values())


@pytest.mark.parametrize("name", REAL)
def test_no_float_kernel_waits_for_the_backward_pass(name: str) -> None:
  dense = LoraRecipe(4, 8.0, base=functools.partial(QuantizedDense, form=REAL[name])).dense()(48)
  params = dense.init(jax.random.key(0), X)["params"]
  assert {"lora_a", "lora_b", "kernel_q", "kernel_scale", "bias"} <= set(params)
  adapters = {k: v for k, v in params.items() if k.startswith("lora")}

  def total(adapters: dict, x: jax.Array) -> jax.Array:
    return jnp.sum(dense.apply({"params": {**params, **adapters}}, x) ** 2)

  kept = jax.tree.leaves(jax.vjp(total, adapters, jnp.asarray(X))[1])
  assert kept
  assert not [a for a in kept if a.size >= KERNEL.size and a.dtype == jnp.float32]


TEXT = config_lib.LanguageModelConfig(
  vocab_size=64, width=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_width=128
)


def model(quantize: str, rank: int = 4) -> config_lib.ModelConfig:
  return config_lib.ModelConfig(
    tower=config_lib.TowerConfig(
      image_size=24, patch_size=4, width=16, layers=2, heads=2, mlp_width=16
    ),
    language_model=TEXT,
    projector=config_lib.ProjectorConfig(variant="none"),
    dtype="float32",
    lora=config_lib.LoraConfig(rank=rank),
    quantize=quantize,
  )


def quantized(flat: dict, form: str) -> dict:
  """Float parameters of the whole model with the decoder's stacked kernels quantised."""
  result = {}
  for path, leaf in flat.items():
    stem, _, last = path.rpartition("/")
    if "language_model/layers/" in path and last == "kernel":
      leaves = jax.vmap(REAL[form].quantize)(leaf)
      result |= {f"{stem}/{name}": x for name, x in leaves.items()}
    else:
      result[path] = leaf
  return result


@pytest.fixture(scope="module")
def floats() -> dict:
  """Parameters of the unquantised model, with adapters that do something."""
  tree = jax.jit(functools.partial(build.initialize, model("none")))(jax.random.key(0))
  flat = flatten_dict(tree, sep="/")
  return {p: x + 0.02 if p.endswith("lora_b") else x for p, x in flat.items()}


def logits(quantize: str, flat: dict) -> jax.Array:
  module = build.model(model(quantize))
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)))
  index = jnp.broadcast_to(jnp.arange(16), tokens.shape)

  def run(params: dict) -> jax.Array:
    variables = {"params": params}
    none = jnp.full_like(index, -1)
    hidden, _ = module.apply(
      variables, tokens, index, jnp.ones_like(index), None, none, None, method="extend"
    )
    return module.apply(variables, hidden, method="logits")

  return jax.jit(run)(unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize(
  ("name", "bound"),
  [
    ("int8", 0.03),
    ("int8_block", 0.03),
    ("int4", 0.35),
    pytest.param("int4_64", 0.35, marks=pytest.mark.slow),
    ("nf4", 0.35),
    pytest.param("nf4_double", 0.35, marks=pytest.mark.slow),
  ],
)
def test_logits_stay_near_those_of_the_float_model(name: str, bound: float, floats: dict) -> None:
  """RMS of the difference over RMS of the logits; three layers, scan and remat.

  Random kernels differ by 0.9% (int8) and 9.2% (NF4) of their RMS, and with random weights the
  branches outweigh the residual stream, so that the errors of all 21 kernels add up: measured
  0.020 and 0.31.
  """
  params = quantized(floats, name)
  assert {p: x.shape for p, x in params.items()} == {
    p: s.shape for p, s in flatten_dict(build.abstract(model(name)), sep="/").items()
  }
  want = logits("none", floats)
  difference = float(jnp.linalg.norm(logits(name, params) - want) / jnp.linalg.norm(want))
  assert 1e-4 < difference < bound


@pytest.mark.parametrize("name", REAL)
def test_sharded_is_the_same(name: str, floats: dict) -> None:
  """Every leaf lies along its kernel's axes; the scales of whole outputs are cut along outputs."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  params = quantized(floats, name)
  places = sharding.shardings(params, mesh)
  down = "language_model/layers/down_proj/kernel_"
  assert places[down + "q"].spec == PartitionSpec(None, "tensor", "fsdp")
  assert places[down + "scale"].spec[2] == "fsdp"
  with jax.set_mesh(mesh):
    there = logits(name, jax.tree.map(jax.device_put, params, places))
  np.testing.assert_allclose(there, logits(name, params), rtol=1e-4, atol=1e-4)


def test_a_format_that_does_not_fit_is_an_error() -> None:
  odd = dataclasses.replace(
    model("nf4"), language_model=dataclasses.replace(TEXT, mlp_width=100, head_dim=12)
  )
  with pytest.raises(config_lib.ConfigError) as error:
    build.model(odd)
  assert str(error.value) == (
    "model.quantize nf4: blocks of 64 do not divide model.language_model's heads * head_dim 48, "
    "mlp_width 100; use int8, which has none, or other sizes"
  )
  with pytest.raises(
    config_lib.ConfigError, match="unknown 'fp4'; known: fp8, int4, int4_64, int8, int8_"
  ):
    build.model(model("fp4"))


def test_parameters_are_counted_as_numbers_not_bytes() -> None:
  assert build.parameter_counts(model("nf4")) == build.parameter_counts(model("none"))
