"""Changes one line of the package at a time and checks that tests notice: python
scripts/mutations.py

tests/mutations/<room>.toml lists the sites: a fragment of a file, its replacement, the test files
that should notice, and the harm to a user. Each is applied to a copy of the working tree in a
temporary folder, never to the checkout, and its test files run in the default tier. First all named
test files must pass unchanged. Needs the extra `test`; all sites take about an hour.

  python scripts/mutations.py --list
  python scripts/mutations.py --only 'train/|alpha' --out docs/results/mutations

Exits with code 0 if the tests noticed at least the share --least of the sites.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import itertools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_sp_jax import provenance
from llava_sp_jax.progress import eta

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE, TESTS = "llava_sp_jax", "tests"
SITES = REPOSITORY / TESTS / "mutations"
LIMIT = 900  # seconds; a mutation that makes tests hang counts as noticed
NOTICED, SURVIVED = "noticed", "not noticed"
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # of pytest's exit codes

# Test processes are forked from one that has imported the slow libraries.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["pytest", "jax", "flax.linen", "optax", "orbax.checkpoint", "grain"]
ENVIRONMENT = {  # jax reads these when it is imported
  "JAX_PLATFORMS": "cpu",
  "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax-tests"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


class SiteError(ValueError):
  """Reports a site that does not match the source any more."""


@dataclasses.dataclass(frozen=True)
class Site:
  """One change: `old` occurs exactly once in `file` (below the package); `tests` are paths below
  tests/.
  """

  room: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]
  hurts: str

  @property
  def path(self) -> Path:
    return Path(PACKAGE) / self.file

  def line(self, root: Path = REPOSITORY) -> int:
    """Finds the current line. Raises: SiteError."""
    text = (root / self.path).read_text()
    found = text.count(self.old)
    if found != 1:
      raise SiteError(
        f"{self.room}.toml: {self.path} has {self.old!r} {found} times, expected once; give the site "
        "the line as it is now, or remove it"
      )
    return text[: text.index(self.old)].count("\n") + 1

  def apply(self, text: str) -> str:
    return text.replace(self.old, self.new)

  def title(self, root: Path = REPOSITORY) -> str:
    return f"{self.file}:{self.line(root)} {self.hurts}"


@dataclasses.dataclass(frozen=True)
class Record:
  """The outcome of a site; `by` is the first test that failed, or another reason why it was
  noticed.
  """

  room: str
  file: str
  line: int
  old: str
  new: str
  hurts: str
  outcome: str
  by: str
  seconds: float


def sites(folder: Path = SITES) -> list[Site]:
  """Reads all sites, room by room."""
  found = []
  for path in sorted(folder.glob("*.toml")):
    for values in tomllib.loads(path.read_text())["site"]:
      found.append(Site(path.stem, **{**values, "tests": tuple(values["tests"])}))
  return found


def copy_tree(target: Path) -> None:
  """Lists the files of the working tree that git tracks or would add."""
  names = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=REPOSITORY,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  for name in filter(None, names.split("\0")):
    if (REPOSITORY / name).is_file():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(REPOSITORY / name, target / name)


def run_tests(root: Path, tests: Iterable[str], *options: str) -> tuple[int, str]:
  """Returns pytest's exit code and its output; FAILED if it hangs."""
  arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *options]
  arguments += [f"{TESTS}/{test}" for test in tests]
  log = root.with_suffix(".log")
  child = FORKS.Process(target=_child, args=(str(root), arguments, str(log)))
  child.start()
  child.join(LIMIT)
  if child.is_alive():
    os.killpg(child.pid or 0, signal.SIGKILL)
    child.join()
    return FAILED, f"no end within {LIMIT} s"
  return child.exitcode or 0, log.read_text(errors="replace")


def _child(root: str, arguments: list[str], log: str) -> None:
  """Runs pytest in a process with imported libraries and the package of the copy."""
  os.setsid()  # so that its children can be killed with it
  os.chdir(root)
  sys.path.insert(0, root)
  # This file imported the package of the checkout; tests must import that of the copy.
  for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
    del sys.modules[name]
  if not str(importlib.import_module(PACKAGE).__file__).startswith(root + os.sep):
    raise RuntimeError(f"{PACKAGE} is imported from elsewhere than {root}")
  os.environ["PYTHONPATH"] = root
  sys.dont_write_bytecode = False  # bytecode serves all runs in this copy
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for stream in (1, 2):
    os.dup2(output, stream)
  import pytest

  sys.exit(int(pytest.main(arguments)))


def judge(code: int, printed: str) -> tuple[str, str]:
  """Returns outcome and `by` of a run. Raises: RuntimeError if no test decided."""
  if code == PASSED:
    return SURVIVED, ""
  failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$|^no end within .*", printed, re.MULTILINE)
  if code not in (FAILED, INTERRUPTED) or not failed:
    raise RuntimeError(f"pytest ended with {code}:\n{printed[-2000:]}")
  return NOTICED, failed[1] or failed[0]


def attempt(site: Site, root: Path, stamp: float) -> Record:
  """Applies a site to the copy at `root`, runs its tests, and puts the file back.

  `stamp` is the modification time that the file gets, so that no bytecode of another is taken for
  it.
  """
  path, line, started = root / site.path, site.line(root), time.monotonic()
  text = path.read_text()
  try:
    path.write_text(site.apply(text))
    os.utime(path, (stamp, stamp))
    outcome, by = judge(*run_tests(root, site.tests, "-x"))
  finally:
    path.write_text(text)
    os.utime(path, (stamp + 1, stamp + 1))
  seconds = round(time.monotonic() - started, 1)
  return Record(site.room, site.file, line, site.old, site.new, site.hurts, outcome, by, seconds)


def run(chosen: Sequence[Site], jobs: int, baseline: bool) -> Iterable[Record]:
  """Yields records as they are ready. Raises: RuntimeError if tests fail without a mutation."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  FORKS.set_forkserver_preload(PRELOADED)
  with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
    roots: queue.Queue[Path] = queue.Queue()
    for number in range(jobs):
      root = Path(folder) / str(number)
      copy_tree(root)
      roots.put(root)
    if baseline:
      tests = sorted({test for site in chosen for test in site.tests})
      print(f"{len(tests)} test files as they are ...", flush=True)
      code, printed = run_tests(root, tests)
      if code != PASSED:
        raise RuntimeError(f"tests fail without any mutation:\n{printed[-4000:]}")
    stamps = itertools.count(1_000_000_000, 10)

    def one(site: Site) -> Record:
      root = roots.get()
      try:
        return attempt(site, root, next(stamps))
      finally:
        roots.put(root)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
      futures = [pool.submit(one, site) for site in chosen]
      for future in concurrent.futures.as_completed(futures):
        yield future.result()


def share(records: Iterable[Record]) -> dict[str, tuple[int, int]]:
  """Counts by room: (noticed, all)."""
  total: dict[str, tuple[int, int]] = {}
  for record in records:
    noticed, count = total.get(record.room, (0, 0))
    total[record.room] = noticed + (record.outcome == NOTICED), count + 1
  return total


def markdown(records: Sequence[Record], commit: str) -> str:
  by_room = share(records)
  noticed, count = (sum(column) for column in zip(*by_room.values(), strict=True))
  survivors = [r for r in records if r.outcome == SURVIVED]
  return (
    "\n".join(
      [
        "# Mutations",
        "",
        f"Of {count} single-line changes that would hurt in silence, the default suite notices {noticed} "
        f"({noticed / count:.1%}) at {commit}. Made by `python scripts/mutations.py --out "
        "docs/results/mutations`; the sites stand in `tests/mutations/`.",
        "",
        "| room | noticed | of |",
        "|---|---|---|",
        *(f"| {room} | {n} | {m} |" for room, (n, m) in sorted(by_room.items())),
        "",
        "| not noticed | what would hurt |",
        "|---|---|",
        *(f"| `{r.file}:{r.line}` | {r.hurts} |" for r in survivors),
        "",
        "| where | what would hurt | the first test that fails |",
        "|---|---|---|",
        *(
          f"| `{r.file}:{r.line}` | {r.hurts} | `{r.by}` |" for r in records if r.outcome == NOTICED
        ),
      ]
    )
    + "\n"
  )


def write(out: Path, records: dict[str, Record]) -> None:
  """Writes OUT.json and OUT.md, in the order of the files."""
  ordered = sorted(records.values(), key=lambda r: (r.room, r.file, r.line))
  provenance.write(out, [dataclasses.asdict(r) for r in ordered])
  provenance.named(out, "md").write_text(markdown(ordered, provenance.commit()))


def read(out: Path | None, known: Iterable[Site]) -> dict[str, Record]:
  """Reads the records of OUT.json whose sites still exist, by `file old new`."""
  keys = {key(site) for site in known}
  found = (Record(**values) for values in (provenance.read(out, []) if out else []))
  return {key(record): record for record in found if key(record) in keys}


def key(x: Site | Record) -> str:
  return "\n".join((x.file, x.old, x.new))


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", default="", help="regular expression over 'file:line harm'")
  parser.add_argument("--list", action="store_true", help="prints the sites and exits")
  parser.add_argument(
    "--out", type=Path, help="writes OUT.md and OUT.json; keeps records of other sites"
  )
  parser.add_argument(
    "--jobs", type=int, default=1, help="number of copies that are tested in parallel"
  )
  parser.add_argument(
    "--least", type=float, default=0.95, help="share of sites that tests must notice"
  )
  parser.add_argument(
    "--no-baseline", action="store_true", help="assumes that unchanged tests pass"
  )
  options = parser.parse_args()
  try:
    known = sites()
    chosen = [site for site in known if re.search(options.only, site.title())]
  except SiteError as error:
    print(error, file=sys.stderr)
    return 1
  if options.list or not chosen:
    print("\n".join(f"{site.room:12} {site.title()}" for site in chosen))
    counts = collections.Counter(site.room for site in chosen)
    print(f"{len(chosen)} sites: " + ", ".join(f"{room} {n}" for room, n in counts.items()))
    return 0
  records, started, done = read(options.out, known), time.monotonic(), []
  for record in run(chosen, options.jobs, not options.no_baseline):
    done.append(record)
    records[key(record)] = record
    if options.out:
      write(options.out, records)
    left = (time.monotonic() - started) / len(done) * (len(chosen) - len(done))
    print(
      f"[{len(done)}/{len(chosen)}] {record.outcome:11} {record.file}:{record.line} "
      f"{record.hurts}  {record.by}  {eta(left)}",
      flush=True,
    )
  noticed = sum(record.outcome == NOTICED for record in done)
  for room, (n, m) in sorted(share(done).items()):
    print(f"{room:12} {n}/{m}")
  print(f"{noticed} of {len(done)} noticed ({noticed / len(done):.1%})")
  return 0 if noticed >= options.least * len(done) else 1


if __name__ == "__main__":
  sys.exit(main())
