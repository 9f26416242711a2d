"""llava-sp check: checks a data set for samples that training would leave out."""

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
The header of every image is read, which has its format and its size.

  --images N|all   samples whose images are also decoded, drawn at random (default 1000;
                   0: only the headers of the files are read)
  --samples N|all  samples to check, drawn at random (default all)

Exits with code 1 when samples would be lost. Text that is cut off is reported but is not an error.

example:
  llava-sp check --config configs/finetune_lora.py:data=/mnt/share/llava_finetune --images all
"""
OPTIONS = {"images": "1000", "samples": "all"}
FOLDERS = 20  # rows of the table of folders: those with the most missing images first, then largest
LONGEST = 80  # the most characters of a folder in the table


def main(argv: list[str]) -> int:
  """Checks the data of a recipe and prints a report; returns 1 if samples would be lost, else 0."""
  if {"--help", "-h"} & set(argv):
    print(USAGE, end="")
    return 0
  config, images, samples = read(argv)
  limits.check(config)
  from llava_sp_jax.convert import places
  from llava_sp_jax.data import anyres, check, mixture, pipeline, validation_split
  from llava_sp_jax.data.tokenizer import Tokenizer
  from llava_sp_jax.models import build
  from llava_sp_jax.training import preflight

  build.model(config.model)  # raises for unknown names and sizes that do not fit
  tile = anyres.Tile(*build.tile_shape(config.model))
  tokenizer = Tokenizer(places.tokenizer(config.data.tokenizer))
  preflight.check_data(config, tokenizer)
  files = [
    validation_split.TRAIN,
    *[validation_split.VALIDATION] * bool(config.data.validation_path),
  ]
  pipeline.check_settings(config.data)
  shares = [validation_split.VALIDATION] * bool(config.data.validation_fraction)
  for split in (*files, *shares):  # raises early for data that cannot be opened
    pipeline.open_parts(config.data, tile, split)
  passed = True
  every = [(split, each) for split in files for each in mixture.each(config.data, split).items()]
  for split, (name, (data, _)) in every:
    progress = Progress(0, "samples", stream=sys.stderr)
    seed = mixture.seed_of(config.train.seed, name)

    def show(report: check.CheckReport, progress: Progress = progress) -> None:
      progress.total = min(samples or report.total, report.total)
      progress.at(report.checked, f"{sum(report.kinds.values()):,} problems")

    report = check.check(data, tokenizer, tile, images, samples, show, seed, split)
    console.say(table(report, data, progress.seconds))
    passed = passed and report.passed
  return 0 if passed else 1


def read(argv: list[str]) -> tuple[config_lib.Config, int | None, int | None]:
  """Parses the config with its overrides, --images and --samples; a number is None for "all".

  Raises: ConfigError for wrong options; FileNotFoundError for a file that a recipe needs.
  """
  config, given = arguments.RecipeParser("check", optional=OPTIONS).read(argv, _counts)
  return config, *_counts(given)


def _counts(given: dict[str, str]) -> tuple[int | None, int | None]:
  return _number(given, "images", 0), _number(given, "samples", 1)


def _number(given: dict[str, str], name: str, least: int) -> int | None:
  """Parses an option that is a whole number from `least`, or "all" (None).

  Raises: ConfigError for anything else.
  """
  return None if given[name] == "all" else arguments.whole(name, given[name], least)


def table(report: Any, data: config_lib.DataConfig, seconds: float) -> str:
  """Returns a report as text; `seconds` is the time that the check took."""
  from llava_sp_jax.data import check

  checked = max(1, report.checked)
  lines = [
    f"{data.path}: {report.checked:,} of {report.total:,} samples checked, {report.decoded:,} "
    f"images decoded, {seconds:.0f} s",
    f"tokens with images: {report.tokens / checked:.0f} a sample, {report.longest:,} the longest; "
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
