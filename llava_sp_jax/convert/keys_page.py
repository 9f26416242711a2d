"""docs/foreign_settings.md: the tables of keys as a page; `python -m llava_sp_jax.convert.keys_page`."""

from __future__ import annotations

from llava_sp_jax.convert import keys
from llava_sp_jax.convert.key_tables import FILES
from llava_sp_jax.convert.keys import Key, Table

HEAD = f"""\
# Settings of others, key by key

What becomes of each key of the JSON files that `llava-sp convert` reads. A key in no table is
refused by name, unless `{keys.ALLOW}` passes it over; `null` is what a file does not say. Made from
the tables by `python -m llava_sp_jax.convert.keys_page`.
"""


def page() -> str:
  """The whole page."""
  return HEAD + "".join(f"\n## {name}\n\n{_section(table)}" for name, table in FILES.items())


def _section(table: Table) -> str:
  honored = [f"| `{name}` | {key.why} | {key.kind.what} |\n" for name, key in table.items()
             if key.place == keys.HONORED]  # fmt: skip
  refused = [f"| `{name}` | {_values(key)} | {key.why} |\n" for name, key in table.items()
             if key.place == keys.REFUSED]  # fmt: skip
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
  print(page(), end="")
