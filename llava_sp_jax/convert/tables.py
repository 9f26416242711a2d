"""Names torch <-> jax: one table for each part, read in both directions.

A row is (torch name, our path, layout). `{layer}` is stacked into (or taken from) the leading axis;
any other `{name:a|b}` is one of the listed words and carried over. Names that may be dropped stand
in IGNORED. Sources: Hugging Face LLaMA, Qwen2, CLIP and SigLIP, PEFT, `llava/model/llava_arch.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from llava_sp_jax.convert.layout import TensorLayout, conv, linear, same, whole_view


@dataclasses.dataclass(frozen=True)
class NameRule:
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

_MLP = (
  NameRule("model.mm_projector.0.weight", "projector/fc1/kernel", linear),
  NameRule("model.mm_projector.0.bias", "projector/fc1/bias", same),
  NameRule("model.mm_projector.2.weight", "projector/fc2/kernel", linear),
  NameRule("model.mm_projector.2.bias", "projector/fc2/bias", same),
  NameRule("model.image_newline", "projector/image_newline", same),
)

# The parts of a projector's variant: (channels, scales) -> names. `{i}` of a path counts the scales.
Part = Callable[[int, Sequence[int]], tuple[NameRule, ...]]


def _views(torch: str, view: str, last: str = "") -> Part:
  """One kernel for each scale; `last` is the name of the largest, if it has another."""

  def part(channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
    names = [torch] * (len(scales) - 1) + [last or torch]
    return tuple(
      NameRule(
        name.format(size=size, number=i + 1), f"projector/{view}_{i}/kernel", whole_view(channels)
      )
      for i, (name, size) in enumerate(zip(names, scales, strict=True))
    )

  return part


def _out(torch: str, *parameters: str) -> Part:
  every = {
    "weight": NameRule(f"model.{torch}.1.weight", "projector/out/kernel", linear),
    "bias": NameRule(f"model.{torch}.1.bias", "projector/out/bias", same),
  }
  return lambda channels, scales: tuple(every[p] for p in parameters)


def _detail(
  kernel: int, conv_name: str, suffix: str = "", parts: Sequence[str] = ("query", "key", "value")
) -> Part:
  """A strided convolution and the norm and linear layer of each of `parts`."""
  path = f"projector/detail_{kernel}"
  rows = [NameRule(f"model.{conv_name}.weight", f"{path}/conv/kernel", conv)]
  for part in parts:
    name = f"model.{part}_projector{suffix}"
    rows += [
      NameRule(f"{name}.0.weight", f"{path}/{part}_norm/scale", same),
      NameRule(f"{name}.0.bias", f"{path}/{part}_norm/bias", same),
      NameRule(f"{name}.1.weight", f"{path}/{part}/kernel", linear),
      NameRule(f"{name}.1.bias", f"{path}/{part}/bias", same),
    ]
  return lambda channels, scales: tuple(rows)


def _transformer(view: str) -> Part:
  """torch's nn.Transformer without biases, one for each scale, with its query token."""

  def part(channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
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
          NameRule(f"{layer}linear{n}.weight", f"{ours}/layers/fc{n}/kernel", linear)
          for n in (1, 2)
        ]
        for norm in norms[:-1]:
          attention = layer + _ATTENTIONS[norm]
          rows += [
            NameRule(f"{attention}.in_proj_weight", f"{ours}/layers/{norm}_attn/in_proj", linear),
            NameRule(
              f"{attention}.out_proj.weight", f"{ours}/layers/{norm}_attn/o_proj/kernel", linear
            ),
          ]
    return tuple(rows)

  return part


_NORMS = {"encoder": ("self", "mlp"), "decoder": ("self", "cross", "mlp")}  # in torch's order
_ATTENTIONS = {"self": "self_attn", "cross": "multihead_attn"}


def _registers(channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
  return tuple(
    NameRule(f"model.register_{size}", f"projector/register_{i}/token", same)
    for i, size in enumerate(scales)
  )


_CROPS = _views("model.conv_{size}.weight", "crop")
# All but the whole grid follow their pooling in a torch Sequential, hence `.1`.
_POOLS = _views("model.conv_{size}.1.weight", "pool", last="model.conv_{size}.weight")
_OUT = _out("conv_linear", "weight")
_OUT_BIAS = _out("conv_linear", "weight", "bias")
_TFM_OUT = _out("tfm_linear", "weight")
_DETAIL = (_detail(16, "conv_CM"),)
# The original builds a value projection for `mid`, never uses it, and stores it: see IGNORED. It
# has no leaf here, so it cannot be written; the original then keeps its random one, without effect.
_DETAILS = (
  _detail(12, "conv_small", "_small"),
  _detail(9, "conv_mid", "_mid", parts=("query", "key")),
  _detail(5, "conv_huge", "_huge"),
)

# Rows of `models.projector.VARIANTS` and their parts. The original has no `both` and no `register`;
# their own names are `pool_<size>` beside its crops' `conv_<size>`, and `register_<size>`.
PROJECTORS: dict[str, tuple[Part, ...]] = {
  "none": (),
  "pooling": (_POOLS, _OUT),
  "cropping": (_CROPS, _OUT_BIAS, *_DETAIL),
  "cropping_sfe": (_CROPS, _OUT),
  "pooling_dfi": (_POOLS, _OUT, *_DETAIL),
  "cropping_multiscale_dfi": (_CROPS, _OUT, *_DETAILS),
  "pooling_multiscale_dfi": (_POOLS, _OUT_BIAS, *_DETAILS),
  "tokens_1": (_CROPS, _OUT),
  "tokens_3": (_CROPS, _OUT),
  "tokens_12": (_CROPS, _OUT),
  "crop_224": (_views("model.conv_{number}.weight", "crop"), _OUT),
  "cropping_transformer": (_transformer("crop"), _TFM_OUT),
  "pooling_transformer": (_transformer("pool"), _TFM_OUT),
  "detail_only": (_detail(12, "conv_CM", parts=()), _OUT),
  "both": (_CROPS, _views("model.pool_{size}.weight", "pool"), _OUT),
  "register": (_registers, _OUT),
}


def projector(variant: str, channels: int, scales: Sequence[int]) -> tuple[NameRule, ...]:
  """The names of a projector's variant. Raises: KeyError.

  `channels` is the tower's width, `scales` are the sizes of the views (`build.view_sizes`), which
  the original has in its names. `image_newline` is among them, used or not.
  """
  return _MLP + tuple(r for part in PROJECTORS[variant] for r in part(channels, scales))


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
  path: str
  layout: TensorLayout
  layer: int | None


def match(name: str, rows: tuple[NameRule, ...]) -> Match | None:
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
      out.append(r"(?P<layer>0|[1-9][0-9]{0,5})")  # one way to write each
    elif part.startswith("{"):
      name, words = part[1:-1].split(":")
      out.append(f"(?P<{name}>{words})")
    else:
      out.append(re.escape(part))
  return "".join(out)


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a leaf goes: a torch name, with `{layer}` in it when the leaf is a stack of layers."""

  name: str
  layout: TensorLayout


def by_path(rows: tuple[NameRule, ...]) -> dict[str, Target]:
  """The same rows read backwards: our path -> torch name. Raises: ValueError for a path twice."""
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
  """Every way to fill the `{name:a|b}` of a template."""
  fields = re.findall(r"\{[^}:]*:[^}]*\}", template)
  for words in itertools.product(*(s[1:-1].split(":")[1].split("|") for s in fields)):
    yield dict(zip(fields, words, strict=True))
