"""llava-sp generate: answers a question about images."""

from __future__ import annotations

import argparse

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.convert import source_options, to_options


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
  arguments.generation_options(result, max_new_tokens=64)
  arguments.model_options(result)
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

  generation = arguments.to_generation(parser(), options)
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
