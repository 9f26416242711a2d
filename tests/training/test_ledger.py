"""The ledger adds up, or says what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax.training import ledger

ROWS, SAMPLES = 4, 5


def write(folder: Path, steps: int, processes: int = 1, first: int = 1) -> None:
  """A run that reads samples 0 .. 4 in turn; sample 3 is quarantined; each process has a block."""
  for process in range(processes):
    rows = np.array_split(np.arange(ROWS), processes)[process]
    book = ledger.Ledger(folder, process, rows, [True] * len(rows))
    for step in range(first, steps + 1):
      ids = ((step - 1) * ROWS + rows) % SAMPLES
      book.step(step, np.where(ids == 3, -2 - ids, ids))


def check(folder: Path, steps: int) -> ledger.Totals:
  return ledger.check(folder, steps, ROWS, range(SAMPLES))


@pytest.mark.parametrize("processes", [1, 2])
def test_trained_and_quarantined_make_what_was_read(tmp_path: Path, processes: int) -> None:
  write(tmp_path, 10, processes)
  assert check(tmp_path, 10) == ledger.Totals(10, 40, 32, 8, 0)
  assert "40 samples read in 10 steps = 32 trained + 8 quarantined" in str(check(tmp_path, 10))


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
  write(tmp_path, 7, 2)
  ledger.drop_after(tmp_path, 4)
  write(tmp_path, 10, 4, first=5)
  assert check(tmp_path, 10).read == 40


def test_skipped_steps_teach_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
  write(tmp_path, 10)
  ledger.Ledger(tmp_path, 0, range(ROWS), [True] * ROWS).skipped(2)
  assert check(tmp_path, 10) == ledger.Totals(10, 40, 28, 8, 4)
  assert "step 2: loss or gradient is not finite, skipped; process 0 had samples [4, 0, 1, 2]" in (
    capsys.readouterr().out
  )


def test_rows_that_others_own_are_theirs(tmp_path: Path) -> None:
  book = ledger.Ledger(tmp_path, 0, range(4), [True, False, True, False])
  book.step(1, np.array([[10, 11], [12, -1], [13, -1], [14, 15]]))  # packed rows
  assert ledger.read(tmp_path) == [
    {"step": 1, "rows": [0, 2], "trained": [10, 11, 13], "quarantined": []}
  ]
  with pytest.raises(ledger.LedgerError, match=r"step 1: rows without an entry \[1, 3\]"):
    ledger.check(tmp_path, 1, 4)


def damage(folder: Path, change: Any) -> None:
  file = folder / ledger.FOLDER / "00000.jsonl"
  lines = change([json.loads(line) for line in file.read_text().splitlines()])
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda lines: lines[:4] + lines[5:], r"step 5: rows without an entry \[0, 1, 2, 3\]"),
    (lambda lines: [*lines, lines[4]], r"step 5: .* rows with two \[0, 1, 2, 3\]"),
    (lambda lines: [*lines, lines[0] | {"step": 11}], "step 11: the run ended at 10"),
    (lambda lines: [lines[1] | {"step": 1}, *lines[1:]], r"sample 4: read 9 times, another 7"),
  ],
)
def test_what_does_not_add_up_is_named(tmp_path: Path, change: Any, message: str) -> None:
  write(tmp_path, 10)
  damage(tmp_path, change)
  with pytest.raises(ledger.LedgerError, match=message):
    check(tmp_path, 10)


def test_a_line_cut_off_by_a_kill_is_no_line(tmp_path: Path) -> None:
  write(tmp_path, 3)
  file = tmp_path / ledger.FOLDER / "00000.jsonl"
  file.write_text(file.read_text() + '{"step":4,"rows":[0,1')
  assert check(tmp_path, 3).read == 12
  ledger.drop_after(tmp_path, 3)
  write(tmp_path, 4, first=4)
  assert check(tmp_path, 4).read == 16
