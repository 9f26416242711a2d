"""Kills training, resumes it, and compares: python scripts/kill_trials.py --out
docs/results/kill_trials

Runs 20 trials on a tiny model and needs the extra `test`, and with --bucket `gcs`. Finished trials
are stored, so the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llava_sp_jax import storage
from tests import conftest, object_store
from tests.end_to_end import kill_trials


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
  parser.add_argument("--trials", type=int, default=20)
  parser.add_argument("--workdir", type=Path, default=Path("runs/kill_trials"))
  parser.add_argument("--bucket", action="store_true", help="run folders in an emulated bucket")
  options = parser.parse_args()
  workdir = options.workdir.absolute()
  if not (workdir / "data").is_dir():
    conftest.write_data(workdir / "data", kill_trials.SAMPLES)
  with object_store.running() if options.bucket else contextlib.nullcontext():
    runs = storage.place(f"gs://{object_store.BUCKET}/runs") if options.bucket else None
    return run(options, kill_trials.Trials(workdir, conftest.config_maker(workdir / "data"), runs))


def run(options: argparse.Namespace, runner: kill_trials.Trials) -> int:
  """Runs the trials that are left; returns 1 unless all have passed."""
  records = kill_trials.read(options.out)
  for number, trial in enumerate(kill_trials.trials(options.trials)):
    if number in {record.trial for record in records}:
      continue
    records.append(record := runner.run(number, trial))
    kill_trials.write(options.out, sorted(records, key=lambda record: record.trial))
    print(kill_trials.markdown([record]).splitlines()[-1], flush=True)
  return 0 if all(record.passed for record in records) else 1


if __name__ == "__main__":
  sys.exit(main())
