"""Keeps plans as records: OUT.json, and a table of them in markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp_jax import provenance
from llava_sp_jax.files import FormatError
from llava_sp_jax.plan import calibration
from llava_sp_jax.plan.compile import TRAIN
from llava_sp_jax.plan.topologies import topology

# Identify a record; a new one replaces its old.
RECORD_KEYS = (
  "model", "settings", "topology", "what", "rows", "row_length", "images_per_row", "mesh", "accumulate",
  "remat", "base", "weights", "cache", "quantize", "products", "filled", "samples", "unrolled",
  "predictor", "options",
)  # fmt: skip


def check(out: Path) -> None:
  """Reads OUT.json before anything is compiled for it.

  Raises: FormatError if it is there and has no plans.
  """
  file = provenance.named(out, "json")
  try:
    records = provenance.read(out, [])
    plans = isinstance(records, list) and all(
      {"model", "topology", "what"} <= r.keys() for r in records
    )
  except (ValueError, AttributeError):
    plans = False
  if not plans:
    raise FormatError(
      f"{file}: expected the plans of earlier commands, found something else; give --out another name"
    )


def append(out: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
  """Adds a record to OUT.json and returns all records.

  It replaces an older one that is the same in RECORD_KEYS.
  """
  records = provenance.read(out, [])
  key = [record.get(k) for k in RECORD_KEYS]
  records = [r for r in records if [r.get(k) for k in RECORD_KEYS] != key] + [record]
  provenance.write(out, records, beside=True)
  return records


# Column of the table -> the values of a record that its cell shows, "-" for those that are missing.
COLUMNS: dict[str, tuple[str, ...]] = {
  "model": ("model", "weights", "cache", "quantize"),
  "settings": ("settings",),
  "topology": ("topology",),
  "what": ("what",),
  "rows": ("rows",),
  "of": ("row_length",),
  "images": ("images_per_row",),
  "filled": ("filled",),
  "samples": ("samples",),
  "mesh": ("mesh",),
  "accumulate": ("accumulate",),
  "remat": ("remat",),
  "base": ("base",),
  "unrolled": ("unrolled",),
  "products": ("products",),
  "s/step": ("step_seconds",),
  "by published runs": ("step_seconds_published",),
  "MFU": ("mfu",),
  "tokens/s": ("tokens_per_second",),
  "s/decode step": ("decode_step_seconds",),
  "HBM GiB": ("hbm_gib",),
  "of GiB": ("hbm_limit_gib",),
  "predictor": ("predictor",),
  "compiler": ("compiler", "options"),
}


def table(records: list[dict[str, Any]]) -> str:
  """Returns the text of OUT.md: a table in markdown with a row for each record."""
  lines = [
    "# Plans for absent chips",
    "",
    "Made by `llava-sp plan`: the real programs, compiled by the real compiler for chips that were "
    "not there. Times are predicted, not measured; beside a predicted step is what published runs on "
    "that chip say of it. A step is a training step; for `eval` it is the "
    "prefill of prompts into all rows, each with images of its own. The mesh is data x fsdp x "
    "tensor. Tokens that count are `filled` of the places of a row. Attention skips what `samples` "
    "equal samples of a row do not see of each other; - is one sample, for which a step of many "
    "chips waits. Rows with the same `settings` are of the same model, optimizer and kind of rows. "
    "`unrolled` is how many layers a turn of the loop over layers has (`model.scan_unroll`); - is one.",
    "",
    "| " + " | ".join(COLUMNS) + " |",
    "|" + "---|" * len(COLUMNS),
  ]
  for record in records:
    shown = {"step_seconds_published": _published(record)} | record
    shown |= {} if record["fits"] else {"step_seconds": "does not fit"}
    cells = [[_cell(shown[key]) for key in keys if key in shown] for keys in COLUMNS.values()]
    lines.append("| " + " | ".join(" ".join(cell) or "-" for cell in cells) + " |")
  return "\n".join(lines) + "\n"


def _published(record: dict[str, Any]) -> list[float] | None:
  """Returns the band of a record that was made without one."""
  if record["what"] != TRAIN or record["step_seconds"] is None:
    return None
  band = calibration.band(topology(record["topology"]), record["step_seconds"])
  return [round(seconds, 4) for seconds in band] if band else None


def _cell(value: Any) -> str:
  if isinstance(value, list):
    return calibration.text(value)
  if isinstance(value, dict):
    return " x ".join(str(size) for size in value.values())
  return "-" if value is None else str(value)
