"""llava-sp export: writes a checkpoint in a format of other projects."""

from __future__ import annotations

import argparse

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options

EXAMPLES = """example:
  llava-sp export runs/finetune out --format huggingface        opens in transformers, and in vLLM
  llava-sp export runs/finetune out --format llava_lora --base vicuna-7b-v1.5
  llava-sp export checkpoints/llava-sp out --format llava --dtype bfloat16
"""


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp export",
    description="Writes a run, a converted checkpoint, or any checkpoint that convert reads, as "
    "huggingface (transformers, any variant), vllm (for image tokens of llava-sp encode), stablehlo "
    "(programs for jax alone), gguf (llama.cpp), llava_lora "
    "(adapter and non_lora_trainables.bin of the original code), llava (its merged folder), llava_hf "
    "(transformers' LLaVA), language_model or vision_tower alone. docs/leaving.md says which for "
    "whom.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument("checkpoint", metavar="CKPT")
  result.add_argument("out", metavar="OUT", help="new folder")
  result.add_argument(
    "--format",
    required=True,
    metavar="NAME",
    help="huggingface, vllm, stablehlo, gguf, llava_lora, llava, llava_hf, language_model or vision_tower",
  )
  source_options(result)
  result.add_argument(
    "--dtype",
    default="",
    choices=("", "float32", "bfloat16", "float16"),
    help="round every array (default: as stored)",
  )
  return result


def main(argv: list[str]) -> None:
  """Writes a checkpoint in the format of another project."""
  options = parser().parse_args(argv)
  from llava_sp_jax import folders
  from llava_sp_jax.checkpoints import opening
  from llava_sp_jax.convert import export

  folders.check(folders.local(options.out), "")  # before weights are read
  given = to_options(options, options.checkpoint)
  source = opening.open_any(options.checkpoint, given)
  export.export(source, options.format, options.out, options.dtype)
  row = export.EXPORTS[options.format]
  console.say(f"{options.out}: {row.what}")
  if said := row.note(source):
    console.say(said)
