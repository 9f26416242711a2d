"""Builds modules from a `config.ModelConfig`, and computes their sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float32, PRNGKeyArray, Shaped

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.attention import IMPLEMENTATIONS, AttentionChoice
from llava_sp_jax.models.layers import ROPES, Rope
from llava_sp_jax.models.llama import Decoder
from llava_sp_jax.models.llava import LlavaSP
from llava_sp_jax.models.lora import LoraRecipe
from llava_sp_jax.models.projector import VARIANTS, Projector, spatial_token_count
from llava_sp_jax.models.quantize import FORMATS, NONE, Format
from llava_sp_jax.models.quantized_dense import FLOAT, PRODUCTS, QuantizedDense
from llava_sp_jax.models.remat import POLICIES
from llava_sp_jax.models.vit import TOWER_VARIANTS, VisionTransformer

# Rows of model.matmul_precision: jax's precision of matrix products and convolutions, by the dtype
# of activations. "" is the platform's default: GPUs multiply float32 in TF32, TPUs in bfloat16.
PRECISIONS: dict[str, Callable[[jnp.dtype], str]] = {
  "auto": lambda dtype: "highest" if dtype == jnp.float32 else "",
  "default": lambda dtype: "",
  "high": lambda dtype: "high",
  "highest": lambda dtype: "highest",
}


def model(config: config_lib.ModelConfig) -> LlavaSP:
  """Builds the flax module of a whole model, without parameters.

  Raises: ConfigError for an unknown name, such as a variant, or for sizes that do not fit each
    other.
  """
  tower, text, projector = config.tower, config.language_model, config.projector
  config_lib.lookup("model.tower.variant", tower.variant, TOWER_VARIANTS)
  config_lib.lookup("model.projector.variant", projector.variant, VARIANTS)
  config_lib.lookup("model.language_model.rope_scaling.kind", text.rope_scaling.kind, ROPES)
  config_lib.lookup("model.remat", config.remat, POLICIES)
  config_lib.lookup("model.attention", config.attention, {"auto": None, **IMPLEMENTATIONS})
  config_lib.lookup("model.cache", config.cache, cache_lib.FORMATS)
  _divides("model.tower.heads", tower.heads, "width", tower.width)
  _divides("model.language_model.kv_heads", text.kv_heads, "heads", text.heads)
  ask = config_lib.lookup("model.matmul_precision", config.matmul_precision, PRECISIONS)
  dtype = jnp.dtype(config.dtype)
  precision = ask(dtype)
  form = quantization(config)
  product, takes = config_lib.lookup("model.frozen_matmul", config.frozen_matmul, PRODUCTS)
  if takes and config.quantize not in takes:
    raise config_lib.ConfigError(
      f"model.frozen_matmul {config.frozen_matmul}: multiplies kernels of model.quantize "
      f"{', '.join(takes)}, found {config.quantize}"
    )
  base = functools.partial(QuantizedDense, form=form, product=product) if form else nn.Dense
  lora = LoraRecipe(config.lora.rank, config.lora.alpha, config.lora.dropout, base)
  return LlavaSP(
    vision_tower=VisionTransformer(
      variant=tower.variant,
      image_size=tower.image_size,
      patch_size=tower.patch_size,
      width=tower.width,
      layers=tower.layers,
      heads=tower.heads,
      mlp_width=tower.mlp_width,
      select_layer=tower.select_layer,
      scan_unroll=config.scan_unroll,
      dtype=dtype,
      initializer_range=tower.initializer_range,
    ),
    projector=Projector(
      projector.variant,
      projector.token_width,
      text.width,
      dtype,
      view_sizes(config),
      config.image_newline,
    ),
    language_model=Decoder(
      vocab_size=text.vocab_size,
      width=text.width,
      layers=text.layers,
      heads=text.heads,
      kv_heads=text.kv_heads,
      head_dim=text.head_dim,
      mlp_width=text.mlp_width,
      rope=Rope(text.rope_theta, **dataclasses.asdict(text.rope_scaling)),
      norm_eps=text.norm_eps,
      tie_embeddings=text.tie_embeddings,
      attention_bias=text.attention_bias,
      sliding_window=text.sliding_window,
      window_from_layer=text.window_from_layer,
      initializer_range=text.initializer_range,
      scan_unroll=config.scan_unroll,
      remat=config.remat,
      dtype=dtype,
      dense=lora.dense(),
      attention=AttentionChoice(config.attention, precision=precision),
      cache_format=config.cache,
    ),
    precision=precision,
  )


def unstacked(module: LlavaSP) -> LlavaSP:
  """Returns the module with separate parameters for each layer, such as `unstack` makes.

  A scan copies each layer out of the stacked kernels, which would slow every decoding step.
  """
  return module.clone(
    language_model=module.language_model.clone(stacked=False),
    vision_tower=module.vision_tower.clone(stacked=False),
  )


def unstack(params: dict[str, Any]) -> dict[str, Any]:
  """Splits the stacked layers of a parameter tree into one subtree for each layer, `layers_0` ...

  `params` is nested; its arrays may be shapes, or anything that can be indexed.
  """
  result = dict(params)
  for part in ("language_model", "vision_tower"):
    inner = {k: v for k, v in params[part].items() if k != "layers"}
    layers = params[part].get("layers", {})
    leaves = jax.tree.leaves(layers)
    for i in range(len(leaves[0]) if leaves else 0):
      inner[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)
    result[part] = inner
  return result


def compiled_for(module: LlavaSP, platform: str, branches: bool, samples: int = 0) -> LlavaSP:
  """Returns the module as it is to be compiled for a platform.

  Args:
    module: the model.
    platform: "tpu", "gpu" or "cpu", of the mesh's devices, which need not be in this machine.
    branches: whether samples may have branches (`layers.BRANCHES`), as `data.turns` = branch makes.
    samples: the most samples of a row; 0 is any number.
  """
  decoder = module.language_model
  attention = dataclasses.replace(
    decoder.attention, platform=platform, branches=branches, samples=samples
  )
  return module.clone(
    language_model=decoder.clone(attention=attention),
    projector=module.projector.clone(platform=platform),
  )


def _divides(key: str, part: int, name: str, whole: int) -> None:
  if part < 1 or whole % part:
    raise config_lib.ConfigError(f"{key}: {part} does not divide {name} {whole}")


def quantization(config: config_lib.ModelConfig, key: str = "model.quantize") -> Format | None:
  """Returns the format of the decoder's weight matrices; None for floats.

  `key` is the setting that holds its name, for messages.

  Raises: ConfigError for a name that is not in `quantize.FORMATS`, or a format whose block does not
    divide the inputs of a matrix.
  """
  form = config_lib.lookup(key, config.quantize, FORMATS)
  if form and form.block:
    text = config.language_model
    inputs = {
      "width": text.width,
      "heads * head_dim": text.heads * text.head_dim,
      "mlp_width": text.mlp_width,
    }
    odd = [f"{name} {size}" for name, size in inputs.items() if size % form.block]
    if odd:
      raise config_lib.ConfigError(
        f"{key} {config.quantize}: blocks of {form.block} do not divide "
        f"model.language_model's {', '.join(odd)}; use int8, which has none, or other sizes"
      )
  return form


def check_formats(weights: str, cache: str) -> None:
  """Checks the names of formats for `answering`; "" is one. Raises: ConfigError for unknown ones."""
  config_lib.lookup("weights", weights, {"": None, **FORMATS})
  config_lib.lookup("cache", cache, {"": None, **cache_lib.FORMATS})


def answering(config: config_lib.ModelConfig, weights: str, cache: str) -> config_lib.ModelConfig:
  """Returns the config of the same model with other formats of its weights and cache.

  `weights` is a row of `quantize.FORMATS`. Adapters are folded into such weights, so the result has
  none. `cache` is a row of `cache.FORMATS`. "" leaves either as it is.

  Raises: ConfigError for an unknown name, or a format whose block does not divide a matrix.
  """
  check_formats(weights, cache)
  result = dataclasses.replace(config, cache=cache or config.cache)
  if weights:
    plain = config_lib.LoraConfig(rank=0)
    result = dataclasses.replace(with_format(result, weights), lora=plain)
    quantization(result, "weights")
  return result


def unquantized(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """Returns the config with `quantize` none: the same model with floats as weights."""
  return with_format(config, NONE)


def with_format(config: config_lib.ModelConfig, name: str) -> config_lib.ModelConfig:
  """Returns the config with another `quantize`; multiplies in floats if `frozen_matmul` needs other
  kernels.

  Raises: ConfigError for a `frozen_matmul` that is no row of PRODUCTS.
  """
  _, takes = config_lib.lookup("model.frozen_matmul", config.frozen_matmul, PRODUCTS)
  product = FLOAT if takes and name not in takes else config.frozen_matmul
  return dataclasses.replace(config, quantize=name, frozen_matmul=product)


def patch_grid(config: config_lib.ModelConfig) -> int:
  """Returns the number of patches along one side of the image; a remainder of pixels is dropped."""
  return config.tower.image_size // config.tower.patch_size


def tower_layers(config: config_lib.ModelConfig) -> int:
  """Returns how many blocks of the tower are computed: those before the selected hidden state."""
  select = config.tower.select_layer
  return config.tower.layers + 1 + select if select < 0 else select


def view_sizes(config: config_lib.ModelConfig) -> tuple[int, ...]:
  """Returns the side lengths of the projector's views, in patches, ascending.

  A view is the part of the patch grid that one spatial token sees: a central crop, or a pool of
  all. There are no sizes for a variant without views.

  Raises: ConfigError for `projector.scales` that do not fit variant and grid, or a grid that is too
    small for the variant's own.
  """
  variant, grid = config.projector.variant, patch_grid(config)
  try:
    return VARIANTS[variant].scales(grid, config.projector.scales)
  except ValueError as error:
    raise config_lib.ConfigError(f"model.projector.variant {variant}: {error}") from None


def image_token_count(config: config_lib.ModelConfig) -> int:
  """Returns the number of tokens that one tile becomes: spatial tokens and patches."""
  grid, sizes = patch_grid(config), view_sizes(config)
  return spatial_token_count(config.projector.variant, grid, sizes) + grid * grid


def tile_shape(config: config_lib.ModelConfig) -> tuple[int, int, int, bool]:
  """Returns the arguments of `data.anyres.Tile`, which describe one tile of this model.

  They are the side in pixels, the side in patches, the number of spatial tokens, and whether the
  model has a newline token.
  """
  grid = patch_grid(config)
  spatial = image_token_count(config) - grid * grid
  return config.tower.image_size, grid, spatial, config.image_newline


def example_inputs(
  config: config_lib.ModelConfig, rows: int = 1, length: int = 8
) -> tuple[Any, ...]:
  """Returns the arguments of `LlavaSP.__call__` as shapes and dtypes, for abstract evaluation."""
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  side = config.tower.image_size
  return ids, ids, ids, jax.ShapeDtypeStruct((rows, 1, side, side, 3), jnp.float32), ids


def initialize(config: config_lib.ModelConfig, rng: PRNGKeyArray) -> dict[str, Any]:
  """Returns random parameters as nested float32 arrays (quantized weights in their own dtypes).

  Must be called inside jit. Parameters do not depend on the attention, and the one that is named may
  need other devices than those here. Layers are not unrolled: the values are the same, and what a
  training unrolls takes minutes to compile here, too.
  """
  module = model(dataclasses.replace(config, attention="auto", scan_unroll=1, remat="none"))
  inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example_inputs(config))
  result: dict[str, Any] = module.init(rng, *inputs, method=_touch)["params"]
  return result


def _touch(module: LlavaSP, *inputs: Shaped[Array, " ..."]) -> Float32[Array, "B T V"]:
  return module.logits(module(*inputs))


def abstract(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Returns the nested parameters as shapes and dtypes; nothing is computed."""
  result: dict[str, Any] = jax.tree.map(lambda leaf: leaf, _traced(config))  # dicts of its own
  return result


@functools.cache
def _traced(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Traces the model, which takes about a second; each start needs its shapes several times."""
  result: dict[str, Any] = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
  return result


def parameter_counts(config: config_lib.ModelConfig) -> dict[str, int]:
  """Returns {"vision_tower", "projector", "language_model"} with the number of parameters of each.

  A quantized weight counts as one parameter.
  """
  tree = abstract(unquantized(config))
  return {part: sum(x.size for x in jax.tree.leaves(sub)) for part, sub in tree.items()}
