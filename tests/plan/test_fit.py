"""Every command of the docs for a TPU slice fits into its memory, as the docs show it."""

from __future__ import annotations

import dataclasses
import itertools
import math
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
# What GKE calls a slice, and how chips are counted in the names of slices.
ON_GKE = re.compile(r"--accelerator tpu-(?P<kind>\S+) --topology (?P<sides>[\dx]+)")
KINDS = {
  "v4-podslice": ("v4", 2),
  "v5-lite-podslice": ("v5e", 1),
  "v5p-slice": ("v5p", 2),
  "v6e-slice": ("v6e", 1),
}
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
    slices = sorted((*TYPE.finditer(text), *ON_GKE.finditer(text)), key=re.Match.start)
    for at, following in itertools.zip_longest(slices, slices[1:]):
      behind = text[at.end() : following.start() if following else None]
      for value in CONFIG.findall(behind):
        yield Shown(slice_of(at), "train", without_init(recipes.load(value)))


def slice_of(found: re.Match[str]) -> str:
  """The name that `llava-sp plan` has for a slice of TYPE or ON_GKE."""
  if "chips" in found.groupdict():
    kind = found["kind"]
    return f"{kind}e-{found['chips']}" if kind in ("v5", "v6") else f"{kind}-{found['chips']}"
  kind, each = KINDS[found["kind"]]
  return f"{kind}-{math.prod(map(int, found['sides'].split('x'))) * each}"


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
      name = f"{one.config.name} {model.frozen_matmul} {one.topology} {one.what}"
      assert name not in found, f"{name}: say what else differs in its name"
      found[name] = one
  return found


SHOWN = shown()


def test_both_stages_are_launched() -> None:
  stages = {one.config.optimizer.stage for one in launched()}
  assert stages == {"pretrain", "finetune"}
  assert {one.what for one in planned()} == {"train", "eval"}


def test_every_launcher_is_shown() -> None:
  assert slice_of(ON_GKE.search("--accelerator tpu-v5p-slice --topology 2x2x4")) == "v5p-32"
  launchers = [f for f in (REPOSITORY / "scripts").glob("launch_*.sh") if "slurm" not in f.name]
  assert launchers
  for file in launchers:
    assert TYPE.search(file.read_text()) or ON_GKE.search(file.read_text()), file


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
