"""Records where a figure comes from: the commit, a hash of its sources, versions and machine.

Each result depends on sources that docs/results/results.toml lists, beside the command that makes
it. `scripts/results.py` says which results are older than their sources.
"""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import tokenize
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("docs/results")
TABLE = RESULTS / "results.toml"
VERSIONS = ("jax", "jaxlib", "flax", "numpy")  # packages; Python's version is added
EVERYTHING = ("llava_sp_jax",)
# CPython 3.11 counts the depth of syntax trees for all threads together, so two threads that parse
# at once raise a SystemError (python/cpython#106905).
PARSING = threading.Lock()


def table(root: Path = REPOSITORY) -> dict[str, dict[str, Any]]:
  """Returns {name of a result: its row} with command, sources, minutes and other keys of the row.

  Groups in `sources` are expanded. An installed package has no table, so the result is empty.
  `root` is the folder of the repository, here and below.
  """
  path = root / TABLE  # an installed package has none
  rows = tomllib.loads(path.read_text()) if path.is_file() else {}
  groups = rows.pop("groups", {})
  for row in rows.values():
    parts = [
      groups[s.removeprefix("group:")] if s.startswith("group:") else [s] for s in row["sources"]
    ]
    row["sources"] = [source for part in parts for source in part]
  return rows


def files(sources: Iterable[str], root: Path = REPOSITORY) -> list[Path]:
  """Returns the sorted files that `sources` name, relative to `root`.

  A source is a file, a folder (its Python files), or a pattern.

  Raises: FileNotFoundError for a source that matches nothing.
  """
  found = set()
  for source in sources:
    path = root / source
    matches = path.rglob("*.py") if path.is_dir() else root.glob(source)
    here = {match for match in matches if match.is_file()}
    if not here:
      raise FileNotFoundError(f"{root / source}: a source of a result, but no such file")
    found |= here
  return sorted(found)


def fingerprints(sources: Iterable[str], root: Path = REPOSITORY) -> dict[str, str]:
  """Returns {file: short hash} of the files that `sources` name.

  Comments, docstrings and empty lines of Python do not count.
  """
  return {str(path.relative_to(root)): fingerprint(path) for path in files(sources, root)}


def fingerprint(path: Path) -> str:
  """Returns a short hash of a file, of Python without comments, docstrings and empty lines."""
  content = path.read_bytes()
  if path.suffix == ".py":
    with PARSING:
      content = bare(content.decode()).encode()
  return hashlib.sha256(content).hexdigest()[:12]


def bare(source: str) -> str:
  """Returns Python source without comments, docstrings and empty lines.

  The result is the same under every version of Python.
  """
  lines, inside = source.split("\n"), set[int]()  # lines inside literals, where blanks count
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno:
      inside |= set(range(node.lineno, node.end_lineno))
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      row, column = token.start
      lines[row - 1] = lines[row - 1][:column]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
      text = node.body[0]
      first, last = text.lineno, text.end_lineno or text.lineno
      alone = not lines[first - 1].encode()[: text.col_offset].strip()
      if alone and not lines[last - 1].encode()[text.end_col_offset :].strip():
        lines[first - 1 : last] = [""] * (last - first + 1)
        inside -= set(range(first, last))
  kept = [
    line if row in inside else line.rstrip()
    for row, line in enumerate(lines, 1)
    if row in inside or line.strip()
  ]
  return "\n".join(kept)


def changed_since(times: dict[Path, int]) -> set[Path]:
  """Returns the files of `times` that are gone or have a different modification time now.

  `times` is {file: time in nanoseconds}.
  """
  return {path for path, time in times.items() if written(path) != time}


def written(path: Path) -> int:
  """Returns the modification time of a file in nanoseconds; -1 if it does not exist."""
  return path.stat().st_mtime_ns if path.is_file() else -1


def digest(found: dict[str, str]) -> str:
  """Returns one hash for the fingerprints, {file: hash}, of a result's sources."""
  return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def stamp(sources: Iterable[str], command: str = "", root: Path = REPOSITORY) -> dict[str, Any]:
  """Returns the record that accompanies figures: commit, hashes of sources, versions, machine.

  A source that was written since this process began is marked as changed, so that the figures never
  count as current. `command` is what made the figures; "" is the command of this process.
  """
  found = fingerprints(sources, root)
  for path in changed_since(AT_START):
    if (name := os.path.relpath(path, root)) in found:
      found[name] = "changed while it ran"
  return {
    "commit": commit(root),
    "sources": digest(found),
    "files": found,
    "versions": versions(),
    "machine": machine(),
    "command": command or shlex.join(["python", *sys.argv]),
    "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  }


def commit(root: Path = REPOSITORY) -> str:
  """Returns the first digits of the tree's commit; "" without git.

  A `+` follows them where tracked files, except the results, differ from it.
  """

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

  number = git("rev-parse", "--short=10", "HEAD")
  changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}")
  return f"{number}+" if number and changed else number


def versions() -> dict[str, str]:
  """Returns {name: version} of Python and of the packages in VERSIONS that are installed."""
  found = {"python": platform.python_version()}
  for name in VERSIONS:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


@functools.cache
def machine() -> str:
  """Returns the number of usable cores and the processor model of this machine."""
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # only Linux has it
    cores = os.cpu_count() or 1
  named = [
    line.partition(":")[2].strip()
    for line in _lines(Path("/proc/cpuinfo"))
    if line.startswith("model name")
  ]
  return f"{cores} cores {named[0] if named else platform.machine()}, CPU"


def _lines(path: Path) -> list[str]:
  return path.read_text().splitlines() if path.is_file() else []


def write(
  out: Path, figures: Any, command: str = "", beside: bool = False, root: Path = REPOSITORY
) -> None:
  """Writes `figures` with their stamp to OUT.json.

  The sources are those of the row with the file's name, or else the whole package.

  Args:
    out: the path without its ending.
    figures: anything that can be written as JSON.
    command: what made the figures, if that was another process; "" is this one.
    beside: whether figures of an earlier call are among them. If other sources made those, their
      stamp stays, so that no figure looks newer than it is.
    root: the folder of the repository.
  """
  made = stamp(sources_of(out, root), command, root)
  held = _held(out).get("record") if beside else None
  if held and held["sources"] != made["sources"]:
    made = held
  write_json(named(out, "json"), {"record": made, "figures": figures})


def read(out: Path, without: Any, current: bool = False, root: Path = REPOSITORY) -> Any:
  """Returns the figures that `write` put into OUT.json; `without` if there are none.

  With `current`, figures count only if the present sources made them.
  """
  held = _held(out)
  if "figures" not in held:
    return without
  if current:
    now = digest(fingerprints(sources_of(out, root), root))
    return held["figures"] if held["record"]["sources"] == now else without
  return held["figures"]


def named(out: Path, ending: str) -> Path:
  """Returns the path OUT.ending; a dot in OUT is a part of its name."""
  return out.parent / f"{out.name}.{ending}"


def sources_of(out: Path, root: Path = REPOSITORY) -> list[str]:
  """Returns the sources of the result named like `out`; without a row, the whole package."""
  return list(table(root).get(out.name, {}).get("sources", EVERYTHING))


def write_json(path: Path, content: Any) -> None:
  """Writes a JSON file completely or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f"{path.name}.part")
  part.write_text(json.dumps(content, indent=1) + "\n")
  part.replace(path)


def _held(out: Path) -> dict[str, Any]:
  """Returns the content of OUT.json; a bare list is figures from before there were stamps."""
  path = named(out, "json")
  held = json.loads(path.read_text()) if path.is_file() else {}
  return held if isinstance(held, dict) else {"figures": held}


# Modification times of all sources of results when this process began.
AT_START = {path: written(path) for row in table().values() for path in files(row["sources"])}
