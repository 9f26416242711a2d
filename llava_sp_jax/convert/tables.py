"""Maps torch names to parameter paths and back: one table for each part of the model.

A row is (torch name, parameter path, layout). `{layer}` becomes the leading axis of stacked layers;
any other `{name:a|b}` stands for one of the listed words in both names. Tensors that may be dropped
match IGNORED. `projector_names` makes the rows of a projector.

Sources: Hugging Face LLaMA, Qwen2, CLIP and SigLIP, PEFT.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

from llava_sp_jax.convert.layout import TensorLayout, linear, same, whole_view


@dataclasses.dataclass(frozen=True)
class NameRule:
  """Holds the name of a tensor in torch, the path of its parameter, and how the layouts differ."""

  torch: str
  path: str
  layout: TensorLayout


LLAMA = (
  NameRule("model.embed_tokens.weight", "language_model/token_embed/embedding", same),
  NameRule("model.layers.{layer}.self_attn.{p:q|k|v|o}_proj.weight",
      "language_model/layers/{p}_proj/kernel", linear),
  NameRule("model.layers.{layer}.self_attn.{p:q|k|v}_proj.bias",
      "language_model/layers/{p}_proj/bias", same),  # Qwen2
  NameRule("model.layers.{layer}.mlp.{p:gate|up|down}_proj.weight",
      "language_model/layers/{p}_proj/kernel", linear),
  NameRule("model.layers.{layer}.input_layernorm.weight",
      "language_model/layers/attn_norm/scale", same),
  NameRule("model.layers.{layer}.post_attention_layernorm.weight",
      "language_model/layers/mlp_norm/scale", same),
  NameRule("model.norm.weight", "language_model/final_norm/scale", same),
  NameRule("lm_head.weight", "language_model/lm_head/kernel", linear),
)  # fmt: skip

_LAYER = "base_model.model.model.layers.{layer}."
LORA = tuple(
  NameRule(
    f"{_LAYER}{block}.{{p:{names}}}_proj.lora_{letter}.weight",
    f"language_model/layers/{{p}}_proj/lora_{letter.lower()}",
    linear,
  )
  for block, names in (("self_attn", "q|k|v|o"), ("mlp", "gate|up|down"))
  for letter in "AB"
)

_VISION = "vision_model.encoder.layers.{layer}."
_BLOCKS = (
  NameRule("vision_model.embeddings.patch_embedding.weight", "vision_tower/patch_embed/kernel",
      whole_view(3)),
  NameRule("vision_model.embeddings.position_embedding.weight", "vision_tower/position_embed", same),
  NameRule(_VISION + "self_attn.{p:q|k|v}_proj.weight", "vision_tower/layers/{p}_proj/kernel", linear),
  NameRule(_VISION + "self_attn.{p:q|k|v}_proj.bias", "vision_tower/layers/{p}_proj/bias", same),
  NameRule(_VISION + "self_attn.out_proj.weight", "vision_tower/layers/o_proj/kernel", linear),
  NameRule(_VISION + "self_attn.out_proj.bias", "vision_tower/layers/o_proj/bias", same),
  NameRule(_VISION + "mlp.{p:fc1|fc2}.weight", "vision_tower/layers/{p}/kernel", linear),
  NameRule(_VISION + "mlp.{p:fc1|fc2}.bias", "vision_tower/layers/{p}/bias", same),
  NameRule(_VISION + "layer_norm1.weight", "vision_tower/layers/attn_norm/scale", same),
  NameRule(_VISION + "layer_norm1.bias", "vision_tower/layers/attn_norm/bias", same),
  NameRule(_VISION + "layer_norm2.weight", "vision_tower/layers/mlp_norm/scale", same),
  NameRule(_VISION + "layer_norm2.bias", "vision_tower/layers/mlp_norm/bias", same),
)  # fmt: skip
CLIP = (
  *_BLOCKS,
  NameRule("vision_model.embeddings.class_embedding", "vision_tower/class_embed", same),
  # the misspelling is Hugging Face's
  NameRule("vision_model.pre_layrnorm.weight", "vision_tower/pre_norm/scale", same),
  NameRule("vision_model.pre_layrnorm.bias", "vision_tower/pre_norm/bias", same),
)
SIGLIP = (
  *_BLOCKS,
  NameRule("vision_model.embeddings.patch_embedding.bias", "vision_tower/patch_embed/bias", same),
)
TOWERS = {"clip": CLIP, "siglip": SIGLIP}  # by the name of a row of `models.vit.TOWER_VARIANTS`

IGNORED = (
  r"(.*\.)?embeddings\.position_ids$",  # a buffer, 0..n-1
  r".*rotary_emb\.inv_freq$",  # a buffer
  # the other half of CLIP and SigLIP
  r"(text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$)",
  r"vision_model\.(post_layernorm|head)\.",  # LLaVA reads the features before them
  r"model\.value_projector_mid\.",  # the original's `mid` uses the value projection of `small`
)


@dataclasses.dataclass(frozen=True)
class Match:
  """Holds the parameter that a torch name stands for; `layer` is None outside of layers."""

  path: str
  layout: TensorLayout
  layer: int | None


def match(name: str, rows: tuple[NameRule, ...]) -> Match | None:
  """Returns the parameter, layout and layer that a torch name stands for; None if no row has it.

  Raises: ValueError when two rows have it.
  """
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
  """Returns whether a tensor of this torch name may be dropped (IGNORED)."""
  return any(re.match(pattern, name) for pattern in IGNORED)


def _pattern(template: str) -> str:
  """Turns `a.{layer}.{p:x|y}` into a regular expression with named groups."""
  parts = re.split(r"(\{[^}]*\})", template)
  out = []
  for part in parts:
    if part == "{layer}":
      out.append(r"(?P<layer>0|[1-9][0-9]{0,5})")  # one way to write each
    elif part.startswith("{"):
      name, words = part[1:-1].split(":")
      out.append(f"(?P<{name}>{words})")
    else:
      out.append(re.escape(part))
  return "".join(out)


@dataclasses.dataclass(frozen=True)
class Target:
  """Holds the torch name of a parameter, with `{layer}` in it if its layers are stacked."""

  name: str
  layout: TensorLayout


def by_path(rows: tuple[NameRule, ...]) -> dict[str, Target]:
  """Returns {parameter path: torch name and layout}, the rows read backwards.

  Raises: ValueError when two rows have the same path.
  """
  targets: dict[str, Target] = {}
  for row in rows:
    for words in _choices(row.torch):
      torch, path = row.torch, row.path
      for field, word in words.items():
        torch = torch.replace(field, word)
        path = path.replace("{" + field[1:].split(":")[0] + "}", word)
      if path in targets:
        raise ValueError(f"{path} has two names: {targets[path].name}, {torch}")
      targets[path] = Target(torch, row.layout)
  return targets


def _choices(template: str) -> Iterator[dict[str, str]]:
  """Yields every way to fill the `{name:a|b}` of a template."""
  fields = re.findall(r"\{[^}:]*:[^}]*\}", template)
  for words in itertools.product(*(s[1:-1].split(":")[1].split("|") for s in fields)):
    yield dict(zip(fields, words, strict=True))
