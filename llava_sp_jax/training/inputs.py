"""Opens what a run reads beside its config: tokenizer and samples, with the fingerprints of both."""

from __future__ import annotations

import dataclasses

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import places
from llava_sp_jax.data import anyres, lengths, mixture, pipeline, validation_split
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import processes
from llava_sp_jax.models import build


def open_tokenizer(config: config_lib.Config) -> Tokenizer:
  """Opens the tokenizer that `data.tokenizer` names, from a folder or the Hugging Face hub.

  Raises: FormatError if it cannot be fetched; FileNotFoundError, TokenizerError if the folder holds
    none.
  """
  return Tokenizer(places.tokenizer(config.data.tokenizer))


def hosts() -> lengths.Hosts | None:
  """Returns what divides the measuring of samples among the processes; None for a single one."""
  count = jax.process_count()
  return lengths.Hosts(jax.process_index(), count, processes.all_gather) if count > 1 else None


def first_rows(config: config_lib.Config) -> int:
  """Returns the number of rows in the first epoch, of which `train.epochs` makes the steps.

  Measures the samples where the packing needs their sizes.

  Raises: ConfigError, FileNotFoundError for data that cannot be used.
  """
  tile = anyres.Tile(*build.tile_shape(config.model))
  train = config.train
  batches = pipeline.make(config.data, open_tokenizer(config), tile, train.batch_size, train.seed)
  return batches.stream.epoch_rows()


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Holds the fingerprints of what a run reads, and of each source of a mixture by name."""

  now: dict[str, str]  # "data" and "tokenizer"
  former: dict[str, str]  # that earlier versions gave to the same
  mixture: dict[str, dict[str, str]]  # {} without a mixture


def fingerprints(config: config_lib.Config, tokenizer: Tokenizer) -> Inputs:
  """Returns the fingerprints of what a run reads. Reads the samples, but no images."""
  tile = anyres.Tile(*build.tile_shape(config.model))
  parts = pipeline.open_parts(config.data, tile, validation_split.TRAIN)
  found = {"data": mixture.fingerprint(parts)[:16], "tokenizer": tokenizer.fingerprint()[:16]}
  former = "" if config.data.mixture else parts[0].source.former_fingerprint()[:16]
  return Inputs(found, {"data": former}, mixture.table(parts))


def validation_input(config: config_lib.Config) -> dict[str, str]:
  """Returns {"validation data": fingerprint of `data.validation_path`}, or {} without such a file.

  All processes need the same file, because validation figures are sums over all of them.
  """
  if not (config.train.validate_every and config.data.validation_path):
    return {}
  tile = anyres.Tile(*build.tile_shape(config.model))
  parts = pipeline.open_parts(config.data, tile, validation_split.VALIDATION)
  return {"validation data": mixture.fingerprint(parts)[:16]}
