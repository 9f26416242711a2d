"""Prints docs/foreign_settings.md, a page of the tables of keys."""

from __future__ import annotations

import argparse

from llava_sp_jax.convert import adapter_keys, huggingface_keys, key_tables, keys
from llava_sp_jax.convert.keys import Key, Table

# {file: its table}, for tests and docs.
FILES: dict[str, Table] = {
  "config.json of a LLaMA": key_tables.DECODERS["llama"],
  "config.json of a Mistral": key_tables.DECODERS["mistral"],
  "config.json of a Qwen2": key_tables.DECODERS["qwen2"],
  "rope_parameters, rope_scaling": key_tables.ROPE,
  "config.json of LLaVA, beside its decoder's keys": key_tables.LLAVA,
  "config.json of llava-hf": key_tables.LLAVA_HF,
  "vision_config of CLIP": key_tables.TOWERS["clip"],
  "vision_config of SigLIP": key_tables.TOWERS["siglip"],
  "config.json of CLIP and SigLIP": key_tables.WHOLE_TOWER,
  "adapter_config.json": adapter_keys.ADAPTER, "preprocessor_config.json": key_tables.PROCESSOR_IMAGE,
  "processor_config.json": key_tables.PROCESSOR, "tokenizer_config.json": key_tables.TOKENIZER,
  "generation_config.json": key_tables.GENERATION, "llava_sp.json": key_tables.NOTE,
  "config.json of --format huggingface": huggingface_keys.CONFIG,
  "projector in it": huggingface_keys.PROJECTOR,
  "processor_config.json of --format huggingface": huggingface_keys.PROCESSOR,
  "image_processor in it": huggingface_keys.IMAGES,
}  # fmt: skip

HEAD = f"""\
# Settings of others, key by key

What becomes of each key of the JSON files that `llava-sp convert` reads. A key in no table is
refused by name, unless `{keys.ALLOW}` passes it over; `null` is what a file does not say. Made from
the tables by `python -m llava_sp_jax.convert.keys_page`.
"""


def page() -> str:
  """Returns the text of docs/foreign_settings.md."""
  return HEAD + "".join(f"\n## {name}\n\n{_section(table)}" for name, table in FILES.items())


def _section(table: Table) -> str:
  honored = [
    f"| `{name}` | {key.why} | {key.kind.what} |\n"
    for name, key in table.items()
    if key.place == keys.HONORED
  ]
  refused = [
    f"| `{name}` | {_values(key)} | {key.why} |\n"
    for name, key in table.items()
    if key.place == keys.REFUSED
  ]
  text = ""
  if honored:
    text += "| honored | what it decides | values |\n|---|---|---|\n" + "".join(honored) + "\n"
  if refused:
    text += "| refused but for | these values | because |\n|---|---|---|\n" + "".join(refused)
    text += "\n"
  reasons: dict[str, list[str]] = {}
  for name, key in table.items():
    if key.place == keys.IDLE:
      reasons.setdefault(key.why, []).append(f"`{name}`")
  text += "".join(
    f"- Without effect, {why}: {', '.join(names)}\n" for why, names in reasons.items()
  )
  return text


def _values(key: Key) -> str:
  if key.values == keys.NOTHING:
    return "none"
  return ", ".join(f"`{value!r}`" for value in key.values or ())


if __name__ == "__main__":
  argparse.ArgumentParser(description="Prints docs/foreign_settings.md.").parse_args()
  print(page(), end="")
