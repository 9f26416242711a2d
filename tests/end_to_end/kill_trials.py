"""Kills training processes at random moments, starts them again, and compares with an unbroken run.

A trial is a recipe, the topologies on which a run is started one after the other, and where SIGKILL
meets all but the last of them. The same topology must give the same bits; another number of
processes or another mesh the same samples and losses that differ by float32's rounding. In all of them
the seconds that the run accounts for are those of the wall clock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance, storage
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.training import goodput, ledger
from tests.conftest import WIDE, ConfigMaker, merged
from tests.end_to_end import cluster
from tests.end_to_end.cluster import Cluster, Topology

STEPS, BATCH, SAMPLES = 24, 8, 12
EXACT = ("step", "loss", "grad_norm", "token_accuracy", "tokens")
TOLERANCE = 1e-6  # of losses on another topology, relative: 8 units of float32's last place
SHARE = 0.01  # of the wall time, by which the accounted seconds may differ from it
PEER_SECONDS = 30  # until the survivors of a killed process stop

# What is trained: (stage, changes of the tiny config). A row per way of training.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
  "pretrain": ("pretrain", {}),
  "finetune LoRA": ("finetune", {"data": {"turns_per_row": 2, "augment": "mirror_shift"}}),
  "finetune full": (
    "finetune_full",
    # LLaVA's rate for it; AdamW's first steps are the rate itself, whatever the gradient is.
    {"model": {"lora": {"rank": 0}}, "optimizer": {"learning_rate": 2e-5, "weight_decay": 0.1}},
  ),
  "finetune QLoRA": ("finetune", {"model": {**WIDE, "quantize": "nf4_double"}}),
  "accumulation": ("finetune", {"train": {"accumulate": 2}}),
  "packing": (
    "finetune",
    {"data": {"packing": "first_fit", "row_length": 416, "images_per_row": 3}},
  ),
}

ONE, TWO, FOUR = Topology(1, 1), Topology(2, 1, (1, 2, 1)), Topology(4, 1, (2, 2, 1))
MESH = Topology(1, 4, (1, 2, 2))
# Where a run is started, killed, and started again.
WAYS: dict[str, tuple[Topology, ...]] = {
  "1, 1": (ONE, ONE),
  "2, 2": (TWO, TWO),
  "2, 1, 4": (TWO, ONE, FOUR),
  "another mesh": (MESH, ONE, MESH),
}
MOMENTS = ("step", "save")
KILLED = ("all", "one")  # as when a job is cancelled; one process, whose death ends the others


@dataclasses.dataclass(frozen=True)
class Trial:
  recipe: str
  way: str
  moment: str
  killed: str


@dataclasses.dataclass(frozen=True)
class Record:
  """What a trial showed; `differs` is the largest relative difference of a loss."""

  trial: int
  recipe: str
  way: str
  moment: str
  killed: str
  killed_after: list[int]  # the last step that was logged
  in_save: list[bool]  # whether the kill left a half-written checkpoint
  resumed_from: list[int]
  same_samples: bool
  same_bits: bool
  differs: float
  ledger: str
  wall: float  # seconds from the first start until the run says that it is complete, measured here
  accounted: float  # the sum of the run's own seconds
  lost: float  # of these, in steps that were trained again
  waiting: float  # of these, between a death and the next start
  waited: float  # the same, measured here
  passed: bool
  place: str = "disk"  # or "bucket"

  @property
  def adds_up(self) -> bool:
    """Whether the run's own seconds are those that passed."""
    return abs(self.accounted - self.wall) <= SHARE * self.wall


def trials(count: int) -> list[Trial]:
  """The first `count` of all combinations, shuffled; from the front again when there are no more."""
  every = [
    Trial(recipe, way, moment, killed)
    for (way, topologies), moment, recipe, killed in itertools.product(
      WAYS.items(), MOMENTS, RECIPES, KILLED
    )
    if killed == "all" or topologies[0].processes > 1
  ]
  random.Random(0).shuffle(every)
  return [every[i % len(every)] for i in range(count)]


def recipe_config(make: ConfigMaker, recipe: str) -> config_lib.Config:
  stage, changes = RECIPES[recipe]
  base = {
    "train": {"steps": STEPS, "batch_size": BATCH, "save_every": 3, "peer_seconds": PEER_SECONDS},
    "optimizer": {"learning_rate": 1e-3, "projector_learning_rate": 1e-3},
  }
  config = make(stage, "cropping", **base)
  return config_lib.from_dict(merged(config_lib.to_dict(config), changes))


class Trials:
  """Runs trials in a folder; unbroken runs are made once for each recipe and topology.

  `runs` is where the run folders of the trials are, such as a bucket; unbroken runs are on disk.
  """

  def __init__(self, folder: Path, make: ConfigMaker, runs: Path | None = None):
    self._folder, self._make, self._runs = folder, make, runs or folder

  def unbroken(self, recipe: str, topology: Topology) -> Path:
    # XLA's flags change the last bits; a later call may have others.
    flags = hashlib.sha256(os.environ.get("XLA_FLAGS", "").encode()).hexdigest()[:6]
    workdir = self._folder / f"{recipe} {topology} {flags}".replace(" ", "_")
    if len(cluster.metrics(workdir)) < STEPS:
      shutil.rmtree(workdir, ignore_errors=True)
      Cluster(self._file(recipe), workdir, topology).finish()
    return workdir

  def _file(self, recipe: str) -> Path:
    path = self._folder / f"{recipe}.py".replace(" ", "_")
    return cluster.write_config(recipe_config(self._make, recipe), path)

  def run(self, number: int, trial: Trial) -> Record:
    """Raises: AssertionError when a process that should go on does not."""
    topologies = WAYS[trial.way]
    wanted = self.unbroken(trial.recipe, topologies[0])
    draw, workdir = random.Random(number), self._runs / f"trial{number}"
    logs = self._folder / workdir.name
    storage.of(workdir).remove(workdir)
    after, half, resumed = [], [], []
    begun, died = [], list[float]()
    for leg, topology in enumerate(topologies[:-1]):
      begun.append(time.time())
      start = Cluster(self._file(trial.recipe), workdir, topology, logs=logs)
      first = threading.Thread(target=note_death, args=(start.processes[0], died))
      first.start()
      least = leg * STEPS // len(topologies)
      self._kill(start, trial, draw, range(least + 4, least + 10))
      after.append(cluster.last_step(workdir))
      half.append(bool(half_written(workdir)))
      resumed.append(max(cluster.saved(workdir), default=0))
      first.join()
    begun.append(time.time())
    last = Cluster(self._file(trial.recipe), workdir, topologies[-1], logs=logs)
    last.wait_for(lambda: "goodput" in last.printed())
    wall = time.time() - begun[0]
    printed = last.finish()
    waited = sum(b - d for b, d in zip(begun[1:], died, strict=True))
    assert resumed[-1] == 0 or f"continuing {workdir} from step {resumed[-1]}" in printed
    return self._compare(number, trial, workdir, wanted, (after, half, resumed), wall, waited)

  def _kill(self, start: Cluster, trial: Trial, draw: random.Random, steps: range) -> None:
    """SIGKILL at the trial's moment, somewhere in `steps`."""
    step = draw.choice(steps)
    reached = start.wait_for(lambda: cluster.last_step(start.workdir) >= step)
    if reached and trial.moment == "save":
      reached = start.wait_for(lambda: half_written(start.workdir), pause=0.001)
    time.sleep(draw.random() * 0.02)
    if trial.killed == "all" or not reached:
      start.kill()
    else:
      victim = draw.randrange(start.topology.processes)
      start.processes[victim].kill()
      codes = start.wait()
      assert all(codes), f"a process ended well though process {victim} was killed: {codes}"

  def _compare(
    self,
    number: int,
    trial: Trial,
    workdir: Path,
    wanted: Path,
    seen: tuple[list[int], list[bool], list[int]],
    wall: float,
    waited: float,
  ) -> Record:
    topologies = WAYS[trial.way]
    ours, theirs = cluster.losses(workdir), cluster.losses(wanted)
    pairs = zip(ours, theirs, strict=True)
    differs = max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)
    same_samples = cluster.samples(workdir) == cluster.samples(wanted)
    same_bits = numbers(workdir) == numbers(wanted) and checksums(workdir) == checksums(wanted)
    totals = str(ledger.check(workdir, STEPS, BATCH, range(SAMPLES)))
    good = same_bits if len(set(topologies)) == 1 else differs <= TOLERANCE
    seconds = goodput.totals(goodput.read(workdir))
    record = Record(
      number,
      *dataclasses.astuple(trial),
      *seen,
      same_samples,
      same_bits,
      differs,
      totals,
      *(round(x, 2) for x in (wall, sum(seconds.values()), seconds["lost"], seconds["waiting"])),
      round(waited, 2),
      same_samples and good,
      "bucket" if storage.remote(workdir) else "disk",
    )
    return dataclasses.replace(record, passed=record.passed and record.adds_up)


def note_death(process: subprocess.Popen, died: list[float]) -> None:
  """Waits for the process that keeps the account of its run, and appends when it ended."""
  process.wait()
  died.append(time.time())


def half_written(workdir: Path) -> list[Path]:
  """The folders of saves that have begun and not ended."""
  return [*(workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"), *on_disk.unfinished(workdir)]


def numbers(workdir: Path) -> list[tuple]:
  """What must be equal to the last bit on the same topology."""
  return [tuple(line[key] for key in EXACT) for line in cluster.metrics(workdir)]


def checksums(workdir: Path) -> dict[str, dict[str, int]]:
  """Those of every parameter and moment in the last checkpoint."""
  return on_disk.checksums(workdir / on_disk.PLACE / str(STEPS))


# Where the run folders of a record are: (what its page says of that, option of the script).
PLACES = {
  "disk": ("", ""),
  "bucket": (
    "Run folders are in a bucket (gs://) that a local server emulates (`tests/object_store.py`). It "
    "has no rename of folders, no append and no lock. The unbroken runs, with which they are "
    "compared, are on a disk. ",
    "--bucket ",
  ),
}


def markdown(records: list[Record]) -> str:
  """The table of `docs/results/kill_trials.md`."""
  said, option = PLACES[records[0].place if records else "disk"]
  out = "kill_trials_bucket" if option else "kill_trials"
  good = sum(record.passed for record in records)
  lines = [
    "# Killed anywhere, resumed exactly",
    "",
    f"{good} of {len(records)} trials passed. {said}Each starts a run of {STEPS} steps, meets it "
    "with SIGKILL, and goes on, on the number of processes that is named next (gloo, one device "
    'each; "another mesh": 4 devices as fsdp 2 x tensor 2, then one, then 4 again). The same '
    "topology must give the same bits of loss, gradient norm and accuracy at every step, and of "
    "every parameter and moment after the last; another one the same samples in the same rows, and "
    f"losses within {TOLERANCE:g} (relative). `one` kills one "
    "process, whose death must end the others. In every trial the ledger adds up. Seconds are those "
    "until the run says that it is complete: by the clock, and by the run's own account, with its "
    "`lost` and `waiting`; `waited` is the clock's time in which process 0 was dead.",
    "",
    f"Made by `python scripts/kill_trials.py {option}--out docs/results/{out}`.",
    "",
    "| trial | recipe | processes | killed | in a | after step | half a checkpoint left | resumed "
    "from | same samples | same bits | losses differ by | seconds: wall | accounted | lost | waiting, "
    "accounted | waited | |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  yes: Callable[[bool], str] = lambda value: "yes" if value else "no"  # noqa: E731
  many: Callable[[list[Any]], str] = lambda values: ", ".join(map(str, values))  # noqa: E731
  for r in records:
    lines.append(
      f"| {r.trial} | {r.recipe} | {r.way} | {r.killed} | {r.moment} | {many(r.killed_after)} | "
      f"{many([yes(x) for x in r.in_save])} | {many(r.resumed_from)} | {yes(r.same_samples)} | "
      f"{yes(r.same_bits)} | {r.differs:.1e} | {r.wall:.1f} | {r.accounted:.1f} | {r.lost:.1f} | "
      f"{r.waiting:.1f} | {r.waited:.1f} | {'passed' if r.passed else 'FAILED'} |"
    )
  return "\n".join(lines) + "\n"


def write(out: Path, records: list[Record]) -> None:
  """`out`.md and `out`.json."""
  provenance.write(out, [dataclasses.asdict(record) for record in records])
  provenance.named(out, "md").write_text(markdown(records))


def read(out: Path) -> list[Record]:
  """The records that an earlier call has written."""
  return [Record(**values) for values in provenance.read(out, [], current=True)]
