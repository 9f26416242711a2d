"""Names torch <-> jax: one table for each part, read in both directions.

A row is (torch name, our path, layout). `{layer}` is stacked into (or taken from) the leading axis;
any other `{name:a|b}` is one of the listed words and carried over. Names that may be dropped stand
in IGNORED. Sources: Hugging Face LLaMA and CLIP, PEFT, `llava/model/llava_arch.py`.
"""

from __future__ import annotations

import dataclasses
import re

from llava_sp_jax.convert.layout import Layout, conv, linear, same, whole_view


@dataclasses.dataclass(frozen=True)
class Row:
  torch: str
  path: str
  layout: Layout


LLAMA = (
  Row("model.embed_tokens.weight", "language_model/token_embed/embedding", same),
  Row("model.layers.{layer}.self_attn.{p:q|k|v|o}_proj.weight",
      "language_model/layers/{p}_proj/kernel", linear),
  Row("model.layers.{layer}.mlp.{p:gate|up|down}_proj.weight",
      "language_model/layers/{p}_proj/kernel", linear),
  Row("model.layers.{layer}.input_layernorm.weight",
      "language_model/layers/attn_norm/scale", same),
  Row("model.layers.{layer}.post_attention_layernorm.weight",
      "language_model/layers/mlp_norm/scale", same),
  Row("model.norm.weight", "language_model/final_norm/scale", same),
  Row("lm_head.weight", "language_model/lm_head/kernel", linear),
)  # fmt: skip

_LAYER = "base_model.model.model.layers.{layer}."
LORA = tuple(
  Row(f"{_LAYER}{block}.{{p:{names}}}_proj.lora_{letter}.weight",
      f"language_model/layers/{{p}}_proj/lora_{letter.lower()}", linear)
  for block, names in (("self_attn", "q|k|v|o"), ("mlp", "gate|up|down"))
  for letter in "AB"
)  # fmt: skip

_VISION = "vision_model.encoder.layers.{layer}."
CLIP = (
  Row("vision_model.embeddings.class_embedding", "vision_tower/class_embed", same),
  Row("vision_model.embeddings.patch_embedding.weight", "vision_tower/patch_embed/kernel",
      whole_view(3)),
  Row("vision_model.embeddings.position_embedding.weight", "vision_tower/position_embed", same),
  # the misspelling is Hugging Face's
  Row("vision_model.pre_layrnorm.weight", "vision_tower/pre_norm/scale", same),
  Row("vision_model.pre_layrnorm.bias", "vision_tower/pre_norm/bias", same),
  Row(_VISION + "self_attn.{p:q|k|v}_proj.weight", "vision_tower/layers/{p}_proj/kernel", linear),
  Row(_VISION + "self_attn.{p:q|k|v}_proj.bias", "vision_tower/layers/{p}_proj/bias", same),
  Row(_VISION + "self_attn.out_proj.weight", "vision_tower/layers/o_proj/kernel", linear),
  Row(_VISION + "self_attn.out_proj.bias", "vision_tower/layers/o_proj/bias", same),
  Row(_VISION + "mlp.{p:fc1|fc2}.weight", "vision_tower/layers/{p}/kernel", linear),
  Row(_VISION + "mlp.{p:fc1|fc2}.bias", "vision_tower/layers/{p}/bias", same),
  Row(_VISION + "layer_norm1.weight", "vision_tower/layers/attn_norm/scale", same),
  Row(_VISION + "layer_norm1.bias", "vision_tower/layers/attn_norm/bias", same),
  Row(_VISION + "layer_norm2.weight", "vision_tower/layers/mlp_norm/scale", same),
  Row(_VISION + "layer_norm2.bias", "vision_tower/layers/mlp_norm/bias", same),
)  # fmt: skip

_MLP = (
  Row("model.mm_projector.0.weight", "projector/fc1/kernel", linear),
  Row("model.mm_projector.0.bias", "projector/fc1/bias", same),
  Row("model.mm_projector.2.weight", "projector/fc2/kernel", linear),
  Row("model.mm_projector.2.bias", "projector/fc2/bias", same),
)
_OUT = (Row("model.conv_linear.1.weight", "projector/out/kernel", linear),)
_OUT_BIAS = (Row("model.conv_linear.1.bias", "projector/out/bias", same),)
_SIXTHS = (4, 8, 12, 16, 20, 24)


def _crops(channels: int) -> tuple[Row, ...]:
  return tuple(
    Row(f"model.conv_{size}.weight", f"projector/crop_{i}/kernel", whole_view(channels))
    for i, size in enumerate(_SIXTHS)
  )


def _pools(channels: int) -> tuple[Row, ...]:
  """Each but the whole grid follows its pooling in a torch Sequential, hence `.1`."""
  return tuple(
    Row(f"model.conv_{size}{'' if size == 24 else '.1'}.weight", f"projector/pool_{i}/kernel",
        whole_view(channels))
    for i, size in enumerate(_SIXTHS)
  )  # fmt: skip


_DETAIL = (
  Row("model.conv_CM.weight", "projector/detail_16/conv/kernel", conv),
  *(
    row
    for part in ("query", "key", "value")
    for row in (
      Row(f"model.{part}_projector.0.weight", f"projector/detail_16/{part}_norm/scale", same),
      Row(f"model.{part}_projector.0.bias", f"projector/detail_16/{part}_norm/bias", same),
      Row(f"model.{part}_projector.1.weight", f"projector/detail_16/{part}/kernel", linear),
      Row(f"model.{part}_projector.1.bias", f"projector/detail_16/{part}/bias", same),
    )
  ),
)


def projector(row: str, channels: int) -> tuple[Row, ...]:
  """The names of a projector row; `channels` is the tower's width. Raises: KeyError."""
  rows = {
    "none": _MLP,
    "pooling": _MLP + _pools(channels) + _OUT,
    "cropping": _MLP + _crops(channels) + _OUT + _OUT_BIAS + _DETAIL,
    "cropping_sfe": _MLP + _crops(channels) + _OUT,
    "pooling_dfi": _MLP + _pools(channels) + _OUT + _DETAIL,
  }
  return rows[row]


IGNORED = (
  r"(.*\.)?embeddings\.position_ids$",  # a buffer, 0..n-1
  r".*rotary_emb\.inv_freq$",  # a buffer
  r"(text_model\.|text_projection\.|visual_projection\.|logit_scale$)",  # CLIP's other half
  r"vision_model\.post_layernorm\.",  # LLaVA reads the features before it
)


@dataclasses.dataclass(frozen=True)
class Match:
  path: str
  layout: Layout
  layer: int | None


def match(name: str, rows: tuple[Row, ...]) -> Match | None:
  """The row that a torch name belongs to. Raises: ValueError when there are two."""
  found = []
  for row in rows:
    groups = re.fullmatch(_pattern(row.torch), name)
    if groups:
      words = groups.groupdict()
      layer = words.pop("layer", None)
      found.append(
        Match(row.path.format(**words), row.layout, None if layer is None else int(layer))
      )
  if len(found) > 1:
    raise ValueError(f"{name} matches {len(found)} rows: {[m.path for m in found]}")
  return found[0] if found else None


def ignored(name: str) -> bool:
  return any(re.match(pattern, name) for pattern in IGNORED)


def _pattern(template: str) -> str:
  """`a.{layer}.{p:x|y}` -> a regular expression with named groups."""
  parts = re.split(r"(\{[^}]*\})", template)
  out = []
  for part in parts:
    if part == "{layer}":
      out.append(r"(?P<layer>\d+)")
    elif part.startswith("{"):
      name, words = part[1:-1].split(":")
      out.append(f"(?P<{name}>{words})")
    else:
      out.append(re.escape(part))
  return "".join(out)
