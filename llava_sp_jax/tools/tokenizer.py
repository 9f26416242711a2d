"""llava-sp tokenizer: rebuilds a Hugging Face tokenizer folder from a GGUF file."""

from __future__ import annotations

from pathlib import Path

from llava_sp_jax import console, folders
from llava_sp_jax.tools import arguments


def main(argv: list[str]) -> None:
  """Writes the tokenizer of a GGUF file."""
  parser = arguments.Parser(
    prog="llava-sp tokenizer",
    description="Writes tokenizer.json and tokenizer_config.json from the metadata of a GGUF.",
    epilog="example: llava-sp tokenizer SmolLM2-135M-Instruct.Q4_1.gguf data/smollm2",
  )
  parser.add_argument("gguf", type=Path)
  parser.add_argument("out", help="new folder")
  options = parser.parse_args(argv)
  from llava_sp_jax.convert import gguf_tokenizer

  out = folders.local(options.out)
  with folders.new(out, "tokenizer"):
    gguf_tokenizer.write_tokenizer(options.gguf, out)
  console.say(f"written: {options.out}/tokenizer.json")
