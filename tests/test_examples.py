"""The scripts of examples/, run as they stand there, on tiny folders."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax.checkpoints import runs
from llava_sp_jax.convert import tables
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build, flops, projector
from llava_sp_jax.training import measure, optimizer
from tests.conftest import REPOSITORY, ConfigMaker

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def example(name: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
  assert spec
  assert spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_read_at_a_glance(path: Path) -> None:
  assert sum(bool(line) for line in path.read_text().splitlines()) <= 30
  tested = Path(__file__).read_text()
  assert f'example("{path.stem}")' in tested, "an example that no test runs"


def test_one_answer(run_folder: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
  image = str(tiny_data / "images/3.png")
  example("answer").main([str(run_folder), "what colour is it?", image])
  assert capsys.readouterr().out.endswith("\n")


def test_many_answers(
  run_folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """In their order; a picture that is not there costs its own question."""
  images = [str(tiny_data / "images/3.png")], [str(tmp_path / "gone.png")], []
  rows = [{"question": f"is it {i}?", "images": found} for i, found in enumerate(images)]
  (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  example("batch").main([str(run_folder), str(tmp_path / "asked.jsonl")])
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-3:]]
  assert [row["question"] for row in found] == [row["question"] for row in rows]
  assert [bool(row["error"]) for row in found] == [False, True, False]
  assert "gone.png" in found[1]["error"]


def test_a_model_of_one_s_own() -> None:
  losses = example("projector").main(steps=20)
  assert losses[0] == pytest.approx(np.log(4), rel=0.5)
  assert losses[-1] < 0.5 * losses[0]


def test_a_mesh_of_one_s_own(run_folder: Path) -> None:
  """Its losses are those of the run with the same config."""
  losses = example("train_step").main(runs.read_config(run_folder), fsdp=8)
  lines = (run_folder / "metrics.jsonl").read_text().splitlines()
  assert losses == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-6)


@pytest.mark.slow  # converts, compiles a step, and compares the merged model's logits
def test_own_data_on_a_checkpoint_of_others(tiny_data: Path, tmp_path: Path) -> None:
  foreign = REPOSITORY / "tests/golden/pooling/llava-lora"
  arguments = [str(foreign), f"{tiny_data}/train.json", f"{tiny_data}/images", str(tmp_path)]
  sizes = ["--config.data.row_length=896", "--config.train.batch_size=8", "--config.train.steps=1"]
  assert example("finetune").main([*arguments, *sizes]) == 0
  assert (tmp_path / "merged/config.json").is_file()


@pytest.fixture
def variant() -> Iterator[str]:
  """The variant of examples/variant.py, known until the test ends."""
  known, names = dict(projector.VARIANTS), dict(tables.PROJECTORS)
  example("variant")
  (added,) = set(projector.VARIANTS) - set(known)
  yield added
  for table, before in ((projector.VARIANTS, known), (tables.PROJECTORS, names)):
    table.clear()
    table.update(before)


def test_a_variant_from_outside_has_all_that_the_others_have(
  variant: str, tiny_config: ConfigMaker
) -> None:
  """A place, a rate, a part and a torch name for every parameter; its FLOPs; its tokens."""
  config = tiny_config("finetune", variant).model
  paths = {p for p in flatten_dict(build.abstract(config), sep="/") if p.startswith("projector/")}
  assert build.image_token_count(config) == 4 + 36
  for path in paths:
    assert sharding.param_axes(path)
    assert optimizer.group_of(path, "finetune") == "projector"
  parts = {measure.part_of(path) for path in paths}
  assert parts == {"spatial", "projector"}
  assert flops.costs(config, lambda path: path in paths).image > 0
  named = tables.by_path(tables.projector(variant, config.tower.width, build.view_sizes(config)))
  assert paths == set(named) - {"projector/image_newline"}
