"""llava-sp encode: writes the image tokens of pictures, for a program that has the decoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options

EXAMPLES = """example:
  llava-sp encode runs/finetune tokens.pt a.png b.png      multi_modal_data={"image": torch.load(..)}
  llava-sp encode runs/finetune parts.jsonl a.png b.png    a part of a chat message for each picture
  llava-sp encode runs/finetune tokens.npy a.png b.png     an array [pictures, tokens, width]
"""


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp encode",
    description="Writes what the decoder reads of pictures. For a vLLM that runs what `llava-sp "
    "export --format vllm` wrote: a tensor [pictures, tokens, width] of torch, or parts of chat "
    "messages. For llama.cpp, after `--format gguf`: an array of numpy, or a safetensors file with "
    "an array for each picture. docs/leaving.md says how to use them.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument("checkpoint", metavar="CKPT")
  result.add_argument(
    "out", metavar="OUT", type=Path, help="new file, .pt, .jsonl, .npy or .safetensors"
  )
  result.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path)
  source_options(result)
  result.add_argument(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16", "float16"),
    help="of the tokens that are written (default: float32)",
  )
  return result


def main(argv: list[str]) -> None:
  """Writes the image tokens of pictures to a file."""
  options = parser().parse_args(argv)
  import jax.numpy as jnp
  import numpy as np

  from llava_sp_jax.convert import image_embeds
  from llava_sp_jax.convert.leaves import rounded
  from llava_sp_jax.convert.torch_io import FormatError
  from llava_sp_jax.infer import vlm

  image_embeds.check_name(options.out)  # before weights are read
  if options.out.exists():
    raise FormatError(f"{options.out}: exists; name a new file")
  model = vlm.load(options.checkpoint, options=to_options(options, options.checkpoint))
  dtype = np.dtype(jnp.dtype(options.dtype))
  found = [
    rounded(model.encode_image(picture), dtype, str(picture)) for picture in options.pictures
  ]
  image_embeds.write(found, options.out)
  counts = ", ".join(str(len(tokens)) for tokens in found)
  console.say(f"{options.out}: {counts} tokens of width {found[0].shape[1]}, {options.dtype}")
