"""Every variant of the projector trains, answers, goes out as a torch folder and comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax.checkpoints import initial, opening, own_folders, writing
from llava_sp_jax.convert import export, formats
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import from_run
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.training import loop
from tests.conftest import ConfigMaker

# A 12x12 grid, into which twelve scales fit.
SIZES = {"tower": {"image_size": 48, "patch_size": 4}}


# Rows of other kinds than those of the others, of which each takes a minute.
KINDS = ("none", "cropping")


@pytest.mark.parametrize(
  "variant",
  [
    pytest.param(name, marks=pytest.mark.guard if name in KINDS else pytest.mark.slow)
    for name in VARIANTS
  ],
)
def test_trains_answers_and_comes_back(
  variant: str, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  config = tiny_config(
    "finetune", variant, model=SIZES, train={"steps": 2}, data={"row_length": 384}
  )
  loop.train(config, tmp_path / "run")
  started = initial.initial_params(config)["projector"]
  trained = own_folders.open_own(tmp_path / "run")
  kernel = trained.leaves["projector/fc1/kernel"].read()
  assert not np.array_equal(kernel, started["fc1"]["kernel"])
  assert all(np.isfinite(leaf.read()).all() for leaf in trained.leaves.values())

  def answer(folder: Path) -> tuple[int, ...]:
    picture = Path(config.data.image_folder) / "0.png"
    engine = Engine(from_run(folder), batch_size=1, generation=Generation(max_new_tokens=4))
    return next(engine.answer([Request("what is it?", (picture,))])).ids

  source = opening.open_any(tmp_path / "run", formats.Options())
  export.export(source, "llava_lora", tmp_path / "torch")
  writing.write(formats.open_checkpoint(tmp_path / "torch"), tmp_path / "back")
  back = own_folders.open_own(tmp_path / "back")
  assert back.config.model.projector.variant == variant
  for path, leaf in trained.leaves.items():
    np.testing.assert_array_equal(leaf.read(), back.leaves[path].read(), err_msg=path)
  assert answer(tmp_path / "run") == answer(tmp_path / "back")
