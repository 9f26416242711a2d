"""Names torch <-> jax of a projector, derived from its variant's row of
`models.projector.VARIANTS`.

The tables here hold the names that the original code chose. A view or an extractor that it does not
have is named by its own parameters' paths, so that a variant from elsewhere can be exported and
read.

Source: `llava/model/llava_arch.py` of the original code.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from llava_sp_jax.convert.layout import conv, linear, same, whole_view
from llava_sp_jax.convert.tables import NameRule
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.models.spatial import EXTRACTORS, VIEWS, Extractor, View

MLP = (
  NameRule("model.mm_projector.0.weight", "projector/fc1/kernel", linear),
  NameRule("model.mm_projector.0.bias", "projector/fc1/bias", same),
  NameRule("model.mm_projector.2.weight", "projector/fc2/kernel", linear),
  NameRule("model.mm_projector.2.bias", "projector/fc2/bias", same),
  NameRule("model.image_newline", "projector/image_newline", same),
)

# The names of a view's tokens: (view, channels, scales) -> rows.
ViewNames = Callable[[str, int, Sequence[int]], tuple[NameRule, ...]]


def _kernels(torch: str, last: str = "") -> ViewNames:
  """Names one kernel for each scale; `last` is the name of the largest, if it has another."""

  def rows(view: str, channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
    names = [torch] * (len(scales) - 1) + [last or torch]
    return tuple(
      NameRule(
        name.format(size=size, number=i + 1, view=view),
        f"projector/{view}_{i}/kernel",
        whole_view(channels),
      )
      for i, (name, size) in enumerate(zip(names, scales, strict=True))
    )

  return rows


_NORMS = {"encoder": ("self", "mlp"), "decoder": ("self", "cross", "mlp")}  # in torch's order
_ATTENTIONS = {"self": "self_attn", "cross": "multihead_attn"}


def _transformers(view: str, channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
  """Names torch's nn.Transformer without biases, one for each scale, with its query token."""
  rows: list[NameRule] = []
  for i, size in enumerate(scales):
    path = f"projector/{view}_{i}"
    rows.append(NameRule(f"model.query_{size}", f"{path}/query", same))
    for side, norms in _NORMS.items():
      torch, ours = f"model.tfm_{size}.{side}", f"{path}/{side}"
      layer = torch + ".layers.{layer}."
      rows.append(NameRule(f"{torch}.norm.weight", f"{ours}/norm/scale", same))
      rows += [
        NameRule(f"{layer}norm{n + 1}.weight", f"{ours}/layers/{norm}_norm/scale", same)
        for n, norm in enumerate(norms)
      ]
      rows += [
        NameRule(f"{layer}linear{n}.weight", f"{ours}/layers/fc{n}/kernel", linear) for n in (1, 2)
      ]
      for norm in norms[:-1]:
        attention, place = layer + _ATTENTIONS[norm], f"{ours}/layers/{norm}_attn"
        rows += [
          NameRule(f"{attention}.in_proj_weight", f"{place}/in_proj", linear),
          NameRule(f"{attention}.out_proj.weight", f"{place}/o_proj/kernel", linear),
        ]
  return tuple(rows)


def _registers(view: str, channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
  return tuple(
    NameRule(f"model.{view}_{size}", f"projector/{view}_{i}/token", same)
    for i, size in enumerate(scales)
  )


# Names of the tokens of a variant's first view, by view and extractor. All pools but the whole grid
# follow their pooling in a torch Sequential, hence `.1`.
FIRST: dict[tuple[str, str], ViewNames] = {
  ("crop", "conv"): _kernels("model.conv_{size}.weight"),
  ("pool", "conv"): _kernels("model.conv_{size}.1.weight", last="model.conv_{size}.weight"),
  ("crop", "transformer"): _transformers,
  ("pool", "transformer_channels_first"): _transformers,
}
# Those of the further views, which the original does not have, by extractor.
FURTHER: dict[str, ViewNames] = {
  "conv": _kernels("model.{view}_{size}.weight"),
  "register": _registers,
}
# A variant of the original that numbers its kernels.
NUMBERED: dict[str, ViewNames] = {"crop_224": _kernels("model.conv_{number}.weight")}
# The layer after the tokens, by extractor.
OUT = {"transformer": "tfm_linear", "transformer_channels_first": "tfm_linear"}
# (convolution, what its norms and linear layers end with) of each detail kernel, by their number.
# The original builds a value projection for `mid`, never uses it, and stores it: see
# `tables.IGNORED`. It has no leaf here, so it cannot be written; the original then keeps its random
# one, without effect.
DETAILS = {
  1: (("conv_CM", ""),),
  3: (("conv_small", "_small"), ("conv_mid", "_mid"), ("conv_huge", "_huge")),
}


def projector(variant: str, channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
  """Returns the rules for the names of a projector's parameters.

  Args:
    variant: a row of VARIANTS.
    channels: the tower's width.
    scales: sides of the views (`build.view_sizes`), which the original has in its names.

  `image_newline` is among them, used or not.

  Raises: KeyError for an unknown variant.
  """
  row = VARIANTS[variant]
  rows = list(MLP)
  for i, view in enumerate(row.views):
    first = None if i else FIRST.get((view, row.extractor))
    named = NUMBERED.get(variant) or first or FURTHER.get(row.extractor)
    rows += named(view, channels, scales) if named else _own(row.extractor, view, channels, scales)
  if row.views or row.detail_as_tokens:
    out = OUT.get(row.extractor, "conv_linear")
    rows.append(NameRule(f"model.{out}.1.weight", "projector/out/kernel", linear))
    if row.out_bias:
      rows.append(NameRule(f"model.{out}.1.bias", "projector/out/bias", same))
  numbered = tuple((f"conv_detail_{k}", f"_{k}") for k in row.detail_kernels)
  names = DETAILS.get(len(row.detail_kernels), numbered)
  for kernel, (convolution, suffix) in zip(row.detail_kernels, names, strict=True):
    value = ("value",) if kernel in (row.detail_values or row.detail_kernels) else ()
    parts = () if row.detail_as_tokens else ("query", "key", *value)
    rows += _detail(kernel, convolution, suffix, parts)
  return tuple(rows)


def _detail(kernel: int, convolution: str, suffix: str, parts: Sequence[str]) -> list[NameRule]:
  """Names a strided convolution, and the norm and linear layer of each of `parts`."""
  path = f"projector/detail_{kernel}"
  rows = [NameRule(f"model.{convolution}.weight", f"{path}/conv/kernel", conv)]
  for part in parts:
    name = f"model.{part}_projector{suffix}"
    rows += [
      NameRule(f"{name}.0.weight", f"{path}/{part}_norm/scale", same),
      NameRule(f"{name}.0.bias", f"{path}/{part}_norm/bias", same),
      NameRule(f"{name}.1.weight", f"{path}/{part}/kernel", linear),
      NameRule(f"{name}.1.bias", f"{path}/{part}/bias", same),
    ]
  return rows


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}  # as torch calls them


def name_of(path: str) -> str:
  """Returns the name in torch of a parameter's path below the projector, part by part.

  `layers` becomes `layers.{layer}`, and kernels and scales are weights.
  """
  *groups, leaf = path.removeprefix("projector/").split("/")
  name = [f"{group}.{{layer}}" if group == "layers" else group for group in groups]
  return ".".join([*name, _LEAVES.get(leaf, leaf)])


def _own(extractor: str, view: str, channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
  """Names the parameters of an extractor by their paths; matrices are transposed as torch's are."""
  rows = []
  for (i, size), (path, ndim) in itertools.product(
    enumerate(scales), _parameters(EXTRACTORS[extractor], VIEWS[view], channels, scales[0])
  ):
    *groups, leaf = path.split("/")
    matrix = leaf == "kernel" and ndim - ("layers" in groups) == 2
    rows.append(
      NameRule(
        f"model.{view}_{size}.{name_of(path)}",
        f"projector/{view}_{i}/{path}",
        linear if matrix else same,
      )
    )
  return tuple(rows)


@functools.lru_cache
def _parameters(
  extractor: Extractor, view: View, channels: int, size: int
) -> tuple[tuple[str, int], ...]:
  """Returns (path below the extractor's module, number of dimensions) of each of its parameters.

  Nothing is computed but shapes.
  """

  class Host(nn.Module):
    @nn.compact
    def __call__(self, grid: jax.Array) -> jax.Array:
      seen = view.apply(grid, size)
      return extractor.build(seen, 8, jnp.dtype(jnp.float32), "token")

  grid = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  tree = jax.eval_shape(Host().init, jax.random.key(0), grid).get("params", {}).get("token", {})
  return tuple((path, leaf.ndim) for path, leaf in flatten_dict(tree, sep="/").items())
