"""Records which samples every step reads, to prove that no sample is trained twice or lost.

A run folder holds `ledger/<process>.jsonl`. For each step, each process appends an entry
`{"step", "rows", "trained", "quarantined"}` with the rows that it owns. Samples are their indices;
in a mixture, those of each source stand under its name. The first process also appends `{"step", "skipped"}` for a step whose loss or gradient is not finite. When a run resumes
from a checkpoint, the entries after that checkpoint are dropped.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import jsonl, storage
from llava_sp_jax.errors import LlavaSPError

FOLDER = "ledger"


class LedgerError(LlavaSPError, RuntimeError):
  """Raised for a ledger that does not add up; the message names every step or sample."""


@dataclasses.dataclass(frozen=True)
class Totals:
  """Counts the samples that a run has read, each visit separately.

  `read` is the sum of `trained`, `quarantined` and `skipped`.
  """

  steps: int
  read: int
  trained: int
  quarantined: int
  skipped: int  # in steps whose update was skipped as not finite
  unreadable: int = 0  # lines of the ledger; their samples are missing in the counts
  # In a mixture: for each source by name, its samples that were "trained", "quarantined", "skipped".
  sources: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    damage = f"; {self.unreadable} lines could not be read, so this is no proof"
    return (
      f"ledger: {self.read} samples read in {self.steps} steps = {self.trained} trained + "
      f"{self.quarantined} quarantined + {self.skipped} in skipped steps"
      f"{damage if self.unreadable else ''}" + "".join(map(self._of, self.sources))
    )

  def _of(self, name: str) -> str:
    found = self.sources[name]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items(), reverse=True))
    return f"\n  {name}: {sum(found.values())} read = {kinds}"


class Ledger:
  """Appends the entries of this process to its file.

  `rows` are the rows of each batch that this process makes. `owned` marks those that it also
  records, because several processes may make the same row.
  """

  def __init__(self, folder: Path, process: int, rows: Sequence[int], owned: Sequence[bool]):
    self._folder = folder / FOLDER
    storage.of(self._folder).make(self._folder)
    self._file = self._folder / f"{process:05d}.jsonl"
    self._process, self._owned = process, np.asarray(owned)
    self._rows = [int(row) for row in np.asarray(rows)[self._owned]]

  def step(self, number: int, samples: np.ndarray, sources: Sequence[str] = ()) -> None:
    """Appends the entry of step `number`.

    Args:
      number: the step.
      samples: marks the samples of the rows that this process makes: int32 [b] or, in packed rows,
        [b, n], as `rows.marks` gives them. A value >= 0 is the index of a trained sample,
        `-2 - index` stands for a quarantined one, and -1 for an empty place.
      sources: in a mixture, the name of the source of each of these rows.
    """
    ids = np.asarray(samples)[self._owned]
    if self._rows:
      names = np.asarray(sources)[self._owned] if any(sources) else None
      trained, quarantined = (_of(ids, names, part) for part in (_trained, _quarantined))
      self._write(step=number, rows=self._rows, trained=trained, quarantined=quarantined)

  def skipped(self, number: int) -> None:
    """Records and prints that the update of step `number` was skipped as not finite."""
    if self._process == 0:
      self._write(step=number, skipped=True)
    with_step = [line for line in _lines(self._file)[0] if line["step"] == number]
    print(
      f"step {number}: loss or gradient is not finite, skipped; process {self._process} had "
      f"samples {[key for line in with_step for key in _keys(line, 'trained')]}",
      flush=True,
    )

  def _write(self, **line: Any) -> None:
    jsonl.append(self._file, line, separators=(",", ":"))

  def secure(self) -> None:
    """Makes all entries survive a kill; called before a checkpoint of their steps is saved."""
    storage.of(self._file).secure(self._file)


def _trained(ids: np.ndarray) -> list[int]:
  return [int(i) for i in ids[ids >= 0]]


def _quarantined(ids: np.ndarray) -> list[int]:
  return [int(i) for i in -2 - ids[ids < -1]]


def _of(
  ids: np.ndarray, names: np.ndarray | None, part: Callable[[np.ndarray], list[int]]
) -> list[int] | dict[str, list[int]]:
  """Returns some of the marks of rows: as a list or, with the names of their sources, by name."""
  if names is None:
    return part(ids.reshape(-1))
  found = {str(name): part(ids[names == name].reshape(-1)) for name in np.unique(names)}
  return {name: indices for name, indices in found.items() if indices}


def drop_after(folder: Path, step: int) -> None:
  """Removes the entries after `step`, because those steps will be computed again.

  Called by one process while the others wait. `folder` is the run folder. Lines that cannot be read
  are dropped, reported, and counted in a new entry: the samples in them can no longer be proved.
  """
  for file in sorted((folder / FOLDER).glob("*.jsonl")):
    if bad := jsonl.cut_after(file, step):
      jsonl.append(file, {"step": step, "unreadable": bad}, separators=(",", ":"))
      print(
        f"{file}: {bad} lines could not be read and were dropped; training continues, but the "
        "ledger proves less",
        flush=True,
      )


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
  """Returns the entries of a file, and the number of lines that are not an entry."""
  records, bad = jsonl.read(file)
  good = [record for record in records if _is_entry(record)]
  return good, bad + len(records) - len(good)


def _is_entry(record: dict[str, Any]) -> bool:
  lists = [record.get("rows", [])]
  for name in ("trained", "quarantined"):
    values = record.get(name, [])
    lists += values.values() if isinstance(values, dict) else [values]
  whole = "rows" not in record or {"trained", "quarantined"} <= record.keys()
  return (
    whole
    and isinstance(record.get("step"), int)
    and all(
      isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values)
      for values in lists
    )
  )


Key = int | tuple[str, int]  # a sample: its index, with the name of its source in a mixture


def _keys(line: dict[str, Any], kind: str) -> list[Key]:
  """Returns the samples of one kind, "trained" or "quarantined", of an entry."""
  values = line.get(kind, [])
  if isinstance(values, dict):
    return [(name, index) for name, indices in values.items() for index in indices]
  return list(values)


def _files(folder: Path) -> Iterator[tuple[list[dict[str, Any]], int]]:
  """Yields the entries of each process, and the number of lines that could not be read.

  The number includes lines that an earlier `drop_after` has dropped.
  """
  for file in sorted((folder / FOLDER).glob("*.jsonl")):
    found, bad = _lines(file)
    noted = sum(int(line.get("unreadable", 0)) for line in found)
    yield [line for line in found if "unreadable" not in line], noted + bad


def read(folder: Path) -> list[dict[str, Any]]:
  """Returns the entries of all processes of the run in `folder`, in the order of their steps."""
  return sorted((line for found, _ in _files(folder) for line in found), key=lambda x: x["step"])


def skips(folder: Path) -> set[int]:
  """Returns the numbers of the steps whose update was skipped as not finite."""
  return {line["step"] for found, _ in _files(folder) for line in found if line.get("skipped")}


class _Tally:
  """Counts rows of steps and visits of samples in arrays, since their number is not small."""

  def __init__(self, batch_size: int, skipped: set[int]):
    self._batch_size, self._skipped = batch_size, skipped
    self.rows: dict[int, np.ndarray] = {}  # step -> how often each row has an entry
    self.others: dict[int, list[int]] = {}  # step -> rows that a batch does not have
    self.visits: dict[str, np.ndarray] = {}  # source -> how often each sample was read
    self.counts: dict[str, Counter[str]] = {}  # source -> visits by what became of them
    self.unreadable = 0

  def add(self, lines: Sequence[dict[str, Any]], unreadable: int) -> None:
    """Adds the entries of a file."""
    self.unreadable += unreadable
    read: dict[str, list[int]] = {}
    for line in lines:
      if "rows" not in line:
        continue
      self._add_rows(line["step"], np.asarray(line["rows"], np.int64))
      state = "skipped" if line["step"] in self._skipped else "trained"
      for kind, name in (("trained", state), ("quarantined", "quarantined")):
        values = line[kind]
        for source, indices in (values if isinstance(values, dict) else {"": values}).items():
          read.setdefault(source, []).extend(indices)
          self.counts.setdefault(source, Counter())[name] += len(indices)
    for source, indices in read.items():
      found = np.bincount(np.asarray(indices, np.int64))
      known = self.visits.get(source, found[:0])
      long, short = (known, found) if len(known) > len(found) else (found, known)
      long[: len(short)] += short
      self.visits[source] = long

  def _add_rows(self, step: int, rows: np.ndarray) -> None:
    times = self.rows.setdefault(step, np.zeros(self._batch_size, np.uint8))
    inside = (rows >= 0) & (rows < self._batch_size)
    np.add.at(times, rows[inside], 1)
    if not inside.all():
      self.others.setdefault(step, []).extend(rows[~inside].tolist())

  def read_too_often(self, source: str, samples: Sequence[int] | np.ndarray) -> list[str]:
    """Returns a line for each of the samples that was read more than once more than another."""
    indices = np.asarray(samples, np.int64)
    visits = np.zeros(int(indices.max(initial=-1)) + 1, np.int64)
    known = self.visits.get(source, visits)[: len(visits)]
    visits[: len(known)] = known
    least = int(visits[indices].min(initial=1 << 62))
    often = indices[visits[indices] > least + 1]
    of = f"{source}, " * bool(source)
    return [f"sample {of}{i}: read {visits[i]} times, another {least} times" for i in often]

  def total(self, name: str) -> int:
    """Returns the visits of all sources that ended so."""
    return sum(found[name] for found in self.counts.values())


def check(
  folder: Path,
  steps: int,
  batch_size: int,
  samples: Sequence[int] | Mapping[str, Sequence[int] | np.ndarray] = (),
) -> Totals:
  """Checks the ledger of a run up to step `steps` and returns its totals.

  Args:
    folder: the run folder.
    steps: the last step of the run.
    batch_size: rows of a batch; each step must have each of them exactly once.
    samples: indices of all samples that the run may read; of a mixture, those of each source by
      name. If the ledger begins at step 1, no sample may have been read more than once more often
      than another of its source. Empty: this is not checked.

  If some lines could not be read, missing entries are not an error, and the totals report those
  lines.

  Raises: LedgerError with all problems.
  """
  tally, problems = _Tally(batch_size, skips(folder)), list[str]()
  for found, bad in _files(folder):
    tally.add(found, bad)
  rows, unreadable = tally.rows, tally.unreadable
  first = min(rows, default=steps + 1)
  none = np.zeros(batch_size, np.uint8)
  for step in range(first, steps + 1):
    times = rows.get(step, none)
    lost = np.flatnonzero(times == 0).tolist()
    twice = [*np.flatnonzero(times > 1).tolist(), *sorted(tally.others.get(step, ()))]
    if twice or (lost and not unreadable):
      problems.append(f"step {step}: rows without an entry {lost}, rows with two {twice}")
  problems += [f"step {step}: the run ended at {steps}" for step in sorted(rows) if step > steps]
  groups = samples if isinstance(samples, Mapping) else {"": samples}
  for name, indices in groups.items() if first == 1 and not unreadable else ():
    problems += tally.read_too_often(name, indices)
  if problems:
    raise LedgerError(f"{folder / FOLDER} does not add up:\n  " + "\n  ".join(problems[:50]))
  trained, quarantined, skipped = map(tally.total, ("trained", "quarantined", "skipped"))
  sources = {name: dict(found) for name, found in sorted(tally.counts.items()) if name}
  read = trained + quarantined + skipped
  return Totals(len(rows), read, trained, quarantined, skipped, unreadable, sources)
