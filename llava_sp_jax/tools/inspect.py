"""llava-sp inspect: describes a checkpoint without reading its values."""

from __future__ import annotations

import argparse
import collections

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp inspect",
    description="Prints format, projector variant, families, sizes, dtypes, fingerprint and parameter "
    "counts of a run, a converted checkpoint, or anything that convert reads.",
    epilog="example: llava-sp inspect runs/finetune",
  )
  result.add_argument("checkpoint", metavar="CKPT")
  source_options(result)
  result.add_argument(
    "--fingerprint",
    action="store_true",
    help="read all values and compute the fingerprint of the base",
  )
  return result


def main(argv: list[str]) -> None:
  """Prints the description of a checkpoint."""
  options = parser().parse_args(argv)
  from llava_sp_jax.checkpoints import opening
  from llava_sp_jax.convert import formats, settings_out
  from llava_sp_jax.models import build

  given = to_options(options, options.checkpoint)
  source = opening.open_any(options.checkpoint, given, verify=options.fingerprint)
  model, data = source.config.model, source.config.data
  console.say(f"{options.checkpoint}: {source.format}, {source.config.name}")
  if "language_model" in source.parts:
    text = model.language_model
    console.say(
      f"language model  {settings_out.family(text)}: width {text.width}, {text.layers} layers, "
      f"{text.heads} heads ({text.kv_heads} kv), vocabulary {text.vocab_size}, rope "
      f"{text.rope_scaling.kind} at {text.rope_theta:g}"
    )
    console.say(
      f"adapters        rank {model.lora.rank}, alpha {model.lora.alpha:g}"
      if model.lora.rank
      else "adapters        none"
    )
  if "vision_tower" in source.parts:
    tower = model.tower
    console.say(
      f"vision tower    {tower.variant}: {tower.image_size} px, patch {tower.patch_size}, "
      f"width {tower.width}, {tower.layers} layers, select layer {tower.select_layer}"
    )
  if "projector" in source.parts:
    projector = model.projector
    console.say(
      f"projector       variant {projector.variant}, views {build.view_sizes(model)}, token width "
      f"{projector.token_width}, {build.image_token_count(model)} tokens per image"
    )
    console.say(
      f"images          {data.image_aspect}, {data.image_fit}, {data.image_resample}; template {data.template}"
    )
  fingerprint = opening.base_fingerprint(source) if options.fingerprint else source.fingerprint
  console.say(f"base            {source.base or '-'}; fingerprint {fingerprint or 'not stored'}")
  console.say(f"\n{'part':<16}{'parameters':>16}{'GB':>10}  dtypes")
  for part in formats.PARTS:
    leaves = [leaf for path, leaf in source.leaves.items() if path.startswith(part + "/")]
    if leaves:
      count = sum(leaf.nbytes // leaf.dtype.itemsize for leaf in leaves)
      size = sum(leaf.nbytes for leaf in leaves) / 1e9
      kinds = collections.Counter(str(leaf.dtype) for leaf in leaves)
      console.say(f"{part:<16}{count:>16,}{size:>10.3f}  {', '.join(sorted(kinds))}")
