"""Every command line of README, docs and recipes is read by what it would start, up to its start."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import export
from llava_sp_jax.plan import topologies
from llava_sp_jax.results import predictions
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tools import arguments as arguments_lib
from llava_sp_jax.tools import benchmark_options, check, evaluate, plan
from llava_sp_jax.tools import train as train_tool
from tests import documents
from tests.conftest import REPOSITORY
from tests.documents import PAGES, Command

# Programs of others that the pages call: their options are not ours to know.
OTHERS = (
  "[",
  "docker",
  "gcloud",
  "git",
  "hf",
  "kubectl",
  "lmms-eval",
  "mkdir",
  "mount",
  "mountpoint",
  "sphinx-build",
  "sudo",
  "unzip",
  "vllm",
  "wget",
)
# What a part of a command leaves out.
REST = {"config": "configs/finetune_lora.py", "workdir": "runs/x", "topology": "v5e-16"}


class Parsed(Exception):  # noqa: N818 - it ends a program where its work would begin
  def __init__(self, options: argparse.Namespace):
    self.options = options


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """In the repository, where argparse raises what it says instead of ending the process."""
  monkeypatch.chdir(REPOSITORY)
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.setattr(os, "environ", os.environ.copy())
  loaded = set(sys.modules)
  yield
  for name in set(sys.modules) - loaded:  # scripts import each other by bare names
    file = getattr(sys.modules[name], "__file__", None) or ""
    if Path(file).parent.name in ("scripts", "benchmarks"):
      del sys.modules[name]


def arguments(start: Callable[[], Any], partial: bool) -> argparse.Namespace:
  """What the first parser that `start` uses makes of its words. Raises: ValueError."""

  def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
    if partial:
      for action in self._actions:
        action.required = False
        action.nargs = action.nargs if action.option_strings or action.nargs else "?"
    found, unknown = self.parse_known_args(args, namespace)
    if unknown:
      self.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed(found)

  def error(self: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)

  with pytest.MonkeyPatch.context() as patch:
    for parser in (argparse.ArgumentParser, arguments_lib.Parser):
      patch.setattr(parser, "parse_args", parse)
      patch.setattr(parser, "error", error)
    patch.setattr(argparse.ArgumentParser, "exit", lambda *_: error(None, "it wants no arguments"))
    try:
      start()
    except Parsed as parsed:
      return parsed.options
  raise ValueError("it reads no arguments")


def flags(words: list[str], partial: bool, *needed: str) -> list[str]:
  """Words of a command that takes a recipe; `partial` ones get what they need."""
  given = {word.partition("=")[0] for word in words}
  return words + [f"--{n}={REST[n]}" for n in needed if partial and f"--{n}" not in given]


def eval_(words: list[str], partial: bool) -> None:
  options = arguments(lambda: evaluate.main(words), partial)
  evaluate._check_counts(options)
  names = [name for text in options.task or ["easy_vqa"] for name in text.split(",")]
  for task in names:
    config_lib.lookup("--task", task, TASKS)
    if options.data:
      benchmark_options.data_of(task, names, options.data)
  if options.part:
    predictions.parse_part(options.part)


def export_(words: list[str], partial: bool) -> None:
  options = arguments(lambda: cli.main(["export", *words]), partial)
  if options.format != "NAME":
    config_lib.lookup("--format", options.format, export.EXPORTS)


def train(words: list[str], partial: bool) -> None:
  with documents.stand_ins():
    train_tool.read(flags(words, partial, "config", "workdir"))


def check_(words: list[str], partial: bool) -> None:
  with documents.stand_ins():
    check.read(flags(words, partial, "config"))


def plan_(words: list[str], partial: bool) -> None:
  options, _ = plan.read(flags(words, partial, "config", "topology"))
  topologies.topology(options["topology"])


# Commands whose words are more than their parser alone knows.
COMMANDS: dict[str, Callable[[list[str], bool], Any]] = {
  "eval": eval_,
  "export": export_,
  "train": train,
  "plan": plan_,
  "check": check_,
}


def llava_sp(command: Command) -> None:
  name, *words = command.words[1:]
  if name not in cli.COMMANDS:
    raise ValueError(f"no command {name!r}")
  if "--help" in words or (command.partial and not words):
    return
  default = lambda words, partial: arguments(lambda: cli.main([name, *words]), partial)  # noqa: E731
  COMMANDS.get(name, default)(words, command.partial)


def python(command: Command) -> None:
  """A file or a module of this repository."""
  first, *words = command.words[1:]
  if first == "-m":
    module, *words = words
    if module in sys.stdlib_module_names:
      return
    if module == "pip":
      return pip(dataclasses.replace(command, words=("pip", *words)))
    first = f"{module.replace('.', '/')}.py"
  file = REPOSITORY / first
  if not file.is_file():
    raise ValueError(f"no file {first}")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", [str(file), *words])
    patch.syspath_prepend(file.parent)
    arguments(lambda: runpy.run_path(str(file), run_name="__main__"), command.partial)


def bash(command: Command) -> None:
  """The launchers show what they would do; the others take what stands in them."""
  first, *words = command.words[1:]
  script = REPOSITORY / first.removeprefix("llava-sp-jax/")  # the copy on a worker
  if not script.is_file():
    raise ValueError(f"no file {first}")
  text = script.read_text()
  handed = re.search(r"python\"? (\S+\.py)[^\n]*\"\$@\"", text)
  if "--dry-run" in text or "pod.sh" in text:
    done = subprocess.run(
      ["bash", str(script), "--dry-run", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
      raise ValueError(done.stderr)
    end = words.index("--") if "--" in words else len(words)
    config = words.index("--config")
    train([*words[config : config + 2], *words[end + 1 :]], True)
  elif handed:
    python(dataclasses.replace(command, words=("python", handed[1], *words)))
  elif unknown := [w for w in words if w.startswith("--") and w not in text]:
    raise ValueError(f"{first} has no {unknown}")


def pip(command: Command) -> None:
  """Extras exist, and a version that is named is the one that this repository uses."""
  setup = ast.parse((REPOSITORY / "setup.py").read_text())
  (extras,) = [
    k.value for k in ast.walk(setup) if isinstance(k, ast.keyword) and k.arg == "extras_require"
  ]
  known = [key.value for key in extras.keys]
  pins = (REPOSITORY / "scripts" / "environment.sh").read_text()
  pins += "".join(path.read_text() for path in REPOSITORY.glob("constraints*.txt"))
  words = iter(command.words[2:])
  for word in words:
    if word == "-c":
      word = next(words)
      if not (REPOSITORY / word).is_file():
        raise ValueError(f"no file {word}")
    elif ours := re.fullmatch(r"(?:\.|llava-sp-jax)\[(.*)\]", word):
      if unknown := set(ours[1].split(",")) - set(known):
        raise ValueError(f"setup.py has no extra {unknown}; known: {known}")
    elif "==" in word:
      pin = re.sub(r"\[.*\]", "", word)
      if pin not in pins.split():
        raise ValueError(f"{pin} is in no constraints*.txt and not in scripts/environment.sh")


def option(command: Command) -> None:
  """Keys of the config with their values, as in `--config.model.quantize=nf4`."""
  words = [w for w in command.words if "*" not in w]
  overrides = {k.removeprefix("--"): v for k, _, v in (w.partition("=") for w in words)}
  config_lib.override(config_lib.Config(), overrides)


PROGRAMS = {"llava-sp": llava_sp, "python": python, "bash": bash, "pip": pip}


def read(command: Command) -> None:
  """Raises: an error that names the file and the line."""
  try:
    if command.words[0].startswith("--config."):
      option(command)
    elif command.program in PROGRAMS:
      PROGRAMS[command.program](command)
    elif command.program not in OTHERS:
      raise ValueError(f"a program that this test does not know: {command.program}")
    for word in command.words:
      if word.startswith("--command="):  # what another machine runs
        for inner in documents.split(word.partition("=")[2], command.file, command.line):
          read(inner)
  except (ValueError, OSError, RuntimeError) as error:
    raise AssertionError(f"{command}\n{error}") from error


@pytest.mark.parametrize("command", documents.commands(), ids=lambda c: f"{c.file}:{c.line}")
def test_the_line_is_understood(command: Command) -> None:
  read(command)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("llava-sp trial --config x", "no command 'trial'"),
    ("llava-sp generate --checkpoint x --picture y --question z", "--picture"),
    ("llava-sp generate --checkpoint x", "--question"),
    ("llava-sp train --config configs/gone.py --workdir x", "no file 'configs/gone.py'"),
    ("llava-sp train --config configs/pretrain.py:sice=7b --workdir x", "unknown option 'sice'"),
    ("llava-sp train --config configs/pretrain.py --workdir x --config.data.paht=x", "data.paht"),
    ("llava-sp train --config configs/pretrain.py", "no --workdir"),
    ("llava-sp eval --checkpoint x --data y --task popes", "unknown 'popes'"),
    ("llava-sp eval --checkpoint x --data y --part 2/2", "2/2"),
    ("llava-sp export x y --format llava_loras", "unknown 'llava_loras'"),
    ("llava-sp plan --config configs/pretrain.py --topology v5e-17", "unknown 'v5e-17'"),
    ("llava-sp check --config configs/pretrain.py --images some", "found 'some'"),
    ("bash scripts/gone.sh", "no file scripts/gone.sh"),
    ("bash scripts/launch_tpu_vm.sh --name x --config configs/pretrain.py", "missing --zone"),
    (
      "bash scripts/launch_slurm.sh --nodes 1 --gpus-per-node 1 --time 1 --workdir x --config "
      "configs/pretrain.py -- --config.train.kep=1",
      "train.kep",
    ),
    ("bash scripts/test.sh --gards", "--gards"),
    ("python scripts/gone.py", "no file scripts/gone.py"),
    ("python scripts/prepare_easy_vqa.py --into x", "--into"),
    ("python -m tests.parity.ladder --into x", "--into"),
    ("true && pip install -e '.[tpus]'", "'tpus'"),
    ("pip install -e . -c constraint.txt", "no file constraint.txt"),
    ("pip install jax[tpu]==0.1", "jax==0.1 is in no constraints"),
    ("ssh x --command='bash llava-sp-jax/scripts/on_worker.sh --stops'", "does not know: ssh"),
    ("gcloud x --command='bash llava-sp-jax/scripts/on_worker.sh --stops'", "--stops"),
    ("curl x", "does not know: curl"),
  ],
)
def test_a_line_that_is_wrong_is_found(line: str, message: str) -> None:
  page = f"text\n```bash\n{line}  # and why\n```\n"
  *_, last = documents.of_page(page, "page.md")
  with pytest.raises(AssertionError) as error:
    read(last)
  assert str(error.value).startswith("page.md:3: ")
  assert message in str(error.value)


def test_lines_are_found_where_they_stand() -> None:
  page = (
    "`llava-sp train` and `--config.model.quantize=int8|nf4`, `llava-sp check\n--images all`\n"
    "```\nllava-sp a\nnot ours\n```\n```json\nllava-sp b\n```\n"
    "```bash\nJ=k llava-sp c \\\n  --d 'e f'  # g\nh || { i && j; }\n```\n"
  )
  found = [(c.line, c.words, c.partial) for c in documents.of_page(page, "page.md")]
  assert found == [
    (4, ("llava-sp", "a"), False),
    (11, ("llava-sp", "c", "--d", "e f"), False),
    (13, ("h",), False),
    (13, ("i",), False),
    (13, ("j",), False),
    (1, ("llava-sp", "train"), True),
    (1, ("--config.model.quantize=int8",), True),
    (1, ("--config.model.quantize=nf4",), True),
    (1, ("llava-sp", "check", "--images", "all"), True),
  ]


@pytest.mark.parametrize("page", PAGES, ids=documents.name)
def test_links_lead_somewhere(page: Path) -> None:
  """Files of this repository that a page links to, pictures included."""
  targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", documents.prose(page.read_text()))
  ours = [t for t in targets if "://" not in t]
  assert [t for t in ours if not (page.parent / t).exists()] == []
