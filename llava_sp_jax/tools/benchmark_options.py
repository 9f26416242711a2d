"""Reads the options of `llava-sp eval` that choose benchmarks, their data and their judge."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  pass


def names_of(options: argparse.Namespace) -> list[str]:
  """Returns the benchmarks that --task names (default: easy_vqa). Raises: ConfigError for none."""
  from llava_sp_jax.config import ConfigError

  given = options.task or ["easy_vqa"]
  if names := [name for text in given for name in text.split(",") if name]:
    return names
  raise ConfigError(f"--task: expected a benchmark, found {','.join(given)!r}; see --list")


def tasks_of(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
  """Opens the benchmarks of `names`, and returns {name: task}; runs before a model is loaded.

  Raises: ConfigError for an unknown name or option; FileNotFoundError for data that are missing.
  """
  from llava_sp_jax.config import ConfigError
  from llava_sp_jax.tasks import catalog

  classes = [catalog.find("--task", name) for name in dict.fromkeys(names)]
  found = {make.name: make for make in classes}
  if len(found) < len(classes):
    raise ConfigError(f"--task {','.join(names)}: two of them are named alike")
  return {name: _task(name, make, list(found), options) for name, make in found.items()}


def _task(name: str, make: Any, names: Sequence[str], options: argparse.Namespace) -> Any:
  """Makes a task with the options of the command; `names` are those of all tasks."""
  texts = dict(_pair(text, "--option") for text in options.option)
  if options.protocol:
    texts["protocol"] = options.protocol
  given = _options(name, make, texts)
  if options.judge_url and "judge" in _takes(make):
    given["judge"] = judge_of(options)
    given["reviews"] = f"{out_of(name, names, options)}/reviews.jsonl"
  return make(data_of(name, names, options.data), **given)


def _takes(make: Any) -> Sequence[str]:
  """Returns the options that a task's class takes besides its data."""
  return tuple(getattr(make, "options", ()))


def _options(name: str, make: Any, texts: Mapping[str, str]) -> dict[str, Any]:
  """Parses the values of options to the types of a task's defaults.

  Options without a default (e.g. a judge) are not accepted here, and have flags of their own.

  Raises: ConfigError for unknown options, and values of another type.
  """
  import inspect

  from llava_sp_jax.config import ConfigError, parse

  defaults = {
    k: p.default
    for k, p in inspect.signature(make).parameters.items()
    if k in _takes(make) and p.default is not None
  }
  if unknown := [key for key in texts if key not in defaults]:
    has = f"it has {', '.join(defaults)}" if defaults else "it has none"
    judge = "; a judge is given with --judge-url" if {"judge", "reviews"} & set(unknown) else ""
    raise ConfigError(f"--task {name}: no option {', '.join(unknown)}; {has}{judge}")
  given = {}
  for key, text in texts.items():
    try:
      given[key] = parse(text, defaults[key])
    except (ValueError, KeyError):
      expected = {bool: "true or false"}.get(type(defaults[key]), type(defaults[key]).__name__)
      raise ConfigError(f"--option {key}: expected {expected}, found {text!r}") from None
  return given


def data_of(name: str, names: Sequence[str], texts: Sequence[str]) -> str:
  """Returns the data folder of a task: of TASK=FOLDER, or the one that is given for all tasks.

  `names` are those of all tasks, `texts` the values of --data.

  Raises: ConfigError when there is none.
  """
  pairs = [
    (task, folder)
    for task, equals, folder in (text.partition("=") for text in texts)
    if equals and task in names
  ]
  own = dict(pairs)
  common = [text for text in texts if text.partition("=")[0] not in own]
  if name not in own and not common:
    from llava_sp_jax.config import ConfigError

    raise ConfigError(f"--task {name}: no data for it; give --data {name}=FOLDER")
  return own.get(name) or common[-1]


def _pair(text: str, flag: str) -> tuple[str, str]:
  key, equals, value = text.partition("=")
  if not equals:
    from llava_sp_jax.config import ConfigError

    raise ConfigError(f"{flag}: expected KEY=VALUE, found {text!r}")
  return key, value


def out_of(name: str, tasks: Collection[str], options: argparse.Namespace) -> str:
  """Returns the result folder of the benchmark `name`: --out, or a folder in the checkpoint's.

  With several `tasks`, each has a folder of its own below --out.
  """
  if not options.out:
    return f"{options.checkpoint}/eval-{name}"
  return options.out if len(tasks) == 1 else f"{options.out}/{name}"


def judge_of(options: argparse.Namespace) -> Any:
  """Makes the judge of --judge-url.

  Raises: ConfigError without a model; JudgeError when its key is not set.
  """
  from llava_sp_jax.config import ConfigError
  from llava_sp_jax.tasks import judge

  if not options.judge_model:
    raise ConfigError("--judge-url without --judge-model; name the model as that server does")
  return judge.Endpoint(options.judge_url, options.judge_model, options.judge_key_env)
