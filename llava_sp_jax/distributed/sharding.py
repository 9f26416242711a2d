"""Maps parameter paths to logical axes, and logical axes to axes of the mesh.

`PARAM_AXES` gives the logical axes of a parameter by its path; `models.spatial` gives those of an
extractor's own parameters. "layers" is prepended for the stacked leaves of a scan. `RULES` maps
logical axes to mesh axes. Activations use the same logical axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import layers, spatial

Axes = tuple[str | None, ...]
Flat = dict[str, jax.Array]

STACKED = "layers"  # the logical axis of layers that a scan runs over

PARAM_AXES: tuple[tuple[str, Axes], ...] = (
  (r"token_embed/embedding$", ("vocab", "embed")),
  (r"lm_head/kernel$", ("embed", "vocab")),
  # kernel_q, kernel_scale...: the leaves of a quantized kernel run along the same two axes.
  (r"(q|k|v)_proj/kernel(_\w+)?$", ("embed", "heads")),
  (r"o_proj/kernel(_\w+)?$", ("heads", "embed")),
  (r"(gate_proj|up_proj|fc1)/kernel(_\w+)?$", ("embed", "mlp")),
  (r"(down_proj|fc2)/kernel(_\w+)?$", ("mlp", "embed")),
  (r"(q|k|v|gate|up)_proj/lora_a$", ("embed", None)),
  (r"(o|down)_proj/lora_a$", ("adapter", None)),
  (r"(q|k|v|gate|up)_proj/lora_b$", (None, "adapter")),
  (r"(o|down)_proj/lora_b$", (None, "embed")),
  (r"(q|k|v)_proj/bias$", ("heads",)),
  (r"fc1/bias$", ("mlp",)),
  (r"(bias|scale|class_embed|image_newline)$", (None,)),
  (r"patch_embed/kernel$", (None, "embed")),
  (r"position_embed$", (None, "embed")),
  (r"projector/detail_\d+/conv/kernel$", (None, None, "contraction", None)),
  (r"projector/(out|detail_\d+/(query|key|value))/kernel$", (None, "embed")),
)

RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "length": None,
  STACKED: None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "contraction": ("data", "fsdp", "tensor"),
  "adapter": ("tensor", "fsdp"),  # the side of an adapter that is divided as heads or MLP are
}


# Rules for parameters of which every device along `fsdp` holds a copy.
WHOLE = {**RULES, "embed": None, "adapter": "tensor"}

# How the frozen base is sharded (config.MeshConfig.base): rules by path, the first match wins.
# Copies need more memory, but no gathers; the many small gathers of the tower are slow on many
# devices. A kernel whose columns are divided is copied once more after its gather: `down_proj`.
PRESETS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
  "shard": ((r"", RULES),),
  "replicate_tower": ((r"^vision_tower/", WHOLE), (r"", RULES)),
  "replicate_attention": ((r"^vision_tower/|/(q|k|v|o)_proj/", WHOLE), (r"", RULES)),
  "replicate_most": ((r"/(gate|up)_proj/", RULES), (r"", WHOLE)),
  "replicate": ((r"", WHOLE),),
}
GROUPS = "data"  # the axis along which gradients of adapters are summed once a step
FROZEN = "frozen"  # the field of a train state that holds the base


def axes_table() -> Iterator[tuple[str, Axes]]:
  """Yields (regex of a parameter's path, its logical axes) for all parameters."""
  yield from PARAM_AXES
  yield from spatial.parameter_axes()


def param_axes(path: str) -> Axes:
  """Returns the logical axes of the parameter at `path`, one name or None for each dimension.

  Raises: KeyError when no row matches.
  """
  for pattern, axes in axes_table():
    if re.search(pattern, path):
      return (STACKED, *axes) if "/layers/" in path else axes
  raise KeyError(f"no row of PARAM_AXES, and no `axes` of an extractor, matches parameter {path!r}")


def activation_rules() -> tuple[tuple[str, Any], ...]:
  """Returns RULES as pairs, the form that flax needs for `nn.with_logical_constraint`."""
  return tuple(RULES.items())


def shardings(tree: Any, mesh: Mesh | AbstractMesh, base: str = "shard") -> Any:
  """Returns a NamedSharding for each array of a tree whose dictionaries repeat parameter paths.

  The tree may hold parameters (nested or flat) or optimizer moments. Arrays that belong to no
  parameter are replicated. A dimension that its mesh axes do not divide is not sharded. `base`, a
  row of PRESETS, says how arrays below a field `frozen` are sharded.

  Raises: ConfigError for a `base` that is no row, KeyError for a parameter that no row matches.
  """
  preset = config_lib.lookup("mesh.base", base, PRESETS)

  def base_rules(path: str) -> Mapping[str, Any]:
    return next(rules for pattern, rules in preset if re.search(pattern, path))

  def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
    path = "/".join(str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey))
    if not leaf.ndim or "/" not in path:
      return NamedSharding(mesh, PartitionSpec())
    axes = param_axes(path)
    _check(axes, path, leaf)
    frozen = any(getattr(k, "name", None) == FROZEN for k in keys)
    return NamedSharding(mesh, _spec(axes, leaf.shape, mesh, base_rules(path) if frozen else RULES))

  return jax.tree_util.tree_map_with_path(place, tree)


def constrain(tree: Flat) -> Flat:
  """Shards a `{path: array}` tree, such as gradients, like the parameters. Called inside jit.

  Copies of `for_groups` stay with their groups.
  """
  return _placed(tree, RULES)


def gather(tree: Flat) -> Flat:
  """Gathers a `{path: array}` tree over `fsdp`, but not over `tensor`. Called inside jit."""
  return _placed(tree, WHOLE)


def for_groups(tree: Flat, pattern: str) -> Flat:
  """Copies stacked parameters of a `{path: array}` tree for each group of rows along `data`.

  [L, ...] -> [L, G, ...] for paths that `pattern` matches; G is the size of the axis `data`, which
  crosses from slice to slice, and the devices of a group hold its copy. So gradients of layers and
  micro-batches are summed within the group, and over the groups by `over_groups`, once a step.
  Called inside jit; without a mesh, or with one group, returns `tree`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  groups = 1 if mesh.empty else mesh.shape[GROUPS]
  if groups == 1:
    return tree

  copies = {
    path: jnp.broadcast_to(x[:, None], (x.shape[0], groups, *x.shape[1:]))
    for path, x in tree.items()
    if re.search(pattern, path)
  }
  return {**tree, **gather(copies)}


def over_groups(gradients: Flat, like: Flat) -> Flat:
  """Sums gradients of what `for_groups` made of `like` over the groups. Called inside jit.

  [L, G, ...] -> [L, ...], divided like the parameters. The groups send values of `like`'s dtype.
  """

  def summed(path: str, x: jax.Array) -> jax.Array:
    if x.ndim == like[path].ndim:
      return x
    x = x.astype(like[path].dtype)
    result: jax.Array = jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (1,))
    return result

  return constrain({path: summed(path, x) for path, x in gradients.items()})


def _check(axes: Axes, path: str, array: Any) -> None:
  if len(axes) != array.ndim:
    raise ValueError(f"{path}: {array.ndim} dimensions, but PARAM_AXES gives {axes}")


def _placed(tree: Flat, rules: Mapping[str, Any]) -> Flat:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree

  def place(path: str, x: jax.Array) -> NamedSharding:
    if not x.ndim:
      return NamedSharding(mesh, PartitionSpec())
    axes = param_axes(path)
    if x.ndim == len(axes) + 1 and axes[0] == STACKED:  # copies for groups
      first, *others = _spec(axes, (x.shape[0], *x.shape[2:]), mesh, rules)
      return NamedSharding(mesh, PartitionSpec(first, GROUPS, *others))
    _check(axes, path, x)
    return NamedSharding(mesh, _spec(axes, x.shape, mesh, rules))

  places = {path: place(path, x) for path, x in tree.items()}
  result: Flat = jax.lax.with_sharding_constraint(tree, places)
  return result


def _spec(
  axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Mapping[str, Any]
) -> PartitionSpec:
  return PartitionSpec(
    *(
      layers.dividing(rules[axis] if axis else None, size, mesh.shape)
      for axis, size in zip(axes, shape, strict=True)
    )
  )
