"""The scripts of examples/, run as they stand there, on tiny folders."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax.checkpoints import runs
from llava_sp_jax.config import ProjectorConfig
from llava_sp_jax.convert import detect, leaves, projector_names
from llava_sp_jax.data import anyres
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build, flops, projector, spatial
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
  tables = (projector.VARIANTS, spatial.VIEWS, spatial.EXTRACTORS)
  known = [dict(table) for table in tables]
  example("variant")
  (added,) = set(projector.VARIANTS) - set(known[0])
  yield added
  for table, before in zip(tables, known, strict=True):
    table.clear()
    table.update(before)


def test_a_variant_from_outside_has_all_that_the_others_have(
  variant: str, tiny_config: ConfigMaker
) -> None:
  """A place, a rate, a part and a torch name for every parameter; its FLOPs; its tokens."""
  config = tiny_config("finetune", variant).model
  abstract = flatten_dict(build.abstract(config), sep="/")
  shapes = {path: leaf.shape for path, leaf in abstract.items() if path.startswith("projector/")}
  assert build.image_token_count(config) == 8 + 36
  for path, shape in shapes.items():
    assert len(sharding.param_axes(path)) == len(shape)
    assert optimizer.group_of(path, "finetune") == "projector"
  assert {measure.part_of(path) for path in shapes} == {"spatial", "projector"}
  # Two views at four scales, one use of each kernel by an image; its gradient, and none of the tower.
  kernels = {p for p in shapes if re.fullmatch(r"projector/(corner|crop)_\d/kernel", p)}
  frozen, trained = (flops.costs(config, chosen).image for chosen in (never, kernels.__contains__))
  assert trained - frozen == 2 * sum(math.prod(shapes[path]) for path in kernels)


def never(path: str) -> bool:
  return False


def test_a_variant_from_outside_is_found_among_the_tensors_of_its_export(
  variant: str, tiny_config: ConfigMaker
) -> None:
  """The width of its tokens as well, and every value at its place."""
  config = tiny_config("finetune", variant).model
  names = projector_names.projector(variant, config.tower.width, build.view_sizes(config))
  draw = np.random.default_rng(0)
  made = {
    path: draw.normal(size=leaf.shape).astype(np.float32)
    for path, leaf in flatten_dict(build.abstract(config), sep="/").items()
    if path.startswith("projector/")
  }
  tensors = {tensor.name: tensor for tensor in leaves.to_tensors(leaves.in_memory(made), names)}
  assert "model.corner_1.weight" in tensors
  other = dataclasses.replace(config, projector=ProjectorConfig(variant="none"))
  found = detect.with_projector(other, tensors, "", "here")
  assert found.projector == dataclasses.replace(config.projector, scales=())
  problems: list[str] = []
  back = leaves.gather(list(tensors.values()), names, problems)
  assert not problems
  for path, array in made.items():
    np.testing.assert_array_equal(back[path].read(), array)


def test_an_order_of_tokens_from_outside(
  tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A row of `anyres.MERGES` is all that the order of an image's tokens is."""
  config = tiny_config("finetune", "cropping")
  monkeypatch.setitem(anyres.MERGES, "patches_first", lambda s, base, rest, size: [base, rest, s])
  data = dataclasses.replace(config.data, patch_merge="patches_first")
  reader = anyres.Reader(data, anyres.Tile(*build.tile_shape(config.model)))
  assert reader.plan((12, 12)).slots.tolist() == [*range(6, 42), *range(6)]
