"""Answers one question: python examples/answer.py CHECKPOINT QUESTION [IMAGE ...]"""

import sys
from collections.abc import Sequence

import llava_sp_jax as llava


def main(argv: Sequence[str]) -> None:
  checkpoint, question, *images = argv
  model = llava.load(checkpoint)  # a run, a folder of a known format, or a name of the hub
  for text in model.stream(question, images, generation=llava.Generation(max_new_tokens=64)):
    print(text, end="", flush=True)
  print()


if __name__ == "__main__":
  main(sys.argv[1:])
