"""Detects the variant of a projector from the names and shapes of a checkpoint's tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import leaves, projector_names, tables
from llava_sp_jax.convert.torch_io import FormatError, Tensors
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.models.spatial import EXTRACTORS


def with_projector(
  model: config_lib.ModelConfig,
  tensors: Tensors,
  wanted: str,
  origin: str,
  scales: tuple[int, ...] = (),
) -> config_lib.ModelConfig:
  """Returns `model` with the projector variant that has the names and shapes of the tensors.

  The original's configs do not name the variant.

  Args:
    model: the config without its projector.
    tensors: the tensors of the checkpoint; those of other parts are skipped.
    wanted: the variant that the user or the checkpoint names; "" tries all.
    origin: the checkpoint, for messages.
    scales: sides of the views in patches, which our own exports name; () tries those of the
      variant.

  Raises: FormatError when none fits (with what the nearest lacks), or when two do and `wanted` does
    not decide.
  """
  if wanted:
    config_lib.lookup("--variant", wanted, VARIANTS)
  mine = [t for t in tensors.values() if not _ELSEWHERE.match(t.name)]
  fitting, nearest = [], (10**9, 10**9, "", [""])
  for candidate in _candidates(model, wanted, scales):
    variant, sizes = candidate.projector.variant, build.view_sizes(candidate)
    names = projector_names.projector(variant, model.tower.width, sizes)
    unexpected: list[str] = []
    found = leaves.gather(mine, names, unexpected)
    complete = {
      p: target.name
      for p, target in tables.by_path(names).items()
      if model.image_newline or p != _NEWLINE
    }
    problems = [f"missing {name}" for p, name in complete.items() if p not in found]
    if not unexpected and not problems:
      width = next((found[p].shape[-1] for p in _widths(variant) if p in found), 512)
      projector = dataclasses.replace(candidate.projector, token_width=width)
      candidate = dataclasses.replace(candidate, projector=projector)
      expected = {
        p: s
        for p, s in flatten_dict(build.abstract(candidate), sep="/").items()
        if p.startswith("projector/")
      }
      leaves.fit(found, expected, problems)
      if not problems:
        fitting.append(candidate)
    found_here = (len(unexpected), len(problems), variant, unexpected + problems)
    nearest = min(nearest, found_here, key=lambda n: n[:2])
  if len(fitting) == 1:
    return fitting[0]
  if fitting:
    variants = " and ".join(c.projector.variant for c in fitting)
    raise FormatError(
      f"{origin}: its tensors fit the projector variants {variants}, which differ only in how they "
      "compute; the original's config does not say which it is. Give --variant."
    )
  *_, variant, problems = nearest
  raise FormatError(
    f"{origin}: its projector is incomplete or of no known variant, nothing was converted. The "
    f"nearest is {variant!r}:{leaves.listed(problems)}"
  )


_NEWLINE = "projector/image_newline"


def _widths(variant: str) -> Iterator[str]:
  """Yields the paths of parameters whose last axis is the width of the spatial tokens."""
  row = VARIANTS[variant]
  leaf = EXTRACTORS[row.extractor].width
  yield from (f"projector/{view}_0/{leaf}" for view in row.views if leaf)
  yield from (f"projector/detail_{kernel}/conv/kernel" for kernel in row.detail_kernels)


def _candidates(
  model: config_lib.ModelConfig, wanted: str, said: tuple[int, ...]
) -> Iterator[config_lib.ModelConfig]:
  """Yields every variant, with its own scales for the tower's grid and with those of a grid of 24.

  If the checkpoint names scales, every variant has those alone.
  """
  for variant in VARIANTS:
    if wanted not in ("", variant):
      continue
    seen = set()
    for scales in (said,) if said else ((), VARIANTS[variant].scales(24)):
      projector = config_lib.ProjectorConfig(variant=variant, scales=scales)
      candidate = dataclasses.replace(model, projector=projector)
      try:
        sizes = build.view_sizes(candidate)
      except config_lib.ConfigError:
        continue  # views larger than this tower's grid
      if sizes not in seen:
        seen.add(sizes)
        yield candidate


# Tensors of other parts. Any other tensor that a variant does not have rules the variant out.
_ELSEWHERE = re.compile(
  r"base_model\.|lm_head\.|model\.(layers|embed_tokens|norm)\.|vision_model\.|text_model\."
)
