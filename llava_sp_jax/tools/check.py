"""llava-sp check: looks through a data set for what training would leave out, before chips are rented."""

from __future__ import annotations

import sys
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import console, limits
from llava_sp_jax.progress import Progress
from llava_sp_jax.tools import arguments

USAGE = """usage: llava-sp check --config FILE[:OPTIONS] [--images N|all] [--samples N|all]
                      [--config.GROUP.KEY=VALUE]

Reads the samples that a recipe would train on and lays each out as training does, without a model
and without an accelerator. Reports images that are missing (by folder) or cannot be decoded, samples
that training would leave out, samples without a reply to learn from, and text that would be cut off.
The file of data.validation_path is checked as well, and has a report of its own.
Of every image the head is read, which tells its format and its size.

  --images N|all   samples whose images are also decoded, drawn at random (default 1000;
                   0: the heads of the files alone are looked at)
  --samples N|all  samples to check, drawn at random (default all)

Ends with code 1 when samples would be lost. Text that is cut off is told but is not an error.

example:
  llava-sp check --config configs/finetune_lora.py:data=/mnt/share/llava_finetune --images all
"""
OPTIONS = {"images": "1000", "samples": "all"}
FOLDERS = 20  # lines of the table of folders: those with most missing first, then the largest
LONGEST = 80  # characters of a folder in the table


def main(argv: list[str]) -> int:
  """Checks and prints. Returns 1 when something is wrong."""
  if {"--help", "-h"} & set(argv):
    print(USAGE, end="")
    return 0
  config, images, samples = read(argv)
  limits.check(config)
  from llava_sp_jax.convert import places
  from llava_sp_jax.data import anyres, check, pipeline, validation_split
  from llava_sp_jax.data.tokenizer import Tokenizer
  from llava_sp_jax.models import build
  from llava_sp_jax.training import preflight

  build.model(config.model)  # unknown names and sizes that do not fit
  tile = anyres.Tile(*build.tile_shape(config.model))
  tokenizer = Tokenizer(places.tokenizer(config.data.tokenizer))
  preflight.check_data(config, tokenizer)
  files = [
    validation_split.TRAIN,
    *[validation_split.VALIDATION] * bool(config.data.validation_path),
  ]
  pipeline.check_settings(config.data)
  shares = [validation_split.VALIDATION] * bool(config.data.validation_fraction)
  for split in (*files, *shares):  # what cannot be opened is told before an hour of checking
    pipeline.open_source(config.data, tile, split)
  well = True
  for split in files:
    told, seed = Progress(0, "samples", stream=sys.stderr), config.train.seed

    def tell(report: check.CheckReport, told: Progress = told) -> None:
      told.total = min(samples or report.total, report.total)
      told.at(report.checked, f"{sum(report.kinds.values()):,} problems")

    report = check.check(config.data, tokenizer, tile, images, samples, tell, seed, split)
    data = validation_split.of_split(config.data, split)
    console.say(table(report, data, told.seconds))
    well = well and report.passed
  return 0 if well else 1


def read(argv: list[str]) -> tuple[config_lib.Config, int | None, int | None]:
  """The config with what was typed, --images and --samples. Raises: ConfigError, FileNotFoundError."""
  config, given = arguments.RecipeParser("check", optional=OPTIONS).read(argv, _counts)
  return config, *_counts(given)


def _counts(given: dict[str, str]) -> tuple[int | None, int | None]:
  return _number(given, "images", 0), _number(given, "samples", 1)


def _number(given: dict[str, str], name: str, least: int) -> int | None:
  """A whole number from `least`, or None for "all". Raises: ConfigError."""
  return None if given[name] == "all" else arguments.whole(name, given[name], least)


def table(report: Any, data: config_lib.DataConfig, seconds: float) -> str:
  """The report as text."""
  from llava_sp_jax.data import check

  laid = max(1, report.checked)
  lines = [
    f"{data.path}: {report.checked:,} of {report.total:,} samples checked, {report.decoded:,} "
    f"images decoded, {seconds:.0f} s",
    f"tokens with images: {report.tokens / laid:.0f} a sample, {report.longest:,} the longest; "
    f"data.row_length is {data.row_length:,}",
    "",
    f"{'problem':<18}{'samples':>10}  the first",
  ]
  for kind in check.KINDS:
    lines.append(f"{kind:<18}{report.kinds[kind]:>10,}  {report.examples.get(kind, '')}".rstrip())
  if report.images:
    ranked = sorted(report.images, key=lambda f: (-report.missing[f], -report.images[f], f))
    names = {folder: console.shortened(folder, LONGEST) for folder in ranked[:FOLDERS]}
    width = max(len("folder"), *map(len, names.values())) + 2
    lines += ["", f"{'folder':<{width}}{'images':>10}{'missing':>10}"]
    for folder, name in names.items():
      lines.append(f"{name:<{width}}{report.images[folder]:>10,}{report.missing[folder]:>10,}")
    rest = ranked[FOLDERS:]
    if rest:
      images, missing = (sum(c[f] for f in rest) for c in (report.images, report.missing))
      lines.append(f"{f'{len(rest)} more':<{width}}{images:>10,}{missing:>10,}")
  lost = [kind for kind, loses in check.KINDS.items() if loses and report.kinds[kind]]
  lines += ["", f"not well: {', '.join(lost)}" if lost else "well"]
  return "\n".join(lines)
