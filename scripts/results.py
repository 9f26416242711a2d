"""Lists the results of docs/results, and which of them are older than their sources.

Usage: python scripts/results.py [--make NAME] [--confirm NAME] [--check]

Prints for each result of docs/results/results.toml whether it is current or older than its sources
(and which of them changed), the commit and machine that made it, its command, and the cost of the
command.
--make runs the command of a result. --check exits with code 1 if a result is older and its row gives
no reason. --confirm runs the short canary of a result (scripts/canary.py) instead of its command:
if every bit equals that of the sources that made the result, the result is current again. For a
result that is current it stores the canary.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_sp_jax import provenance

PROGRAMS = {"python": [sys.executable], "llava-sp": [sys.executable, "-m", "llava_sp_jax"]}
MISSING, CURRENT, OLDER = "missing", "current", "older than its sources"


def records(name: str) -> list[dict[str, Any]]:
  """Returns the stamps of a result; each of its figures may have its own."""
  if not path_of(name).is_file():
    return []
  held = json.loads(path_of(name).read_text())
  if not isinstance(held, dict):
    return [{}]
  if "record" in held:
    return [held["record"]]
  stamped = [r for r in held.get("figures", []) if isinstance(r, dict) and "sources" in r]
  return [{**r, "files": held["sources"].get(r["sources"], {})} for r in stamped]


def path_of(name: str) -> Path:
  return provenance.REPOSITORY / provenance.RESULTS / f"{name}.json"


def confirmed(name: str) -> dict[str, Any]:
  """Returns the stamp of the last sources that were confirmed to compute the same; empty without
  one.
  """
  held = json.loads(path_of(name).read_text()) if path_of(name).is_file() else {}
  return held.get("confirmed", {}) if isinstance(held, dict) else {}


def confirm(name: str, table: dict[str, Any]) -> int:
  """Compares the canary of the current sources with the stored one; returns 1 if they differ."""
  row = known(name, table)
  if "canary" not in row:
    raise SystemExit(f"{name}: its row has no canary; --make makes it anew")
  held, now = json.loads(path_of(name).read_text()), provenance.stamp(row["sources"])
  before = (held.get("confirmed") or records(name)[-1])["versions"]
  if before != now["versions"]:
    raise SystemExit(
      f"{name}: made with {before}, here is {now['versions']}; bits differ between them"
    )
  if "canary" not in held and state(name, row)[0] != CURRENT:
    raise SystemExit(
      f"{name}: no canary was kept of the sources that made it; --make makes it anew"
    )
  words = [sys.executable, *shlex.split(row["canary"])[1:]]
  # With the flags of XLA that the scripts set, because others change the last bits.
  flags = ["bash", "-c", 'source scripts/environment.sh; exec "$@"', "-"]
  done = subprocess.run(
    [*flags, *words], cwd=provenance.REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
  )
  if done.returncode:
    raise SystemExit(f"{name}: its canary ended with code {done.returncode}; its message is above")
  found = done.stdout.split()[-1]
  if held.setdefault("canary", found) != found:
    print(f"{name}: computes something else now (canary {found}, kept {held['canary']}); --make it")
    return 1
  path_of(name).write_text(json.dumps({**held, "confirmed": now}, indent=1) + "\n")
  print(f"{name}: computes the same to the last bit (canary {found})")
  return 0


def known(name: str, table: dict[str, Any]) -> dict[str, Any]:
  if name not in table:
    raise SystemExit(f"no result {name!r}; known: {', '.join(table)}")
  return table[name]  # type: ignore[no-any-return]


def state(name: str, row: dict[str, Any]) -> tuple[str, list[str]]:
  """Returns the state of a result, and the files that changed since."""
  now = provenance.fingerprints(row["sources"])
  found = records(name)
  if found and confirmed(name).get("files") == now:
    return CURRENT, []
  if not found:
    return MISSING, []
  changed: set[str] = set()
  for record in found:
    before = record.get("files", {})
    changed |= {file for file in {*now, *before} if now.get(file) != before.get(file)}
  return (OLDER if changed else CURRENT), sorted(changed)


def line(name: str, row: dict[str, Any]) -> list[str]:
  """Describes a result in lines of text."""
  how, changed = state(name, row)
  lines = [f"{name}: {how}"]
  made = {
    tuple(str(r.get(key) or "?") for key in ("commit", "machine", "when")) for r in records(name)
  }
  lines += [f"  made at {c} on {m}, {w}" for c, m, w in sorted(made)[-1:]]
  if len(made) > 1:
    lines[-1] += f", and {len(made) - 1} more records"
  lines.append(f"  {row['command']}    ({row['minutes']} min)")
  if same := confirmed(name):
    lines.append(f"  computes the same at {same['commit']}, {same['when']} (canary)")
  if changed:
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    lines.append(f"  changed since: {', '.join(changed[:4])}{more}")
    lines.append(f"  {row.get('older', 'no reason is given; make it anew')}")
  return lines


def make(name: str, table: dict[str, Any]) -> int:
  """Runs the command of a result in the root of the repository."""
  first, *words = shlex.split(known(name, table)["command"])
  program = PROGRAMS.get(first, [first])
  return subprocess.run([*program, *words], cwd=provenance.REPOSITORY, check=False).returncode


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--make", metavar="NAME", default="", help="runs the command of a result")
  parser.add_argument("--confirm", metavar="NAME", default="", help="runs the canary of a result")
  parser.add_argument(
    "--check", action="store_true", help="exits with code 1 if one is older without a reason"
  )
  options = parser.parse_args()
  table = provenance.table()
  if options.make:
    return make(options.make, table)
  if options.confirm:
    return confirm(options.confirm, table)
  for name, row in table.items():
    print("\n".join(line(name, row)), end="\n\n")
  bad = [n for n, row in table.items() if state(n, row)[0] != CURRENT and not row.get("older")]
  print(
    f"{len(table)} results, {len(bad)} older than their sources without a reason"
    f"{': ' * bool(bad)}{', '.join(bad)}"
  )
  return int(options.check and bool(bad))


if __name__ == "__main__":
  sys.exit(main())
