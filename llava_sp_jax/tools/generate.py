"""llava-sp generate: answers a question about images."""

from __future__ import annotations

import argparse

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options

MESH = (
  "devices as DATA,FSDP,TENSOR: 1,1,4 divides kernels over four; -1: what is left (default: one)"
)
DTYPES = ("float32", "bfloat16")
DTYPE = "what the model computes in (default: the checkpoint's config)"


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp generate",
    description="Answers a question about images (or about nothing, without --image).",
    epilog='example: llava-sp generate --checkpoint runs/finetune --image x.png --question "what '
    'shape is in the image?"',
  )
  result.add_argument(
    "--checkpoint", required=True, help="run of llava-sp train, or any format of llava-sp convert"
  )
  source_options(result)
  result.add_argument("--image", action="append", default=[], help="picture file; may be repeated")
  result.add_argument("--question", required=True, help="<image> in it stands for a picture")
  result.add_argument("--stream", action="store_true", help="print the answer as it comes")
  result.add_argument("--max-new-tokens", type=int, default=64)
  result.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
  result.add_argument("--top-k", type=int, default=0, help="draw from so many tokens; 0: all")
  result.add_argument(
    "--top-p", type=float, default=1.0, help="draw from the likeliest, up to this"
  )
  result.add_argument("--num-beams", type=int, default=1, help="beam search (1: none)")
  result.add_argument("--stop", action="append", default=[], help="text that ends an answer")
  result.add_argument("--seed", type=int, default=0, help="of the sampling")
  result.add_argument("--mesh", default="", help=MESH)
  result.add_argument("--dtype", default="", choices=DTYPES, help=DTYPE)
  arguments.format_options(result.add_argument)
  return result


def main(argv: list[str]) -> int:
  """Prints the answer to a question; returns 1 if it cannot be answered, else 0."""
  options = parser().parse_args(argv)
  if not options.question.strip():
    parser().error(f"--question: expected a text, found {options.question!r}")
  from pathlib import Path

  from llava_sp_jax.data import decode
  from llava_sp_jax.distributed import mesh
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine, Request
  from llava_sp_jax.infer.generation import Generation

  try:
    generation = Generation(
      max_new_tokens=options.max_new_tokens,
      temperature=options.temperature,
      top_k=options.top_k,
      top_p=options.top_p,
      num_beams=options.num_beams,
      stop=tuple(options.stop),
      seed=options.seed,
    )
  except ValueError as error:
    setting, found = str(error).split(":", 1)
    parser().error(f"--{setting.replace('_', '-')}:{found}")
  # Read here, so that a missing image is reported before a model is loaded.
  pictures = tuple(decode.read(Path(path)) for path in options.image)
  devices = mesh.local(options.mesh)
  loaded = pretrained.from_any(
    options.checkpoint,
    to_options(options, options.checkpoint),
    dtype=options.dtype,
    weights=options.weights,
    cache=options.cache,
  )
  engine = Engine(loaded, 1, generation, devices)
  request = Request(options.question, pictures)
  if options.stream:
    try:
      for text in engine.stream(request):
        console.say(text, end="")
    except ValueError as error:
      console.say(f"llava-sp generate: {console.one_line(error)}", error=True)
      return 1
    console.say("")
    return 0
  answer = next(engine.answer([request]))
  if answer.error:
    console.say(f"llava-sp generate: {console.one_line(answer.error)}", error=True)
    return 1
  console.say(answer.text)
  return 0
