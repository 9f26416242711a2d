"""Prints docs/request_fields.md: what becomes of every field of a request."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from llava_sp_jax.convert import keys
from llava_sp_jax.serve import openapi, reading

HEAD = """\
# Fields of requests

What the server does with the fields that clients of OpenAI's protocol send. A field that is in none
of these tables is ignored, and `null` is the same as a missing field. A refused field is an error
with status 400 that names it. Made from the tables by `python -m llava_sp_jax.serve.fields_page`.
"""
# Words of a JSON schema -> how they are written behind a kind of value.
BOUNDS = {
  "minimum": "at least {}",
  "exclusiveMinimum": "above {}",
  "maximum": "at most {}",
  "minItems": "at least {} items",
}


def page() -> str:
  """Returns the text of docs/request_fields.md."""
  sections = (
    f"\n## {endpoint.path}\n\n{endpoint.summary}.\n\n{_section(endpoint.form)}"
    for endpoint in openapi.ENDPOINTS
    if endpoint.form
  )
  return HEAD + "".join(sections)


def _section(form: type[msgspec.Struct]) -> str:
  _, schemas = msgspec.json.schema_components([form])
  read = "".join(
    f"| `{name}` | {_kind(schema)} |\n"
    for name, schema in schemas[form.__name__]["properties"].items()
  )
  refused, idle = "", dict[str, list[str]]()
  for name, key in reading.OTHERS[form].items():
    if key.place == keys.IDLE:
      idle.setdefault(key.why, []).append(f"`{name}`")
    else:
      values = () if key.values == keys.NOTHING else key.values or ()
      known = ", ".join(f"`{json.dumps(value)}`" for value in values) or "none"
      refused += f"| `{name}` | {known} | {key.why} |\n"
  text = f"| read | values |\n|---|---|\n{read}\n"
  text += f"| refused but for | these values | because |\n|---|---|---|\n{refused}"
  ignored = "".join(f"- Without effect, {why}: {', '.join(names)}\n" for why, names in idle.items())
  return text + (f"\n{ignored}" if ignored else "")


def _kind(schema: dict[str, Any]) -> str:
  """Returns the kinds of a JSON schema in words, without null."""
  if "anyOf" in schema and "discriminator" not in schema:
    kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
    return " or ".join(map(_kind, kinds))
  kind = schema.get("type") or schema.get("$ref", "one of several objects").rpartition("/")[2]
  bounds = [told.format(schema[word]) for word, told in BOUNDS.items() if word in schema]
  inner = [f"of {_kind(schema['items'])}"] if "items" in schema else []
  said = [schema["description"]] if "description" in schema else []
  return " ".join([kind, *inner]) + "".join(f", {text}" for text in [*bounds, *said])


if __name__ == "__main__":
  argparse.ArgumentParser(description="Prints docs/request_fields.md.").parse_args()
  print(page(), end="")
