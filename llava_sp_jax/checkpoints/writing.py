"""Writes a checkpoint of any format as a run folder of this package."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders, storage
from llava_sp_jax.checkpoints import fingerprints, runs, stream
from llava_sp_jax.convert import formats, places
from llava_sp_jax.convert.loaded import Loaded, cast
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.distributed import processes
from llava_sp_jax.progress import Progress


def write(source: Loaded, out: Path, dtype: str = "", command: str = "convert") -> None:
  """Writes a run folder with every parameter of `source`, streamed; every process must call it.

  The folder refers to no other folder, so it can be moved. A folder that an interrupted call of the
  same `command` left is rewritten. `dtype` is that of the written parameters; "" keeps each one's.

  Raises: FolderError when `out` holds anything else.
  """
  makes = (runs.CONFIG_FILE, "checkpoints", "tokenizer")
  with contextlib.ExitStack() as whole:
    place = folders.new(out, command, makes)
    processes.collective(f"{out} is begun", lambda: whole.enter_context(place), only=0)
    try:
      _write(source, out, dtype)
    except FormatError:  # the next call would fail alike
      for name in makes if jax.process_count() == 1 else ():
        folders.remove(out / name)
      raise


def _write(source: Loaded, out: Path, dtype: str) -> None:
  if dtype:
    source = cast(source, dtype)
  # Paths stay inside the folder, so that it can be moved; with 0 steps it counts as finished.
  data = dataclasses.replace(source.config.data, tokenizer="tokenizer" if source.tokenizer else "")
  train = dataclasses.replace(source.config.train, steps=0)
  config = dataclasses.replace(source.config, data=data, train=train, init=config_lib.InitConfig())
  about = {
    "fingerprint": fingerprints.fingerprint({}),
    "name": config.name,
    "stage": "convert",
    "parts": list(source.parts),
    "format": source.format,
    "base": places.lasting(source.base),
    "tower": places.lasting(source.tower),
  }
  if jax.process_index() == 0:
    runs.write_config(out, config)
    storage.of(out).make(out / "checkpoints")
    if source.tokenizer:
      with storage.filled(out / "tokenizer") as made:
        formats.copy_tokenizer(source.tokenizer, made)
  total = sum(leaf.nbytes for leaf in source.leaves.values())
  shown = jax.process_index() == 0
  stream.write(out, source.leaves, about, Progress(total, "GB", scale=1e9, shown=shown))
