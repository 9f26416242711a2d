"""QLoRA from the first step to an export: resumed to the bit, evaluated, merged, and handed on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import initial, opening, own_folders, runs, writing
from llava_sp_jax.convert import export, folding, formats
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.eval import run as run_lib
from llava_sp_jax.infer import pretrained, verify
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.models.quantize import FORMATS, is_quantized
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.training import loop
from llava_sp_jax.training import run as training_run
from tests.conftest import WIDE, ConfigMaker
from tests.training.test_stages import qlora

GATE = "language_model/layers/gate_proj/kernel"

pytestmark = pytest.mark.guard


@pytest.fixture(scope="module", params=[pytest.param("int8", marks=pytest.mark.slow), "nf4_double"])
def form(request: pytest.FixtureRequest) -> str:
  return request.param


@pytest.fixture(scope="module")
def base(tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A base of floats in files of its own: stage 1."""
  folder = tmp_path_factory.mktemp("base") / "pretrain"
  loop.train(tiny_config("pretrain_all", "none", model=WIDE, train={"steps": 1}), folder)
  return folder


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker, base: Path, form: str) -> config_lib.Config:
  return qlora(tiny_config, form, init={"checkpoint": str(base)}, train={"save_every": 2})


@pytest.fixture(scope="module")
def run(config: config_lib.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("run") / "finetune"
  assert loop.train(config, folder).step == 4
  return folder


def losses(folder: Path) -> list[float]:
  return [json.loads(x)["loss"] for x in (folder / loop.METRICS_FILE).read_text().splitlines()]


def test_goes_on_to_the_bit(
  config: config_lib.Config, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Stopped after step 2 and continued: losses and parameters of the unbroken run."""

  written = tmp_path / "run" / loop.METRICS_FILE

  class Stop(training_run.StopRequest):
    """However often it is looked at, also while a batch is waited for."""

    asked = property(
      lambda self: written.exists() and len(losses(tmp_path / "run")) == 2, lambda self, value: None
    )

  with monkeypatch.context() as patch:
    patch.setattr(training_run, "StopRequest", Stop)
    assert loop.train(config, tmp_path / "run").step == 2
  assert loop.train(config, tmp_path / "run").step == 4
  assert losses(tmp_path / "run") == losses(run)
  ours, theirs = (own_folders.open_own(folder).params() for folder in (tmp_path / "run", run))
  assert ours.keys() == theirs.keys()
  for path, values in ours.items():
    np.testing.assert_array_equal(values, theirs[path], err_msg=path)


def test_another_base_is_refused(run: Path, base: Path, tmp_path: Path, form: str) -> None:
  """The fingerprint is of the codes: another format of the same base is another base."""
  import shutil

  folder = tmp_path / "copy"
  shutil.copytree(run, folder)
  config = runs.read_config(folder)
  other = dataclasses.replace(config.model, quantize="int8_block")
  (folder / runs.CONFIG_FILE).write_text(
    config_lib.to_json(dataclasses.replace(config, model=other))
  )
  with pytest.raises(CheckpointError, match="its frozen base has fingerprint"):
    own_folders.open_own(folder)
  assert own_folders.open_own(run).config.model.quantize == form


def test_evaluation_opens_it(run: Path, tiny_data: Path, tmp_path: Path) -> None:
  model = pretrained.from_run(run)
  flat = flatten_dict(model.params, sep="/")
  assert {str(flat[p].dtype) for p in flat if p.endswith("kernel_q")} <= {"int8", "uint8"}
  assert GATE not in flat
  engine = Engine(model, batch_size=4, generation=Generation(max_new_tokens=3))
  scores = run_lib.run(EasyVqa(tiny_data), engine, tmp_path / "eval")
  assert scores.by_kind["all"]["items"] == 12


def test_merged_computes_what_was_trained(run: Path, form: str, tmp_path: Path) -> None:
  """Exports hold the floats that the codes stand for, with the adapters in them."""
  source = opening.open_any(run, formats.Options())
  assert source.config.model.quantize == "none"
  assert not any(is_quantized(p) for p in source.leaves)
  own = own_folders.open_own(run)
  codes = {p.split("/")[-1]: x.read()[1] for p, x in own.leaves.items() if p.startswith(GATE + "_")}
  real = FORMATS[form]
  assert real
  kernel = source.leaves[GATE]
  np.testing.assert_array_equal(kernel.read()[1], real.dequantize(codes, np.float32))
  part = (slice(1, 2), slice(3, 9), slice(0, 5))
  np.testing.assert_array_equal(kernel.read(part), kernel.read()[part])
  original = own.originals[GATE].read()
  assert 0 < np.abs(kernel.read() - original).max() < 0.3 * np.abs(original).max()
  writing.write(folding.fold(source), tmp_path / "merged")
  merged = opening.open_any(tmp_path / "merged", formats.Options())
  assert verify.compare(source, merged).within_bounds


def test_adapters_go_with_the_named_original_or_with_the_base_as_trained(
  run: Path, base: Path, tmp_path: Path
) -> None:
  export.export(opening.open_any(base, formats.Options()), "language_model", tmp_path / "llm")
  given = formats.Options(base=str(tmp_path / "llm"))
  export.export(opening.open_any(run, given), "llava_lora", tmp_path / "named")
  named = formats.open_checkpoint(tmp_path / "named")
  opening.verify_base(named)
  np.testing.assert_array_equal(
    named.leaves[GATE].read(), own_folders.open_own(base).leaves[GATE].read()
  )
  export.export(opening.open_any(run, formats.Options()), "llava_lora", tmp_path / "alone")
  alone = formats.open_checkpoint(tmp_path / "alone")
  opening.verify_base(alone)
  trained = opening.open_any(run, formats.Options()).leaves
  np.testing.assert_array_equal(alone.leaves[GATE].read(), trained[GATE].read())


def test_a_further_stage_starts_from_the_original_base(
  config: config_lib.Config, run: Path, base: Path, tmp_path: Path
) -> None:
  """Quantised again to the same codes; not quantised, the floats of before."""
  again = dataclasses.replace(config, init=config_lib.InitConfig(checkpoint=str(run)))
  codes = flatten_dict(initial.initial_params(again), sep="/")
  own = own_folders.open_own(run).leaves
  for path in (p for p in codes if is_quantized(p)):
    np.testing.assert_array_equal(codes[path], own[path].read(), err_msg=path)
  plain = dataclasses.replace(again, model=dataclasses.replace(config.model, quantize="none"))
  floats = flatten_dict(initial.initial_params(plain), sep="/")
  np.testing.assert_array_equal(floats[GATE], own_folders.open_own(base).leaves[GATE].read())
  lora = GATE.replace("kernel", "lora_b")
  np.testing.assert_array_equal(floats[lora], own[lora].read())
