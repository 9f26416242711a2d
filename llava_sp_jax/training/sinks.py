"""Writes the metrics of a run to files, terminals and services; only the first process writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llava_sp_jax import config as config_lib
from llava_sp_jax import jsonl, storage
from llava_sp_jax.progress import eta

METRICS_FILE = "metrics.jsonl"
Record = Mapping[str, Any]


class Sink(Protocol):
  """Takes the records of a run, each `{name: number}` with its `step`."""

  def write(self, record: Record) -> None:
    """Takes one record, which holds the metrics of a step."""
    ...

  def close(self) -> None:
    """Ends the output, after the last record."""
    ...


class JsonLines:
  """Appends each record to metrics.jsonl as one line, at once on a disk."""

  def __init__(self, folder: Path, config: config_lib.Config):
    self._path = folder / METRICS_FILE

  def write(self, record: Record) -> None:
    jsonl.append(self._path, record)

  def close(self) -> None:
    storage.of(self._path).flush()


def line(record: Record, steps: int) -> str:
  """Returns a record as one line for the terminal: its values that LINE names, and the time left.

  `steps` is the number of steps of the run.
  """
  parts = [f"step {record['step']:>6}/{steps}"]
  for name, text in LINE:
    value = record.get(name)
    if value is not None and not (name == "quarantined" and not value):
      parts.append(text.format(value))
  rate = record.get("steps_per_second")
  if rate and math.isfinite(rate):
    parts.append(eta((steps - record["step"]) / rate))
  return "  ".join(parts)


# (name in a record, its format on the terminal)
LINE: tuple[tuple[str, str], ...] = (
  ("loss", "loss {:.4f}"),
  ("val_loss", "val loss {:.4f}"),
  ("eval_score", "score {:.4f}"),
  ("token_accuracy", "tokens right {:.3f}"),
  ("grad_norm", "grad {:.2f}"),
  ("steps_per_second", "{:.2f} steps/s"),
  ("tokens_per_second_per_chip", "{:.0f} tokens/s/chip"),
  ("mfu", "MFU {:.1%}"),
  ("input_wait", "waiting {:.0%}"),
  ("quarantined", "quarantined {}"),
)


class Terminal:
  """Prints records as lines; on a terminal, shows only the latest one, with all of its figures.

  There, the record is a line above a progress bar, and the figures are below it. If the terminal is
  too small, the last figures are cut off, never the line.
  """

  def __init__(self, folder: Path, config: config_lib.Config):
    from rich.console import Console

    self._steps, self._live = config.train.steps, None
    console = Console()
    if console.is_terminal:
      from rich.live import Live

      # Refreshed with each record only, so that no thread runs beside the step.
      self._live = Live(console=console, auto_refresh=False, transient=False)
      self._live.start()

  def write(self, record: Record) -> None:
    if self._live is None:
      print(line(record, self._steps), flush=True)
    else:
      self._live.update(_table(record, self._steps), refresh=True)

  def close(self) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None


def _table(record: Record, steps: int) -> Any:
  from rich.columns import Columns
  from rich.console import Group
  from rich.progress_bar import ProgressBar
  from rich.text import Text

  numbers = [
    Text.assemble((f"{name} ", "dim"), f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, value in record.items()
    if name != "step"
  ]
  bar = ProgressBar(total=steps, completed=record["step"])
  return Group(Text(line(record, steps)), bar, Columns(numbers, equal=True))


class TensorBoard:
  """Writes scalars to tensorboard/, for `tensorboard --logdir`."""

  def __init__(self, folder: Path, config: config_lib.Config):
    from tensorboardX import SummaryWriter

    self._writer = SummaryWriter(logdir=str(folder / "tensorboard"))

  def write(self, record: Record) -> None:
    for name, value in record.items():
      if name != "step":
        self._writer.add_scalar(name, value, record["step"])
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """Logs to a run of Weights & Biases.

  Its id is kept in wandb_id.txt, so that a resumed run continues the same one. Project, entity and
  mode (`offline`) are set by wandb's own environment variables.
  """

  def __init__(self, folder: Path, config: config_lib.Config):
    import wandb

    file = folder / "wandb_id.txt"
    if not file.is_file() or not file.read_text().strip():  # left empty by a kill
      storage.of(file).put(file, uuid.uuid4().hex[:12].encode())
    self._run = wandb.init(
      id=file.read_text().strip(),
      resume="allow",
      name=config.name,
      dir=str(storage.of(folder).scratch(folder)),
      config=config_lib.to_dict(config),
    )
    # A resumed run repeats steps, which wandb refuses for its own counter but not for an axis.
    self._run.define_metric("*", step_metric="step")

  def write(self, record: Record) -> None:
    self._run.log(dict(record))

  def close(self) -> None:
    self._run.finish()


@dataclasses.dataclass(frozen=True)
class MetricsRow:
  """Names a sink, the module that it imports, and the extra of this package that installs it."""

  make: Callable[[Path, config_lib.Config], Sink]
  module: str = ""
  extra: str = ""


SINKS: dict[str, MetricsRow] = {
  "terminal": MetricsRow(Terminal, "rich"),
  "tensorboard": MetricsRow(TensorBoard, "tensorboardX", "tensorboard"),
  "wandb": MetricsRow(Wandb, "wandb", "wandb"),
}


def check(config: config_lib.Config) -> None:
  """Raises ConfigError that lists the names in `train.sinks` that are unknown or not installed."""
  problems = []
  for name in config.train.sinks:
    row = config_lib.lookup("train.sinks", name, SINKS)
    if row.module and not _installed(row.module):
      problems.append(
        f"train.sinks: {name!r} needs the package {row.module}, which is not installed; "
        f"pip install {row.module}" + (f" (or llava-sp-jax[{row.extra}])" if row.extra else "")
      )
  if problems:
    raise config_lib.ConfigError("; ".join(problems))


def _installed(module: str) -> bool:
  """Returns whether a module can be imported.

  A folder of that name without code, such as the one that wandb leaves, does not count.
  """
  spec = importlib.util.find_spec(module)
  return spec is not None and spec.origin is not None


def open_all(folder: Path, config: config_lib.Config) -> list[Sink]:
  """Opens metrics.jsonl in the run folder and the sinks that the config names.

  Raises: ConfigError for a sink that cannot be opened, such as a service without a login.
  """
  opened: list[Sink] = [JsonLines(folder, config)]
  for name in config.train.sinks:
    try:
      opened.append(SINKS[name].make(folder, config))
    except Exception as error:  # any error of its library
      for sink in opened:
        sink.close()
      raise config_lib.ConfigError(
        f"train.sinks: {name!r} cannot be opened ({type(error).__name__}: {error}); fix that, or "
        "leave it out"
      ) from error
  return opened
