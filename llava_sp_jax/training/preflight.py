"""Refuses a run that could not learn, before it has trained a step that is kept.

The settings are checked before weights are loaded, then a few batches, then the gradients of the
first step. That step is an ordinary training step, so nothing is compiled twice. On a refusal its
state is dropped before anything is saved.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.data import conversation, quarantine, reading
from llava_sp_jax.data.anyres import Reader, Tile
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.training import kernel_check, measure, optimizer

PEEK = 2  # batches that are checked
SKIP = "; --config.train.preflight=false trains nevertheless"

# (regex over paths, why a gradient of 0 at the start is correct)
ZERO_AT_START = ((r".*/lora_a$", "lora_b starts at 0"),)


class PreflightError(config_lib.ConfigError):
  """Raised for a run that could not learn; the message lists every problem."""


def _refuse(problems: Sequence[str], hint: str = SKIP) -> None:
  if problems:
    raise PreflightError(
      "this run cannot learn as it is:\n  " + "\n  ".join(problems) + f"\nFix this first{hint}."
    )


def vocabulary(config: config_lib.Config, tokenizer: Tokenizer) -> list[str]:
  """Returns a problem if the tokenizer has tokens without a row in the embedding; [] if not."""
  known, rows = len(tokenizer), config.model.language_model.vocab_size
  if known <= rows:
    return []
  return [
    f"data.tokenizer: {known} tokens, but model.language_model.vocab_size is {rows}; ids beyond it "
    "would silently read another row of the embedding"
  ]


def replies_end(config: config_lib.Config, tokenizer: Tokenizer) -> list[str]:
  """Returns a problem if the tokenizer lacks the token that ends a reply; [] if not."""
  config_lib.lookup("data.template", config.data.template, conversation.TEMPLATES)
  why = reading.misfit(config.data.template, tokenizer)
  return [f"data.{why}"] if why else []


def learning_rates(config: config_lib.Config, tokenizer: Tokenizer) -> list[str]:
  """Returns a problem for each group that the stage trains with a rate of 0 or less; [] if none.

  `tokenizer` is not read; all checks have the same arguments.
  """
  stage = config.optimizer.stage
  paths = flatten_dict(build.abstract(config.model), sep="/")
  groups = {optimizer.group_of(path, stage) for path in paths} - {optimizer.FROZEN}
  rates = {optimizer.RATES[g]: getattr(config.optimizer, optimizer.RATES[g]) for g in groups}
  return [
    f"optimizer.{key}: {rate}, but stage {stage!r} trains with it; give a rate above 0"
    for key, rate in sorted(rates.items())
    if not rate > 0
  ]


def something_is_trained(config: config_lib.Config, tokenizer: Tokenizer) -> list[str]:
  """Returns a problem for each trained row of the stage that matches no parameter; [] if none.

  The common mistake is LoRA with rank 0.
  """
  stage = config.optimizer.stage
  paths = list(flatten_dict(build.abstract(config.model), sep="/"))
  first = {  # the first row that matches each parameter
    path: next(p for p, _ in optimizer.STAGES[stage] if re.match(p, path)) for path in paths
  }
  return [
    f"optimizer.stage: {stage!r} trains {pattern!r}, but the model has no such parameter"
    + (f" (model.lora.rank is {config.model.lora.rank})" if "lora" in pattern else "")
    for pattern, group in config_lib.lookup("optimizer.stage", stage, optimizer.STAGES)
    if group != optimizer.FROZEN and pattern not in first.values()
  ]


def images_fit(config: config_lib.Config, tokenizer: Tokenizer) -> list[str]:
  """Returns the problems of a row without room for the largest image that the settings allow.

  Image tokens are never truncated. Returns [] if the largest image fits.
  """
  tile = Tile(*build.tile_shape(config.model))
  tiles = Reader(config.data, tile).max_tiles
  tokens, length = tiles * tile.tokens, config.data.row_length
  problems = []
  if tokens >= length:
    problems.append(
      f"data.row_length: an image of {tiles} tile{'s' * (tiles > 1)} is {tokens} tokens and rows "
      f"have {length}; such samples are left out, because image tokens are never cut. Give more "
      "than these" + (", or smaller data.grid_pinpoints" if tiles > 1 else "")
    )
  if 0 < config.data.images_per_row < tiles:
    problems.append(
      f"data.images_per_row: {config.data.images_per_row}, but one image can be {tiles} tiles"
    )
  return problems


Check = Callable[[config_lib.Config, Tokenizer], list[str]]
ALWAYS: tuple[Check, ...] = (vocabulary,)
SETTINGS: tuple[Check, ...] = (
  vocabulary, replies_end, learning_rates, something_is_trained, images_fit, kernel_check.problems,
)  # fmt: skip
# Settings that the samples have to fit; `llava-sp check` checks them, too.
OF_DATA: tuple[Check, ...] = (vocabulary, replies_end, images_fit)


def check_config(config: config_lib.Config, tokenizer: Tokenizer) -> None:
  """Checks the settings of a run; only the vocabulary if `train.preflight` is off.

  Raises: PreflightError with every problem.
  """
  _check(config, tokenizer, SETTINGS)


def check_data(config: config_lib.Config, tokenizer: Tokenizer) -> None:
  """Checks only the settings that the samples must fit; the vocabulary alone without preflight.

  Raises: PreflightError with every problem.
  """
  _check(config, tokenizer, OF_DATA)


def _check(config: config_lib.Config, tokenizer: Tokenizer, all_of: Sequence[Check]) -> None:
  checks = all_of if config.train.preflight else ALWAYS
  problems = [problem for check in checks for problem in check(config, tokenizer)]
  _refuse(problems, SKIP if config.train.preflight else "")


@dataclasses.dataclass(frozen=True)
class Seen:
  """Counts samples and images over the first batches of all processes."""

  samples: int = 0
  supervised: int = 0  # samples with at least one supervised token
  with_image: int = 0
  cut_images: int = 0  # tiles that have lost tokens
  quarantined: int = 0

  def __add__(self, other: Seen) -> Seen:
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
    return Seen(*(a + b for a, b in pairs))


def look(batch: Mapping[str, np.ndarray], tile_tokens: int) -> Seen:
  """Counts the samples and images of one host batch.

  `tile_tokens` is the number of tokens of a whole tile, or 0 where tiles may be shown in part.
  """
  total = Seen()
  for segments, weights, slots in zip(
    batch["segments"], batch["weights"], batch["slots"], strict=True
  ):
    sample = segments // BRANCHES
    for number in np.unique(sample[segments > 0]):
      mine = sample == number
      images = slots[mine & (slots >= 0)]
      counts = np.bincount(images // tile_tokens) if tile_tokens and len(images) else np.zeros(0)
      cut = int(((counts > 0) & (counts != tile_tokens)).sum())
      total += Seen(1, int(weights[mine].any()), int(len(images) > 0), cut)
  return total


def check_batches(
  config: config_lib.Config, iterator: Any, quarantined: Callable[[], int], folder: Path
) -> None:
  """Checks the first two batches and rewinds the iterator.

  `quarantined` returns how many samples have been quarantined so far; `folder` is the run folder.

  Raises: PreflightError, the same in all processes, when nothing can be learned from the batches.
  """
  if not config.train.preflight:
    return
  whole = config.data.image_aspect != "anyres" and not config.model.image_newline
  tile_tokens = build.image_token_count(config.model) if whole else 0
  start, before, seen = iterator.get_state(), quarantined(), Seen()
  for _ in range(PEEK):
    seen += look(next(iterator), tile_tokens)
  iterator.set_state(start)
  seen += Seen(quarantined=quarantined() - before)
  if jax.process_count() > 1:  # so that all processes stop or none
    everyone = multihost_utils.process_allgather(np.asarray(dataclasses.astuple(seen)))
    seen = Seen(*(int(n) for n in everyone.sum(axis=0)))
  _refuse(judge(seen, config, _commonest(folder / "quarantine.jsonl")))


def judge(seen: Seen, config: config_lib.Config, reason: str = "") -> list[str]:
  """Returns the problems of the batches that `seen` counts, as texts; [] if there are none.

  `reason` is the commonest reason of quarantine, for the message.
  """
  cause = (
    f"data.template {config.data.template!r} does not fit the data, or data.row_length "
    f"{config.data.row_length} cuts the answers off"
  )
  problems = []
  if not seen.supervised:
    problems.append(f"none of the first {seen.samples} samples has a token to learn: {cause}")
  elif 2 * seen.supervised < seen.samples:
    problems.append(
      f"only {seen.supervised} of the first {seen.samples} samples have a token to learn: {cause}"
    )
  if not seen.with_image:
    problems.append(
      f"none of the first {seen.samples} samples has an image, so the projector learns nothing; is "
      "data.path the right file?"
    )
  if seen.cut_images:
    problems.append(
      f"{seen.cut_images} images have lost tokens to truncation; give a larger data.row_length "
      "than "
      f"{config.data.row_length}"
    )
  if seen.quarantined > seen.samples:
    problems.append(
      f"{seen.quarantined} samples were left out and only {seen.samples} used; the commonest "
      f"reason: {reason or 'see quarantine.jsonl'}"
    )
  return problems


def _commonest(path: Path) -> str:
  """Returns the commonest reason in a quarantine file; digits are ignored when grouping."""
  kinds: collections.Counter[str] = collections.Counter()
  examples: dict[str, str] = {}
  for error in quarantine.reasons(path):
    kind = re.sub(r"\d+", "N", error)
    kinds[kind] += 1
    examples.setdefault(kind, error)
  return examples[kinds.most_common(1)[0][0]] if kinds else ""


def check_gradients(
  config: config_lib.Config, metrics: Mapping[str, Any], paths: Sequence[str]
) -> None:
  """Checks the gradients of the first step, as its metrics report them.

  Every trainable parameter must have a gradient other than 0, except those of ZERO_AT_START.
  Projector and tower are checked only if the batch has an image. `paths` are those of the trainable
  parameters.

  Raises: PreflightError that lists the parameters by part.
  """
  if not config.train.preflight:
    return
  values = jax.device_get({name: metrics[name] for name in ("grad_squares", "image_positions")})
  dead: dict[str, list[str]] = {}
  for path, square in zip(sorted(paths), values["grad_squares"], strict=True):
    reached = path.startswith("language_model/") or values["image_positions"] > 0
    excused = any(re.match(pattern, path) for pattern, _ in ZERO_AT_START)
    if square == 0 and reached and not excused:
      dead.setdefault(measure.part_of(path), []).append(path)
  _refuse(
    [
      f"{part}: the gradient of {', '.join(names)} is exactly 0 after the first step; the loss "
      "does not reach it (a broken checkpoint in config.init, weights of 0 behind it, or no "
      "learned token)"
      for part, names in dead.items()
    ]
  )
