"""Which results are current: every record under docs/results against the sources it depends on.

Usage: python scripts/results.py [--make NAME] [--check]

Lists each result of docs/results/results.toml: current, or older than its sources (and which of them
changed), the commit and machine that made it, its command and what making it costs. --make runs the
command of one; --check ends with 1 when a result is older and its row gives no reason for it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from typing import Any

from llava_sp_jax import provenance

MISSING, CURRENT, OLDER = "missing", "current", "older than its sources"


def records(name: str) -> list[dict[str, Any]]:
  """The stamps of a result; each of its figures may have one of its own."""
  path = provenance.REPOSITORY / provenance.RESULTS / f"{name}.json"
  if not path.is_file():
    return []
  held = json.loads(path.read_text())
  if not isinstance(held, dict):
    return [{}]
  if "record" in held:
    return [held["record"]]
  stamped = [r for r in held.get("figures", []) if isinstance(r, dict) and "sources" in r]
  return [{**r, "files": held["sources"].get(r["sources"], {})} for r in stamped]


def state(name: str, row: dict[str, Any]) -> tuple[str, list[str]]:
  """How a result stands, and the files that changed since."""
  now = provenance.fingerprints(row["sources"])
  found = records(name)
  if not found:
    return MISSING, []
  changed: set[str] = set()
  for record in found:
    before = record.get("files", {})
    changed |= {file for file in {*now, *before} if now.get(file) != before.get(file)}
  return (OLDER if changed else CURRENT), sorted(changed)


def line(name: str, row: dict[str, Any]) -> list[str]:
  """What is said of a result."""
  how, changed = state(name, row)
  lines = [f"{name}: {how}"]
  made = {tuple(str(r.get(key) or "?") for key in ("commit", "machine", "when"))
          for r in records(name)}  # fmt: skip
  lines += [f"  made at {c} on {m}, {w}" for c, m, w in sorted(made)[-1:]]
  if len(made) > 1:
    lines[-1] += f", and {len(made) - 1} more records"
  lines.append(f"  {row['command']}    ({row['minutes']} min)")
  if changed:
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    lines.append(f"  changed since: {', '.join(changed[:4])}{more}")
    lines.append(f"  {row.get('older', 'no reason is given; make it anew')}")
  return lines


def make(name: str, table: dict[str, Any]) -> int:
  """Runs the command of a result in the repository's root."""
  if name not in table:
    raise SystemExit(f"no result {name!r}; known: {', '.join(table)}")
  words = shlex.split(table[name]["command"])
  words[0] = sys.executable if words[0] == "python" else words[0]
  return subprocess.run(words, cwd=provenance.REPOSITORY, check=False).returncode


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--make", metavar="NAME", default="", help="runs the command of a result")
  parser.add_argument("--check", action="store_true", help="1 when one is older without a reason")
  options = parser.parse_args()
  table = provenance.table()
  if options.make:
    return make(options.make, table)
  for name, row in table.items():
    print("\n".join(line(name, row)), end="\n\n")
  bad = [n for n, row in table.items() if state(n, row)[0] != CURRENT and not row.get("older")]
  print(f"{len(table)} results, {len(bad)} older than their sources without a reason"
        f"{': ' * bool(bad)}{', '.join(bad)}")  # fmt: skip
  return int(options.check and bool(bad))


if __name__ == "__main__":
  sys.exit(main())
