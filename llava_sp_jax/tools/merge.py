"""llava-sp merge: folds the adapters into the decoder's kernels."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from llava_sp_jax import console, storage
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options

if TYPE_CHECKING:
  from llava_sp_jax.convert.loaded import Loaded


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp merge",
    description="Writes a folder of ours whose decoder has the adapters in its kernels: the same "
    "answers without their matrices. The logits of both are compared on one prompt.",
    epilog="example: llava-sp merge runs/finetune merged",
  )
  result.add_argument("checkpoint", metavar="CKPT")
  result.add_argument("out", metavar="OUT", type=storage.place, help="new folder")
  source_options(result)
  result.add_argument(
    "--verify",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="open what was written and compare its logits (default)",
  )
  return result


def _completed(source: Loaded) -> Loaded:
  """Adds a small tower and a projector of zeros to a decoder without them, so that it can run."""
  if "projector" in source.parts:
    return source
  import numpy as np
  from flax.traverse_util import flatten_dict

  from llava_sp_jax import config as config_lib
  from llava_sp_jax.convert.leaves import in_memory
  from llava_sp_jax.models import build

  tower = config_lib.TowerConfig(image_size=28, width=8, layers=2, heads=2, mlp_width=8)
  model = dataclasses.replace(
    source.config.model, tower=tower, projector=config_lib.ProjectorConfig(variant="none")
  )
  kept = {p: leaf for p, leaf in source.leaves.items() if p.startswith("language_model/")}
  zeros = {
    p: np.zeros(x.shape, np.float32)
    for p, x in flatten_dict(build.abstract(model), sep="/").items()
    if p not in kept
  }
  config = dataclasses.replace(source.config, model=model)
  return dataclasses.replace(source, config=config, leaves={**in_memory(zeros), **kept})


def main(argv: list[str]) -> None:
  """Adds the adapters of a checkpoint to its weights, and verifies what was written.

  Raises: FormatError for a checkpoint without a decoder, or when the logits differ.
  """
  options = parser().parse_args(argv)
  from llava_sp_jax import folders
  from llava_sp_jax.checkpoints import opening, writing
  from llava_sp_jax.convert import folding, formats
  from llava_sp_jax.convert.torch_io import FormatError
  from llava_sp_jax.infer import verify

  folders.check(options.out, "merge")
  given = to_options(options, options.checkpoint)
  source = opening.open_any(options.checkpoint, given)
  if "language_model" not in source.parts:
    raise FormatError(
      f"{options.checkpoint}: no decoder in it, so no adapters that could be folded"
    )
  merged = folding.fold(source)
  writing.write(merged, options.out, command="merge")
  console.say(f"{options.out}: adapters of rank {source.config.model.lora.rank} folded")
  if options.verify:
    written = opening.open_any(options.out, formats.Options())
    found = verify.compare(_completed(source), _completed(written))
    if not found.within_bounds:
      raise FormatError(f"{options.out}: does not compute what it was merged from: {found}")
    console.say(found)
