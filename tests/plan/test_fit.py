"""Every command of the docs for a TPU slice fits into its memory, as the docs show it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import recipes
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import explain, report, topologies
from llava_sp_jax.tools import plan
from tests import documents
from tests.conftest import REPOSITORY
from tests.plan.test_compile import LIBTPU

PODS = REPOSITORY / "docs" / "pods.md"
TYPE = re.compile(r"--type (?P<kind>v\d\w*?)(?:litepod)?-(?P<chips>\d+)")
CONFIG = re.compile(r"--config (configs/\w+\.py\S*)")


@dataclasses.dataclass(frozen=True)
class Shown:
  """A config that the docs plan or launch, on a slice."""

  topology: str
  what: str
  config: config_lib.Config


def planned() -> Iterator[Shown]:
  for command in documents.commands():
    words = list(command.words)
    if words[:2] == ["llava-sp", "plan"] and "--topology" in words and not command.partial:
      options, config = plan.read(words[2:])
      if not int(options["search"]):
        yield Shown(options["topology"], options["what"], config)


def launched() -> Iterator[Shown]:
  """Those of the launchers in docs/pods.md, and in the first lines of the launchers."""
  for file in (PODS, *sorted((REPOSITORY / "scripts").glob("launch_*.sh"))):
    text = file.read_text()
    for kind, chips in TYPE.findall(text):
      name = f"{kind}e-{chips}" if kind in ("v5", "v6") else f"{kind}-{chips}"
      for value in CONFIG.findall(text[text.index(f"--type {kind}") :]):
        yield Shown(name, "train", without_init(recipes.load(value)))


def without_init(config: config_lib.Config) -> config_lib.Config:
  """What a plan reads of a config: not where weights, data and tokenizer lie."""
  plain = dataclasses.replace(config.data, path="", image_folder="", tokenizer="")
  return dataclasses.replace(config, data=plain, init=config_lib.InitConfig())


def shown() -> dict[str, Shown]:
  found: dict[str, Shown] = {}
  for one in (*planned(), *launched()):
    one = dataclasses.replace(one, config=without_init(one.config))
    if one not in found.values():
      model = one.config.model
      found[f"{one.config.name} {model.frozen_matmul} {one.topology} {one.what}"] = one
  return found


SHOWN = shown()


def test_both_stages_are_launched() -> None:
  stages = {one.config.optimizer.stage for one in launched()}
  assert stages == {"pretrain", "finetune"}
  assert {one.what for one in planned()} == {"train", "eval"}


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (one.what == "eval")) for n, one in SHOWN.items()],
)
def test_it_fits(name: str) -> None:
  one = SHOWN[name]
  topology = topologies.topology(one.topology)
  compiled = compile_lib.compile_config(one.config, topology, one.what)
  found = report.make(one.config, topology, one.what, compiled)
  assert found.fits, explain.refusal(found)
