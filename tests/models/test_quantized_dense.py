"""Products in the codes of a kernel: against whole numbers in numpy, and as a layer of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build, flops
from llava_sp_jax.models.quantize import FORMATS
from llava_sp_jax.models.quantized_dense import PRODUCTS, QuantizedDense
from llava_sp_jax.training import step
from tests.conftest import ConfigMaker
from tests.data.mixed import make, mixed_config

KERNEL = np.random.default_rng(0).normal(0, 0.02, (96, 40)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2, 5, 96)).astype(np.float32)
X[0, 1] = 0  # padding has no scale
X[1, 2, 7] = 60.0  # an outlier
CODED = [name for name, (_, takes) in PRODUCTS.items() if takes]


def simple(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, name: str) -> np.ndarray:
  """One position after the other, in float64: x [T, I], codes [I, O], scale [O]."""
  largest = {"int8": 127.0, "fp8": 448.0}[name]
  out = np.zeros((len(x), codes.shape[1]))
  for t, row in enumerate(x):
    step = np.abs(row).max() / largest or 1.0
    rounded = row / np.float32(step)
    rounded = np.rint(rounded) if name == "int8" else rounded.astype(codes.dtype)
    out[t] = rounded.astype(np.float64) @ codes.astype(np.float64) * step * scale
  return out


@pytest.mark.parametrize("name", CODED)
def test_codes_are_multiplied(name: str) -> None:
  form = FORMATS[name]
  assert form is not None
  leaves = form.quantize(KERNEL)
  codes, scale = leaves["kernel_q"], leaves["kernel_scale"][0]
  dense = QuantizedDense(40, form, PRODUCTS[name][0], use_bias=False)
  found, pull = jax.vjp(lambda x: dense.apply({"params": leaves}, x), jnp.asarray(X))
  wanted = simple(X.reshape(10, 96), codes, scale, name)
  np.testing.assert_allclose(found.reshape(10, 40), wanted, rtol=1e-5, atol=1e-6)
  gradient = np.random.default_rng(2).normal(size=found.shape).astype(np.float32)
  ones = np.ones(96, np.float32)
  wanted = simple((gradient * scale).reshape(10, 40), codes.T, ones, name)
  np.testing.assert_allclose(pull(gradient)[0].reshape(10, 96), wanted, rtol=1e-5, atol=1e-6)
  exact = X @ form.dequantize(leaves, np.float32)
  ordinary = np.ones((2, 5), bool)
  ordinary[1, 2] = False  # all but the outlier of that position is rounded to coarse steps
  error = np.linalg.norm((found - exact)[ordinary]) / np.linalg.norm(exact[ordinary])
  assert error < {"int8": 0.01, "fp8": 0.03}[name]
  assert not np.any(found[0, 1])


@pytest.mark.parametrize("name", CODED)
def test_the_kernel_has_no_gradient_and_the_dtype_stays(name: str) -> None:
  dense = QuantizedDense(40, FORMATS[name], PRODUCTS[name][0], dtype=jnp.bfloat16)
  params = dense.init(jax.random.key(0), X)["params"]
  x = jnp.asarray(X, jnp.bfloat16)
  assert dense.apply({"params": params}, x).dtype == jnp.bfloat16

  def total(scale: jax.Array) -> jax.Array:
    return dense.apply({"params": {**params, "kernel_scale": scale}}, x).astype(jnp.float32).sum()

  assert not np.any(jax.grad(total)(params["kernel_scale"]))


def test_other_kernels_are_refused(tiny_config: ConfigMaker) -> None:
  config = tiny_config(model={"frozen_matmul": "int8"}).model
  with pytest.raises(config_lib.ConfigError, match=r"model\.quantize int8, found none"):
    build.model(config)
  config = dataclasses.replace(config, quantize="int8")
  assert build.model(config)
  assert build.unquantized(config).frozen_matmul == "float"
  assert build.answering(config, "int4", "").frozen_matmul == "float"
  assert build.answering(config, "int8", "").frozen_matmul == "int8"
  unknown = dataclasses.replace(config, frozen_matmul="int3")
  for use in (build.model, build.unquantized):
    with pytest.raises(config_lib.ConfigError, match=r"unknown 'int3'; known: float, fp8, int8"):
      use(unknown)


LEARNT = {"int8": "guard"}  # the others are slow


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=getattr(pytest.mark, LEARNT.get(n, "slow"))) for n in CODED]
)
def test_a_model_learns_nearly_what_it_learns_in_floats(
  name: str, tiny_config: ConfigMaker, tmp_path: Any
) -> None:
  """Loss and gradients of its adapters and projector, beside those of the same codes in floats."""
  config = mixed_config(tiny_config, tmp_path)
  batch = next(make(config.data, batch_size=4))
  batch = {key: x for key, x in batch.items() if key != "samples"}
  found: dict[str, Any] = {}
  params = None
  for product in ("float", name):
    model = dataclasses.replace(config.model, quantize=name, frozen_matmul=product)
    if params is None:
      params = jax.jit(lambda model=model: build.initialize(model, jax.random.key(0)))()
      params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.02 if path[-1].key == "lora_b" else x, params
      )
    module = build.model(model)

    def loss(trainable: Any, frozen: Any, module: Any = module) -> jax.Array:
      flat = {**frozen, **trainable}
      return step.loss_sums(module, flat, {}, batch, 512)["loss"]

    flat = flatten_dict(params, sep="/")
    learned = ("/lora_a", "/lora_b")
    trainable = {p: x for p, x in flat.items() if p.endswith(learned) or p.startswith("projector")}
    frozen = {p: x for p, x in flat.items() if p not in trainable}
    found[product] = jax.jit(jax.value_and_grad(loss))(trainable, frozen)
  (exact, wanted), (value, grads) = found["float"], found[name]
  assert value != exact
  assert abs(value / exact - 1) < 1e-3
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (wanted, grads))
  assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995


def test_useful_work_is_that_of_floats(tiny_config: ConfigMaker) -> None:
  """So an MFU compares them with the peak of bfloat16."""
  config = tiny_config().model
  coded = dataclasses.replace(config, quantize="int8", frozen_matmul="int8")
  assert flops.costs(coded, lambda path: "lora" in path) == flops.costs(
    config, lambda path: "lora" in path
  )
