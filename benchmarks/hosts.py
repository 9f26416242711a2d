"""Measures what one host of a large run does before and between steps, at growing sizes of the data.

Runs the package's own code for one host of HOSTS on synthetic sizes of `mixture`: its share of the
measuring, the exchange of sizes, the file of sizes, the plan of an epoch, finding a row, the ledger.
Every size has a process of its own, whose memory is `ru_maxrss` without the libraries.

  python benchmarks/hosts.py --samples 665000 2500000 10000000 40000000 --out docs/results/hosts
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mixture import draw

from llava_sp_jax import provenance
from llava_sp_jax.data import lengths, packing
from llava_sp_jax.data import measured as measured_lib
from llava_sp_jax.training import ledger

LENGTH, TILES = 4096, 6  # of a row
SAMPLES, ROWS = 16, 8  # of a host in a batch, and its rows (balanced); 16 rows unpacked
BLOCK = 1 << 20  # samples whose sizes are drawn at a time
CHIPS = 4  # of a host of v5e
STEP = ("strong-v5e", "v5e-256x8")  # the point of the record of scaling whose step all hosts feed
RESULTS = Path(__file__).parents[1] / "docs/results"


def megabytes() -> float:
  """Returns the most memory that this process has had so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sizes(count: int) -> measured_lib.Measured:
  """Returns the sizes of samples, as if all had been measured."""
  found = measured_lib.Measured.empty(count)
  for start in range(0, count, BLOCK):
    some = draw(min(BLOCK, count - start), start, LENGTH)
    stop = start + len(some.lengths)
    found.lengths[start:stop], found.tiles[start:stop] = some.lengths, some.tiles
    found.totals[start:stop] = some.lengths
  return found


class Account:
  """Notes the CPU seconds of each part, and the memory behind it."""

  def __init__(self) -> None:
    self.base = megabytes()
    self.found: dict[str, float] = {}

  def __call__(self, name: str, work: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = work()
    self.found[f"CPU s, {name}"] = time.process_time() - started
    self.found[f"MB, {name}"] = megabytes() - self.base
    return result


def exchange(measured: measured_lib.Measured, count: int, hosts: int, account: Account) -> float:
  """Joins the sizes that all hosts would send, and returns the kB of one of them."""
  indices = np.arange(count)
  chunks = [indices[i : i + lengths.CHUNK] for i in range(0, count, lengths.CHUNK)]
  shares = [lengths._joined(chunks[i::hosts]) for i in range(hosts)]
  texts = [measured.text(share) for share in shares]
  joined = measured_lib.Measured.empty(count)
  account("sizes of all hosts joined", lambda: joined.join(texts, shares))
  return len(texts[0]) / 1024


def proof(count: int, hosts: int) -> None:
  """Checks the ledger of a run of one epoch, one sample in a row, as the first host does at its end."""
  batch = SAMPLES * hosts
  steps = count // batch
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name) / ledger.FOLDER
    folder.mkdir()
    for host in range(hosts):
      rows = list(range(host * SAMPLES, (host + 1) * SAMPLES))
      with (folder / f"{host:05d}.jsonl").open("w") as file:
        for step in range(steps):
          first = step * batch + host * SAMPLES
          line = {"step": step + 1, "rows": rows, "trained": list(range(first, first + SAMPLES))}
          file.write(json.dumps({**line, "quarantined": []}) + "\n")
    assert ledger.check(Path(name), steps, batch, {"": range(steps * batch)}).read == steps * batch


def one(count: int, hosts: int, packings: list[str], most: int) -> dict[str, float]:
  """Runs the parts of one host for so many samples, and returns its seconds and MB."""
  account = Account()
  measured = account("sizes in memory", lambda: sizes(count))
  account.found["kB sent by each host"] = exchange(measured, count, hosts, account)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "lengths.npz"
    measured.save(path)
    account.found["MB of the file of sizes"] = path.stat().st_size / (1 << 20)
    del measured
    known = account("sizes read from their file", lambda: measured_lib.Measured.load(path))
  assert known is not None
  for name in packings:
    row = packing.PACKINGS[name]
    counted = SAMPLES * hosts if row.counted else 0
    shape = packing.Shape(LENGTH, TILES, ROWS * hosts, (), counted)
    stream = packing.Stream(row, shape, 0, lambda epoch: known.sizes())
    rows = account(f"an epoch of {name}", lambda stream=stream: len(stream.epoch(0)))
    places = np.random.default_rng(0).integers(0, rows, 10_000).tolist()
    started = time.process_time()
    for place in places:
      stream[place]
    account.found[f"us, a row of {name}"] = (time.process_time() - started) / len(places) * 1e6
    del stream
  if count <= most:
    del known
    account("the ledger checked", lambda: proof(count, hosts))
  return account.found


def requests(hosts: int) -> dict[str, float]:
  """Returns what all hosts ask of a bucket in a second, from three other records.

  They are the predicted step (`scaling`), the samples of a packed row (`packing`), and the requests for
  a picture of a packed data set (`bucket_reading`). Every sample counts as one with a picture.
  """
  series, name = STEP
  point = provenance.read(RESULTS / "scaling", {})[series][name]
  assert point["chips"] == CHIPS * hosts, "another number of hosts feeds that step"
  packed = provenance.read(RESULTS / "packing", {})
  (rows,) = (one["rows"] for one in packed["fill"] if one["way"] == "packed, rows of 2048")
  reads = max(one["reads"] for one in provenance.read(RESULTS / "bucket_reading", {})["cases"])
  samples = point["rows"] * packed["samples"] / rows / point["seconds"]
  return {"samples": samples, "requests": samples * reads, "of a host": samples * reads / hosts}


def markdown(record: dict[str, Any]) -> str:
  """Returns the record as a page."""
  counts = list(record["cases"])
  names = list(dict.fromkeys(name for found in record["cases"].values() for name in found))
  lines = [
    "# What a host of a large run does before and between steps",
    "",
    f"One host of {record['hosts']}, on synthetic sizes of the mixture of stage 2: rows of {LENGTH} with {TILES} images. "
    "CPU seconds of one process on one core; MB are its peak so far, without libraries (about 230 MB without torch). "
    "Every host does this alike, so none waits longer than this. Made by `python benchmarks/hosts.py`.",
    "",
    f"| samples | {' | '.join(f'{int(count):,}' for count in counts)} |",
    "|---" * (len(counts) + 1) + "|",
    *[
      f"| {name} | "
      + " | ".join(_shown(record["cases"][count].get(name)) for count in counts)
      + " |"
      for name in names
    ],
    "",
    f"All {record['hosts']} hosts feed {CHIPS * record['hosts']:,} chips of v5e, whose step is predicted "
    f"([scaling](scaling.md)), with {record['asked']['samples']:,.0f} samples a second in rows of 2048 "
    "([packing](packing.md)). If each has a picture, in a packed data set in a bucket "
    f"([reading](bucket_reading.md)), that makes {record['asked']['requests']:,.0f} requests a second, "
    f"{record['asked']['of a host']:.0f} of each host.",
    "",
    f"Machine: {provenance.machine()}, shared with other work: load {record['load']:.1f}.",
  ]
  return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
  return "-" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def main() -> None:
  """Measures every size in a process of its own, and writes a record if asked to."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--samples", type=int, nargs="+", default=[665_000, 2_500_000])
  parser.add_argument("--hosts", type=int, default=512)
  parser.add_argument("--packings", nargs="+", default=["none", "first_fit", "balanced"])
  parser.add_argument(
    "--ledger", type=int, default=10_000_000, help="at most, whose ledger is checked"
  )
  parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
  parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.one:
    print(json.dumps(one(options.one, options.hosts, options.packings, options.ledger)))
    return
  record: dict[str, Any] = {"hosts": options.hosts, "load": os.getloadavg()[0], "cases": {}}
  record["asked"] = {name: round(value, 1) for name, value in requests(options.hosts).items()}
  for count in options.samples:
    again = [sys.executable, *sys.argv, "--one", str(count)]
    done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
    found = {name: round(value, 3) for name, value in json.loads(done.stdout).items()}
    record["cases"][str(count)] = found
    print(count, json.dumps(found), flush=True)
    if options.out:
      provenance.write(options.out, record)
      provenance.named(options.out, "md").write_text(markdown(record))


if __name__ == "__main__":
  main()
