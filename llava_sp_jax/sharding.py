"""Where arrays live: parameter paths -> logical axes -> mesh axes. The only place that knows both.

`PARAM_AXES` gives the logical axes of a parameter by its path; "layers" is put in front for the
stacked leaves of a scan. `RULES` maps logical axes to mesh axes; activations use the same names.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

PARAM_AXES: tuple[tuple[str, Axes], ...] = (
  (r"token_embed/embedding$", ("vocab", "embed")),
  (r"lm_head/kernel$", ("embed", "vocab")),
  (r"(q|k|v)_proj/kernel$", ("embed", "heads")),
  (r"o_proj/kernel$", ("heads", "embed")),
  (r"(gate_proj|up_proj|fc1)/kernel$", ("embed", "mlp")),
  (r"(down_proj|fc2)/kernel$", ("mlp", "embed")),
  (r"(q|k|v|gate|up)_proj/lora_a$", ("embed", None)),
  (r"o_proj/lora_a$", ("heads", None)),
  (r"down_proj/lora_a$", ("mlp", None)),
  (r"(q|k|v)_proj/lora_b$", (None, "heads")),
  (r"(gate|up)_proj/lora_b$", (None, "mlp")),
  (r"(o|down)_proj/lora_b$", (None, "embed")),
  (r"(q|k|v)_proj/bias$", ("heads",)),
  (r"fc1/bias$", ("mlp",)),
  (r"(bias|scale|class_embed|image_newline|register_\d+/token)$", (None,)),
  (r"patch_embed/kernel$", (None, "embed")),
  (r"position_embed$", (None, "embed")),
  # The spatial kernels hold most of what learns: their long contraction axis takes every device.
  (r"projector/(crop|pool)_\d+/kernel$", ("contraction", None)),
  (r"projector/detail_\d+/conv/kernel$", (None, None, "contraction", None)),
  (r"projector/(out|detail_\d+/(query|key|value))/kernel$", (None, "embed")),
  (r"projector/(crop|pool)_\d+/.*_attn/in_proj$", ("embed", "heads")),
  (r"projector/(crop|pool)_\d+/query$", (None, None, "embed")),
)

RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "length": None,
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "contraction": ("data", "fsdp", "tensor"),
}


def param_axes(path: str) -> Axes:
  """Logical axes of the parameter at `path`. Raises: KeyError when no row matches."""
  for pattern, axes in PARAM_AXES:
    if re.search(pattern, path):
      return ("layers", *axes) if "/layers/" in path else axes
  raise KeyError(f"no row of PARAM_AXES matches parameter {path!r}")


def activation_rules() -> tuple[tuple[str, Any], ...]:
  """RULES as flax takes them for `nn.with_logical_constraint`."""
  return tuple(RULES.items())


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for each leaf of a tree whose dictionaries repeat parameter paths.

  Works for parameters (nested or flat) and for optimizer moments; leaves that belong to no
  parameter are replicated. A dimension that its mesh axes do not divide is left whole.
  """

  def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
    path = "/".join(str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey))
    if not leaf.ndim or "/" not in path:
      return NamedSharding(mesh, PartitionSpec())
    axes = param_axes(path)
    if len(axes) != leaf.ndim:
      raise ValueError(f"{path}: {leaf.ndim} dimensions, but PARAM_AXES gives {axes}")
    return NamedSharding(mesh, _spec(axes, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(place, tree)


def _spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  parts: list[tuple[str, ...] | None] = []
  for axis, size in zip(axes, shape, strict=True):
    rule = RULES[axis] if axis else None
    names = (rule,) if isinstance(rule, str) else rule or ()
    kept: list[str] = []
    for name in names:
      if size % mesh.shape[name] == 0:
        kept.append(name)
        size //= mesh.shape[name]
    parts.append(tuple(kept) or None)
  return PartitionSpec(*parts)
