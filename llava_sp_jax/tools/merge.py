"""llava-sp merge: folds the adapters into the decoder's kernels."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options


def parser() -> argparse.ArgumentParser:
  result = arguments.Parser(
    prog="llava-sp merge",
    description="Writes a folder of ours whose decoder has the adapters in its kernels: the same "
    "answers without their matrices. The logits of both are compared on one prompt.",
    epilog="example: llava-sp merge runs/finetune merged",
  )
  result.add_argument("checkpoint", metavar="CKPT")
  result.add_argument("out", metavar="OUT", type=Path, help="new folder")
  source_options(result)
  result.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                      help="open what was written and compare its logits (default)")  # fmt: skip
  return result


def main(argv: list[str]) -> None:
  options = parser().parse_args(argv)
  from llava_sp_jax import folders
  from llava_sp_jax.convert import formats, load, save
  from llava_sp_jax.convert.torch_io import FormatError
  from llava_sp_jax.infer import verify

  folders.check(options.out, "merge")
  given = to_options(options, options.checkpoint)
  source = load.open_any(options.checkpoint, given)
  merged = save.fold(source)
  load.write(merged, options.out, command="merge")
  console.say(f"{options.out}: adapters of rank {source.config.model.lora.rank} folded")
  if options.verify:
    found = verify.compare(source, load.open_any(options.out, formats.Options()))
    if not found.within_bounds:
      raise FormatError(f"{options.out}: does not compute what it was merged from: {found}")
    console.say(found)
