"""Parameters from wherever they are: random, a checkpoint of ours, torch folders, GGUF.

Leaves stay in their files until they are placed; nothing missing, unexpected or mis-shaped gets
past, and every problem is named at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders
from llava_sp_jax.checkpoints import fingerprints, manager, on_disk, runs
from llava_sp_jax.convert import formats, places, quantised, stream
from llava_sp_jax.convert.leaves import Cast, Leaf, Leaves, fit, in_memory, refuse
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.tokenizer import Tokenizer, TokenizerError
from llava_sp_jax.distributed import processes
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.models import build
from llava_sp_jax.models.quantize import is_quantised

ADAPTERS = r"language_model/.*/lora_[ab]$"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A folder of ours as it stands on disk: a training run, or what `convert` wrote."""

  folder: Path
  config: config_lib.Config
  leaves: Leaves  # all of the model, or of the parts that were converted
  step: int
  fingerprint: str  # of the frozen base
  about: dict[str, Any]
  originals: Leaves  # the same before the kernels of its base were quantised

  @property
  def tokenizer(self) -> Path | None:
    path = self.folder / "tokenizer"
    return path if path.is_dir() else None

  def params(self) -> dict[str, np.ndarray]:
    """All leaves read, flat."""
    return {path: leaf.read() for path, leaf in self.leaves.items()}


def is_ours(folder: str | Path) -> bool:
  """Whether a folder is one that `open_own` opens."""
  place = Path(folder)
  return (place / runs.CONFIG_FILE).is_file() and (place / "checkpoints").is_dir()


def located(config: config_lib.Config, folder: str | Path) -> config_lib.Config:
  """The config of a run with `init` as it is reached from here.

  A relative path was seen from where training ran: this folder, or one that the run lies in.
  """

  def place(path: str) -> str:
    if not path or Path(path).exists():
      return path
    seen = (above / path for above in Path(folder).absolute().parents)
    return next((str(there) for there in seen if there.exists()), path)

  init = {name: place(path) for name, path in dataclasses.asdict(config.init).items()}
  return dataclasses.replace(config, init=config_lib.Init(**init))


def open_own(folder: str | Path, verify: bool = True) -> Checkpoint:
  """The latest checkpoint: what was trained, over the base that its config names.

  `verify` reads all values: a step whose trained parameters are not what was saved is named, and
  the one before it is opened. Raises: CheckpointError without such a step, and when the base is
  another one than it was trained with.
  """
  config = located(runs.read_config(folder), folder)
  place, about, step = on_disk.saved(folder, functools.partial(_check_trained, verify=verify))
  trained = stream.Item(place).leaves()
  form = build.quantisation(config.model)
  expected = _abstract(build.unquantised(config.model))
  parts = about.get("parts", list(formats.PARTS))
  expected = {p: s for p, s in expected.items() if p.split("/")[0] in parts}
  base = {p: leaf for p, leaf in _open_init(config, expected).items() if p not in trained}
  missing = {p: s for p, s in expected.items() if p not in trained and p not in base}
  base |= in_memory({p: np.asarray(a) for p, a in _random(config, missing).items()})
  problems: list[str] = []
  fit({**base, **trained}, expected, problems)
  refuse(str(folder), problems)
  originals: Leaves = {**base, **trained}
  if form:
    base = quantised.quantise(base, _abstract(config.model), form)
  if verify:
    found = fingerprints.fingerprint(_AsFrozen(base, config.model.frozen_dtype))
    if found != about["fingerprint"]:
      raise CheckpointError(
        f"{folder}: its frozen base has fingerprint {about['fingerprint']}, but config.init leads "
        f"to {found}; restore the files that config.init names"
      )
  frozen = {p: _cast(leaf, config.model.frozen_dtype) for p, leaf in base.items()}
  leaves: Leaves = {**frozen, **trained}
  return Checkpoint(
    Path(folder), config, leaves, step, about["fingerprint"], about, originals if form else leaves
  )


def _check_trained(place: Path, about: dict[str, Any], verify: bool) -> None:
  """Opens the parameters of a step, and compares them with its checksums, if it has any.

  They are read leaf by leaf, and so once more when they are used; moments are not read.

  Raises: CheckpointError.
  """
  known = on_disk.checksums(place).get("params", {})

  def read() -> None:
    leaves = stream.Item(place / "params").leaves()
    for path, leaf in leaves.items() if verify and known else ():
      found = fingerprints.sums({path: jax.numpy.asarray(leaf.read())})
      fingerprints.compare_sums(found, known, place)

  manager.told(f"{place}: cannot be read", read)


class _AsFrozen(Mapping[str, Any]):
  """Leaves read one at a time, as the model holds them when they do not learn."""

  def __init__(self, leaves: Leaves, dtype: str):
    self._leaves, self._dtype = leaves, dtype

  def __getitem__(self, path: str) -> jax.Array:
    return jax.numpy.asarray(_cast(self._leaves[path], self._dtype).read())

  def __iter__(self) -> Iterator[str]:
    return iter(self._leaves)

  def __len__(self) -> int:
    return len(self._leaves)


def _cast(leaf: Leaf, dtype: str) -> Leaf:
  wanted = np.dtype(jax.numpy.dtype(dtype))
  as_it_is = leaf.dtype == wanted or is_quantised(leaf.path)
  return leaf if as_it_is else Cast(leaf.path, leaf.shape, wanted, leaf)


def open_any(path: str | Path, options: formats.Options, verify: bool = True) -> formats.Source:
  """A checkpoint of ours or of any format in. Raises: CheckpointError, FormatError.

  Without `verify` no values are read, and the base of a run of ours is taken as it is.

  A base that was quantised for training comes as the floats that its codes stand for: they are what
  adapters were trained on, and what a merged model must hold to answer alike. Adapters alone go
  with the original base when `options.base` names it.
  """
  if not is_ours(path):
    return formats.open_checkpoint(path, options)
  own = open_own(path, verify)
  parts = tuple(p for p in formats.PARTS if any(q.startswith(p + "/") for q in own.leaves))
  form = build.quantisation(own.config.model)
  model = build.unquantised(own.config.model)
  source = formats.Source(
    "llava_sp_jax", dataclasses.replace(own.config, model=model),
    quantised.dequantise(own.leaves, form, model.frozen_dtype), parts, own.tokenizer,
    base=options.base or places.reachable(own.about.get("base", "")),
    tower=options.tower or places.reachable(own.about.get("tower", "")),
    fingerprint=own.fingerprint,
  )  # fmt: skip
  if not form or not verify:
    return source
  named = dataclasses.replace(source, leaves=own.originals) if source.base else source
  return dataclasses.replace(source, fingerprint=base_fingerprint(named))


def base_fingerprint(source: formats.Source) -> str:
  """Reads all that stage 2 does not train: tower and decoder without adapters."""
  base = {p: leaf for p, leaf in source.leaves.items()
          if not p.startswith("projector/") and not re.match(ADAPTERS, p)}  # fmt: skip
  return fingerprints.fingerprint(_AsFrozen(base, source.config.model.frozen_dtype))


def verify_base(source: formats.Source) -> None:
  """Reads the base of an exported adapter and compares it with the one it was trained on.

  Raises: FormatError when it is another one.
  """
  if not source.fingerprint or source.format == "llava_sp_jax":
    return
  found = base_fingerprint(source)
  if found != source.fingerprint:
    raise FormatError(
      f"the adapter was trained on a base with fingerprint {source.fingerprint}, but base and "
      f"tower here ({source.base}, {source.tower}) have {found}; name the right ones with --base "
      "and --tower"
    )


def open_tokenizer(source: formats.Source) -> Tokenizer | None:
  """Opens the tokenizer of a checkpoint, if it has one, and compares it with the embedding and template.

  Special tokens without a row are told: published folders have a padding token that no text names.

  Raises: TokenizerError for files of no tokenizer; FormatError when words have no row in the
  embedding, or replies would end in a way that generation does not see.
  """
  if not source.tokenizer:
    return None
  tokenizer = _tokenizer(source.tokenizer)
  rows = source.config.model.language_model.vocab_size
  special = sum(id_ >= rows for id_ in tokenizer.special_ids)
  if len(tokenizer) > rows + special:
    raise FormatError(
      f"{source.tokenizer}: a tokenizer of {len(tokenizer):,} tokens, but the embedding has {rows:,} "
      "rows; put the tokenizer there that the model was trained with"
    )
  if special:
    print(
      f"llava-sp: WARNING: {source.tokenizer}: {special} special tokens have no row in the embedding "
      f"of {rows:,}; no text may name them", file=sys.stderr, flush=True,
    )  # fmt: skip
  if "projector" not in source.parts:
    return tokenizer
  name = source.config.data.template
  config_lib.lookup("--template", name, conversation.TEMPLATES)
  if why := reading.misfit(name, tokenizer):
    raise FormatError(f"{source.tokenizer}: {why}; name one with --template")
  return tokenizer


def _tokenizer(folder: Path) -> Tokenizer:
  """From a copy of its files alone: transformers would read a model's config beside them."""
  with contextlib.ExitStack() as copied:
    copy = copied.enter_context(tempfile.TemporaryDirectory(prefix="llava-sp-tokenizer-"))
    formats.copy_tokenizer(folder, Path(copy))
    try:
      tokenizer = Tokenizer(copy)
    except TokenizerError as error:
      raise TokenizerError(str(error).replace(copy, str(folder))) from None
    weakref.finalize(tokenizer, copied.pop_all().close)
  return tokenizer


def write(
  source: formats.Source, out: Path, dtype: str = "", command: str = "convert"
) -> None:  # fmt: skip
  """Writes a folder of ours with every leaf in it, streamed; call it in every process.

  It names no other folder, so it can be moved. A folder that an interrupted call of the same
  `command` left is written anew. Raises: FolderError when `out` holds anything else.
  """
  makes = (runs.CONFIG_FILE, "checkpoints", "tokenizer")
  with contextlib.ExitStack() as whole:
    place = folders.new(out, command, makes)
    processes.together(f"{out} is begun", lambda: whole.enter_context(place), only=0)
    try:
      _write(source, out, dtype)
    except FormatError:  # the next call would end in the same way
      for name in makes if jax.process_count() == 1 else ():
        folders.remove(out / name)
      raise


def _write(source: formats.Source, out: Path, dtype: str) -> None:
  if dtype:
    source = formats.cast(source, dtype)
  # All of it is in the folder, wherever that is moved, and it is no run that could be unfinished.
  data = dataclasses.replace(source.config.data, tokenizer="tokenizer" if source.tokenizer else "")
  train = dataclasses.replace(source.config.train, steps=0)
  config = dataclasses.replace(source.config, data=data, train=train, init=config_lib.Init())
  about = {
    "fingerprint": fingerprints.fingerprint({}), "name": config.name, "stage": "convert",
    "parts": list(source.parts), "format": source.format, "base": places.lasting(source.base),
    "tower": places.lasting(source.tower),
  }  # fmt: skip
  if jax.process_index() == 0:
    runs.write_config(out, config)
    (out / "checkpoints").mkdir(exist_ok=True)
    if source.tokenizer:
      formats.copy_tokenizer(source.tokenizer, out / "tokenizer")
  total = sum(leaf.nbytes for leaf in source.leaves.values())
  stream.write(out, source.leaves, about, stream.Progress(total))


def finished(folder: str | Path, key: str) -> Checkpoint:
  """`open_own` of a run that reached its last step. Raises: CheckpointError."""
  run = open_own(folder)
  if run.step < run.config.train.steps:
    raise CheckpointError(
      f"{key} {folder}: stopped at step {run.step} of {run.config.train.steps}; finish it first"
    )
  return run


def initial_params(
  config: config_lib.Config, shardings: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
  """Parameters before training, nested, as `config.init` says; what it does not name is random.

  With `init.checkpoint`, only adapters may be new: anything else that the checkpoint lacks is an
  error. `shardings` maps an abstract tree to where each leaf goes. With `model.quantize`, kernels
  are quantised on the way from their files.
  """
  form = build.quantisation(config.model)
  floats = _abstract(build.unquantised(config.model))
  found = _open_init(config, floats)
  missing = {p: s for p, s in floats.items() if p not in found}
  if config.init.checkpoint:
    refuse(
      f"init.checkpoint {config.init.checkpoint}",
      [f"missing {p} {s.shape}" for p, s in missing.items() if not re.match(ADAPTERS, p)],
    )
  random = _random(config, missing)
  expected = _abstract(config.model) if form else floats
  if form:
    found |= in_memory({p: np.asarray(a) for p, a in random.items()})
    found = quantised.quantise(found, expected, form)
  places = shardings(expected) if shardings else dict.fromkeys(expected)
  placed = {
    p: _place(found[p], places[p]) if p in found else jax.device_put(random[p], places[p])
    for p in expected
  }
  return unflatten_dict(placed, sep="/")


def _place(leaf: Leaf, sharding: Any) -> jax.Array:
  """A leaf on its devices; each process reads the slices of its own."""
  if sharding is None:
    return jax.numpy.asarray(leaf.read())
  slices: dict[str, np.ndarray] = {}  # devices that hold the same slice share it

  def read(index: Any) -> np.ndarray:
    return slices.setdefault(str(index), leaf.read(index))

  return jax.make_array_from_callback(leaf.shape, sharding, read)


def _abstract(model: config_lib.Model) -> dict[str, jax.ShapeDtypeStruct]:
  return flatten_dict(build.abstract(model), sep="/")


def _random(config: config_lib.Config, wanted: dict[str, Any]) -> dict[str, jax.Array]:
  """Random leaves, not quantised; the compiler leaves out what is not wanted."""
  if not wanted:
    return {}

  def leaves(rng: jax.Array) -> dict[str, jax.Array]:
    flat = flatten_dict(build.initialise(build.unquantised(config.model), rng), sep="/")
    return {path: flat[path] for path in wanted}

  return jax.jit(leaves)(jax.random.key(config.train.seed))


def _open_init(config: config_lib.Config, expected: dict[str, Any]) -> Leaves:
  """What `config.init` names, each part checked for completeness."""
  init = config.init
  if init.checkpoint and (init.language_model or init.vision_tower):
    raise config_lib.ConfigError(
      "config.init: a checkpoint brings its own base; leave out language_model and vision_tower"
    )
  found: Leaves = {}
  problems: list[str] = []
  if init.checkpoint:
    leaves = finished(init.checkpoint, "init.checkpoint").originals
    fit(leaves, {p: s for p, s in expected.items() if p in leaves}, problems)
    refuse(f"init.checkpoint {init.checkpoint}", problems)
    return leaves
  for part in ("language_model", "vision_tower"):
    path = getattr(init, part)
    if not path:
      continue
    leaves = _open_part(path, part, config)
    wanted = {p: s for p, s in expected.items()
              if p.startswith(part + "/") and not re.match(ADAPTERS, p)}  # fmt: skip
    fit(leaves, wanted, problems)
    refuse(f"init.{part} {path}", problems)
    found |= leaves
  return found


def _open_part(path: str, part: str, config: config_lib.Config) -> Leaves:
  """One part of a checkpoint of ours or of a torch folder."""
  if is_ours(path):
    leaves = finished(path, f"init.{part}").originals
  else:
    options = formats.Options(select_layer=config.model.tower.select_layer)
    source = formats.open_checkpoint(path, options)
    _same_sizes(path, part, source.config.model, config.model)
    leaves = source.leaves
  return {p: leaf for p, leaf in leaves.items() if p.startswith(part + "/")}


# Values of a part that change none of its numbers.
_FREE = (".initializer_range", ".max_positions", ".layers", ".select_layer")


def _same_sizes(path: str, part: str, theirs: config_lib.Model, ours: config_lib.Model) -> None:
  """Raises: ConfigError where a torch folder's settings contradict the config."""
  group = {"language_model": "language_model", "vision_tower": "tower"}[part]
  lines = config_lib.differences(getattr(ours, group), getattr(theirs, group), f"model.{group}")
  free = _FREE if part == "vision_tower" else _FREE[:2]
  lines = [line for line in lines if not line.split(":")[0].endswith(free)]
  if lines:
    raise config_lib.ConfigError(
      f"init.{part} {path} contradicts the config ('here' is the config, 'there' the folder):\n  "
      + "\n  ".join(lines)
    )
