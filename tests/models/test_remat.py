"""What a layer keeps of its attention for the backward pass: all that is needed, each array once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from llava_sp_jax.models import build
from llava_sp_jax.models.attention import SAVED_PRIMITIVE
from tests.conftest import ConfigMaker

B, T = 2, 128
# (platform, the forward kernel's name in what is traced)
KERNELS = {
  "xla": ("cpu", "exp"),
  "splash": ("cpu", "pallas_call"),
  "flash": ("cpu", "pallas_call"),
  "cudnn": ("gpu", SAVED_PRIMITIVE),
  "cudnn_packed": ("gpu", SAVED_PRIMITIVE),
}


def equations(jaxpr: Any) -> Iterator[Any]:
  """Of a traced function, and of all that it calls for a result."""
  for equation in jaxpr.eqns:
    if not equation.outvars:
      continue  # the compiler drops it
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def traced(tiny_config: ConfigMaker, name: str, policy: str) -> Any:
  """The gradient of a decoder whose layers are scanned, in bfloat16."""
  sizes = {"width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8}
  model = tiny_config(
    model={"language_model": sizes, "dtype": "bfloat16", "remat": policy, "lora": {"rank": 0}}
  ).model
  shapes = build.abstract(model)["language_model"]
  module = build.model(dataclasses.replace(model, attention=name))
  decoder = build.compiled_for(module, KERNELS[name][0], False, samples=3).language_model

  def loss(params: Any, embeds: Any, ids: Any) -> Any:
    hidden: Any = decoder.apply({"params": params}, embeds, ids, ids)
    return hidden[0].astype(jnp.float32).sum()

  embeds = jax.ShapeDtypeStruct((B, T, 32), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
  return jax.make_jaxpr(jax.grad(loss))(shapes, embeds, ids).jaxpr


@pytest.fixture
def a_gpu_of_paper(monkeypatch: pytest.MonkeyPatch) -> None:
  """What jax asks of a GPU before it traces cuDNN's attention."""
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.usefixtures("a_gpu_of_paper")
@pytest.mark.parametrize("name", KERNELS)
def test_attention_is_computed_once_and_kept_once(tiny_config: ConfigMaker, name: str) -> None:
  """Queries, keys, values, output and the layer's input: five arrays of a layer's activations."""
  jaxpr = traced(tiny_config, name, "attention")
  forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
  layers = forward.params["length"]
  sizes = [v.aval.size for v in forward.outvars if v.aval.dtype == jnp.bfloat16]
  kept = [size for size in sizes if size == layers * B * T * 32]
  assert len(kept) == 5
  (again,) = [e for e in equations(jaxpr) if e.primitive.name in ("remat2", "checkpoint")]
  names = [e.primitive.name for e in equations(again.params["jaxpr"])]
  # XLA: softmax; kernels of TPUs: gradients.
  kernels = {"xla": 1, "splash": 1, "flash": 1}.get(name, 0)
  assert names.count(KERNELS[name][1]) == kernels


@pytest.mark.usefixtures("a_gpu_of_paper")
def test_full_recomputation_keeps_nothing_of_it(tiny_config: ConfigMaker) -> None:
  jaxpr = traced(tiny_config, "cudnn", "full")
  assert sum(e.primitive.name == SAVED_PRIMITIVE for e in equations(jaxpr)) == 2
