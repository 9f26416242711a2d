"""Multiplies activations by frozen quantized kernels, in floats or in the numbers of the kernel.

Only activations have gradients. Products of int8 take half the time of bfloat16 on TPUs from v5e on
and on GPUs, those of fp8 on GPUs from Hopper on.

Shape letters:  I inputs of the kernel (contracted) . O outputs . N blocks along I
Source: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339), section 2, without its mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, PRNGKeyArray, Shaped

from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.quantize import INT8, Format, leaf_shapes, symmetric

Leaves = Mapping[str, Shaped[Array, "_N O"]]
# Maps (format, x, arrays of the kernel) to x times the kernel, in the dtype of x.
Product = Callable[[Any, Float[Array, "*B I"], Leaves], Float[Array, "*B O"]]


def in_floats(form: Format, x: Float[Array, "*B I"], leaves: Leaves) -> Float[Array, "*B O"]:
  """Dequantizes the kernel where it is used, and again for the gradient of `x`.

  So no float copy of it is kept from the forward to the backward pass.
  """

  def multiply(x: Float[Array, "*B I"], leaves: Leaves) -> Float[Array, "*B O"]:
    result: jax.Array = x @ form.dequantize(jax.lax.stop_gradient(leaves), x.dtype)
    return result

  result: jax.Array = jax.checkpoint(multiply, prevent_cse=False)(x, leaves)
  return result


def in_codes(form: Format, x: Float[Array, "*B I"], leaves: Leaves) -> Float[Array, "*B O"]:
  """Quantizes each position of `x` with a scale of its own, and multiplies codes.

  The gradient of `x` is computed so, too: the incoming gradient times the scales of the outputs is
  quantized, and multiplied by the transposed codes. `form` must have one scale for each output.
  """
  del form
  result: jax.Array = _multiplied(x, leaves["kernel_q"], leaves["kernel_scale"])
  return result


@jax.custom_vjp
def _multiplied(
  x: Float[Array, "*B I"], codes: Shaped[Array, "I O"], scale: Float32[Array, "1 O"]
) -> Float[Array, "*B O"]:
  result: jax.Array = _contracted(x.astype(jnp.float32), codes, 0) * scale[0]
  return result.astype(x.dtype)


def _contracted(x: Float32[Array, "*B I"], codes: Shaped[Array, "_I _O"], axis: int) -> Any:
  """Multiplies x by codes, of which `axis` is contracted. The result is float32 [*B, other axis]."""
  rounded, scale = symmetric(x, -1, codes.dtype)
  summed = jax.lax.dot_general(
    rounded,
    codes,
    (((x.ndim - 1,), (axis,)), ((), ())),
    preferred_element_type=jnp.int32 if codes.dtype == INT8 else jnp.float32,
  )
  return summed.astype(jnp.float32) * scale


def _forward(
  x: Float[Array, "*B I"], codes: Shaped[Array, "I O"], scale: Float32[Array, "1 O"]
) -> tuple[Float[Array, "*B O"], tuple[Shaped[Array, "I O"], Float32[Array, "1 O"]]]:
  return _multiplied(x, codes, scale), (codes, scale)


def _backward(
  kept: tuple[Shaped[Array, "I O"], Float32[Array, "1 O"]], gradient: Float[Array, "*B O"]
) -> tuple[Float[Array, "*B I"], None, None]:
  codes, scale = kept
  # Without the barrier, XLA may convert to float32 before it changes the layout, at twice the bytes.
  gradient = jax.lax.optimization_barrier(gradient)
  wide: jax.Array = _contracted(gradient.astype(jnp.float32) * scale[0], codes, 1)
  return wide.astype(gradient.dtype), None, None


_multiplied.defvjp(_forward, _backward)

FLOAT = "float"
# Rows of `model.frozen_matmul`: the product, and the rows of `model.quantize` that it takes (all: ()).
PRODUCTS: dict[str, tuple[Product, tuple[str, ...]]] = {
  FLOAT: (in_floats, ()),
  "int8": (in_codes, ("int8",)),
  "fp8": (in_codes, ("fp8",)),
}


class QuantizedDense(nn.Module):
  """Computes `nn.Dense` with a quantized kernel of `form`, multiplied by `product`."""

  features: int
  form: Format
  product: Product = in_floats
  use_bias: bool = True
  dtype: DTypeLike | None = None
  kernel_init: Any = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B {self.features}"]:
    shape = (x.shape[-1], self.features)
    # All leaves are made from the same random kernel, so they share a key.
    key = self.make_rng("params") if self.is_initializing() else jax.random.key(0)

    def leaf(name: str) -> Shaped[Array, "N O"]:
      def init(_: PRNGKeyArray) -> Shaped[Array, "N O"]:
        result: jax.Array = self.form.quantize(self.kernel_init(key, shape, jnp.float32))[name]
        return result

      return self.param(name, init)

    leaves = {name: leaf(name) for name in leaf_shapes(self.form, shape)}
    dtype = self.dtype or x.dtype
    y = self.product(self.form, x.astype(dtype), jax.lax.stop_gradient(leaves))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
      y = y + bias.astype(dtype)
    result: jax.Array = y
    return result
