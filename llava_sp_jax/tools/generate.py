"""llava-sp generate: answers a question about an image."""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
  result = argparse.ArgumentParser(
    prog="llava-sp generate",
    description="Answers a question about an image (or about nothing, without --image).",
    epilog='example: llava-sp generate --checkpoint runs/finetune --image x.png --question "what '
    'shape is in the image?"',
  )
  result.add_argument("--checkpoint", required=True, help="run folder of llava-sp train")
  result.add_argument("--image", default=None, help="picture file")
  result.add_argument("--question", required=True)
  result.add_argument("--max-new-tokens", type=int, default=64)
  result.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
  result.add_argument("--seed", type=int, default=0, help="of the sampling")
  return result


def main(argv: list[str]) -> None:
  options = parser().parse_args(argv)
  from pathlib import Path

  from llava_sp_jax.data import image
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine, Request

  picture = image.read(Path(options.image)) if options.image else None
  model = pretrained.from_run(options.checkpoint)
  engine = Engine(model, 1, options.max_new_tokens, options.temperature, options.seed)
  print(next(iter(engine.answer([Request(options.question, picture)]))).text)
