"""Adapters whose alpha is not twice their rank: in, as logits, merged, and out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import export, folding, formats
from llava_sp_jax.convert.loaded import Loaded
from tests.convert.test_formats import GOLDEN, change_json
from tests.convert.test_round_trip import assert_same, source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A published adapter of rank 4, with the base and tower that it names."""
  for name in ("base-llm", "clip-vit-tiny", "cropping/llava-lora"):
    shutil.copytree(GOLDEN / name, tmp_path / name)
  return tmp_path / "cropping/llava-lora"


def kernel(opened: Loaded, alpha: float) -> np.ndarray:
  """`q_proj` with its adapter, summed by hand: W + alpha / r A B."""
  stem = "language_model/layers/q_proj/"
  w, a, b = (
    opened.leaves[stem + n].read().astype(np.float64) for n in ("kernel", "lora_a", "lora_b")
  )
  return w + alpha / a.shape[-1] * np.einsum("lir,lro->lio", a, b)


@pytest.mark.parametrize("alpha", [4, 2.5])
def test_alpha_is_the_folder_s_own(folder: Path, tmp_path: Path, alpha: float) -> None:
  change_json(folder / "adapter_config.json", lora_alpha=alpha, lora_dropout=0.25)
  opened = formats.open_checkpoint(folder, formats.Options(variant="cropping"))
  assert opened.config.model.lora == config_lib.LoraConfig(rank=4, alpha=float(alpha), dropout=0.25)
  merged = folding.fold(opened).leaves["language_model/layers/q_proj/kernel"].read()
  np.testing.assert_allclose(merged, kernel(opened, alpha), rtol=1e-2, atol=1e-3)
  assert np.abs(merged - kernel(opened, 2 * 4)).max() > 1e-3
  export.export(opened, "llava_lora", tmp_path / "out")
  said = json.loads((tmp_path / "out/adapter_config.json").read_text())
  assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (4, alpha, 0.25)
  assert isinstance(said["lora_alpha"], int) == (alpha == int(alpha))
  back = formats.open_checkpoint(tmp_path / "out")
  assert back.config.model.lora == opened.config.model.lora
  assert_same(opened, back)


def test_every_adapted_kernel_is_folded_layer_by_layer() -> None:
  """All seven of both layers, in any slice; what has no adapter stays the same bits."""
  ours = source("none")
  folded = folding.fold(ours)
  names = {p.split("/")[-2] for p in ours.leaves if p.endswith("lora_a")}
  assert names == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
  for path, leaf in folded.leaves.items():
    stem = path.rsplit("/", 1)[0]
    if f"{stem}/lora_a" not in ours.leaves or not path.endswith("/kernel"):
      np.testing.assert_array_equal(leaf.read(), ours.leaves[path].read(), err_msg=path)
      continue
    w, a, b = (ours.leaves[f"{stem}/{n}"].read() for n in ("kernel", "lora_a", "lora_b"))
    for layer in range(len(w)):
      wanted = w[layer] + 3.0 / 2 * a[layer] @ b[layer]
      np.testing.assert_allclose(leaf.read()[layer], wanted, rtol=1e-5, atol=1e-5, err_msg=path)
