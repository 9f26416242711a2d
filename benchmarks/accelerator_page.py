"""Writes the page of a record of accelerator.py: a table for each section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# section: what a reader must know about its figures.
SAYS = {
  "peer": "A LoRA step of the same decoder, tower and rows in torch: transformers' Llava with PEFT, bfloat16, "
  "gradient checkpointing; of the numbers of rows that fit, the one with the most tokens a second.",
  "rates": "Square products of 8,192, and one reading of 4 GiB.",
  "correct": "Errors against float32 on the CPU: norm of the difference / norm of the CPU's.",
  "train": "A LoRA step of full rows, the most that fit. MFU counts what the model needs; `of_peer` are its "
  "tokens a second / the peer's in the same call; `plan_gib` is what `llava-sp plan` counts of the program.",
  "decode": "`of_memory_limit`: the time to read kernels and cache at the rate above / the time taken.",
  "prefill": "Whole prompts of text.",
  "engine": "Random weights, 8 tokens an answer; pictures are read from JPEG files.",
  "flips": "Greedy answers of the demo's checkpoint with other tokens than float32 on the CPU; margins "
  "are leads in logits.",
  "variants": "The step with other settings.",
}


def page(record: Mapping[str, Any]) -> str:
  """Returns Markdown. An unknown figure is a dash."""
  stamp = record["record"]
  machine, versions = stamp["machine"], stamp["versions"]
  known = [f"{name} {version}" for name, version in versions.items() if version]
  made_by = (
    f"`{stamp['command']}`"
    if stamp["command"]
    else "an earlier form of `benchmarks/accelerator.py`"
  )
  about = [f"Made by {made_by}", f"at commit {stamp['commit'] or '-'}"]
  about += [stamp["when"]] if stamp["when"] else []
  runs = ", ".join([str(machine["device"]), *filter(None, [machine.get("runtime")]), *known])
  lines = [
    "# On an accelerator",
    "",
    f"{', '.join(about)}. {runs}.",
    "What each section measures: [accelerator.md](../accelerator.md).",
  ]
  for section, rows in record["figures"].items():
    lines += ["", f"## {section}", "", SAYS[section], "", *_table(rows)]
  return "\n".join(lines) + "\n"


def _table(rows: list[Mapping[str, Any]]) -> list[str]:
  columns = list(dict.fromkeys(name for row in rows for name in row))
  body = [[_cell(row.get(name)) for name in columns] for row in rows]
  return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *body)]


def _cell(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, dict):
    return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
  if isinstance(value, list):
    return ", ".join(map(_cell, value))
  if isinstance(value, str):
    return value
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
