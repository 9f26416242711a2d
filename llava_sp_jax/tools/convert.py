"""llava-sp convert: any checkpoint of LLaVA-SP, LLaVA-1.5, LLaMA or CLIP -> a folder of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """example:
  llava-sp convert llava-sp-cropping-lora checkpoints/llava-sp
  llava-sp convert llava-sp-lora out --base vicuna-7b-v1.5 --tower clip-vit-large-patch14-336
  llava-sp convert vicuna-7b-v1.5 checkpoints/vicuna      then --config.init.language_model=...
"""


def source_options(parser: argparse.ArgumentParser) -> None:
  """What a checkpoint may not say itself."""
  parser.add_argument("--base", default="", help="folder of the base language model of a LoRA")
  parser.add_argument("--tower", default="", help="folder of the vision tower")
  parser.add_argument("--row", default="", help="projector row, where names do not tell it")
  parser.add_argument("--template", default="", help="conversation template (default: v1)")


def parser() -> argparse.ArgumentParser:
  result = argparse.ArgumentParser(
    prog="llava-sp convert",
    description="Reads a torch checkpoint (its format is found out) and writes a folder that "
    "train, eval, generate and export take. All names and shapes are checked first; values are "
    "streamed, so memory stays far below the size of the model.",
    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  result.add_argument("source", metavar="IN", help="folder, or a .gguf file")
  result.add_argument("out", metavar="OUT", type=Path, help="new folder")
  source_options(result)
  result.add_argument("--dtype", default="", choices=("", "float32", "bfloat16", "float16"),
                      help="round every array (default: as stored)")  # fmt: skip
  return result


def main(argv: list[str]) -> None:
  options = parser().parse_args(argv)
  import jax

  from llava_sp_jax import folders, processes
  from llava_sp_jax.convert import formats, load

  folders.check(options.out, "convert")  # before weights are read
  processes.start()
  source = load.open_any(
    options.source,
    formats.Options(options.base, options.tower, options.row, options.template),
  )
  load.verify_template(source)
  load.verify_base(source)
  load.write(source, options.out, options.dtype)
  if jax.process_index():
    return
  size = sum(leaf.nbytes for leaf in source.leaves.values())
  print(f"{options.out}: {formats.FORMATS[source.format].what}, row "
        f"{source.config.model.projector.row}, {size / 1e9:.2f} GB")  # fmt: skip
