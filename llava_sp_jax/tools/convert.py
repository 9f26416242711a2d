"""llava-sp convert: converts a checkpoint of LLaVA-SP, LLaVA-1.5, LLaMA or CLIP to our format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llava_sp_jax import console, storage
from llava_sp_jax.tools import arguments

if TYPE_CHECKING:
  from llava_sp_jax.convert import formats
  from llava_sp_jax.convert.loaded import Loaded

EXAMPLES = """example:
  llava-sp convert llava-sp-cropping-lora checkpoints/llava-sp
  llava-sp convert llava-sp-lora out --base vicuna-7b-v1.5 --tower clip-vit-large-patch14-336
  llava-sp convert vicuna-7b-v1.5 checkpoints/vicuna      then --config.init.language_model=...
"""


def source_options(parser: argparse.ArgumentParser) -> None:
  """Adds options for facts that a checkpoint may not contain."""
  parser.add_argument("--base", default="", help="folder of the base language model of a LoRA")
  parser.add_argument("--tower", default="", help="folder of the vision tower")
  parser.add_argument("--variant", default="", help="of the projector, where names do not tell it")
  parser.add_argument(
    "--template",
    default="",
    help="conversation template (default: v1, where nothing speaks against it)",
  )
  parser.add_argument(
    "--allow-unknown",
    action="store_true",
    help="pass over keys of settings files whose effect is not known here",
  )


def to_options(given: argparse.Namespace, path: str) -> formats.Options:
  """Returns the values of `source_options` for the checkpoint at `path`.

  Raises: ConfigError for an option whose value a run or a folder of ours contains.
  """
  from llava_sp_jax.checkpoints import own_folders
  from llava_sp_jax.config import ConfigError
  from llava_sp_jax.convert import formats

  options = [f"--{name}" for name in ("variant", "template") if getattr(given, name)]
  if options and own_folders.is_ours(path):
    raise ConfigError(f"{path}: says itself what {' and '.join(options)} would say; leave that out")
  return formats.Options(
    given.base, given.tower, given.variant, given.template, allow_unknown=given.allow_unknown
  )


def described(source: Loaded) -> list[str]:
  """Returns lines for the user that describe an opened checkpoint: sizes, images, variant."""
  from llava_sp_jax.models import build

  model, data, lines = source.config.model, source.config.data, []
  if "language_model" in source.parts:
    text, lora = model.language_model, model.lora
    lines.append(
      f"decoder     width {text.width}, {text.layers} layers, vocabulary {text.vocab_size}"
    )
    lines.append(
      f"adapters    rank {lora.rank}, alpha {lora.alpha:g}" if lora.rank else "adapters    none"
    )
  if "vision_tower" in source.parts:
    tower, grid = model.tower, build.patch_grid(model)
    lines.append(
      f"tower       {tower.variant}, layer {tower.select_layer} of {tower.layers}, "
      f"grid {grid}x{grid} of {tower.image_size} px"
    )
    lines.append(
      f"pictures    {data.image_aspect}, {data.image_fit}, {data.image_resample}, mean "
      f"{_numbers(data.image_mean)}, std {_numbers(data.image_std)}"
    )
  if "projector" in source.parts:
    lines.append(
      f"variant     {model.projector.variant}, views {build.view_sizes(model)}, "
      f"{build.image_token_count(model)} tokens an image"
    )
    lines.append(f"template    {data.template}")
  else:
    lines.append(f"parts       {', '.join(source.parts)}: no projector, so no pictures on its own")
  return lines


def _numbers(values: tuple[float, ...]) -> str:
  return " ".join(f"{v:.4g}" for v in values)


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp convert",
    description="Reads a torch checkpoint (its format is found out) and writes a folder that "
    "train, eval, generate and export take. All names and shapes are checked first; values are "
    "streamed, so memory stays far below the size of the model.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument(
    "source", metavar="IN", help="folder, .gguf file, or hf:organization/name of the hub"
  )
  result.add_argument("out", metavar="OUT", type=storage.place, help="new folder")
  source_options(result)
  result.add_argument(
    "--dtype",
    default="",
    choices=("", "float32", "bfloat16", "float16"),
    help="round every array (default: as stored)",
  )
  return result


def main(argv: list[str]) -> None:
  """Converts a checkpoint, and prints what it contains."""
  options = parser().parse_args(argv)
  import jax

  from llava_sp_jax import folders
  from llava_sp_jax.checkpoints import opening, tokenizers, writing
  from llava_sp_jax.convert import formats
  from llava_sp_jax.distributed import processes

  folders.check(options.out, "convert")  # before weights are read
  processes.start()
  source = opening.open_any(options.source, to_options(options, options.source))
  tokenizers.open_tokenizer(source)
  opening.verify_base(source)
  writing.write(source, options.out, options.dtype)
  if jax.process_index():
    return
  size = sum(leaf.nbytes for leaf in source.leaves.values())
  console.say("\n".join(described(source)))
  form = formats.FORMATS.get(source.format)
  console.say(
    f"{options.out}: {form.what if form else 'a folder of ours'}, variant "
    f"{source.config.model.projector.variant}, {size / 1e9:.2f} GB"
  )
