"""In -> out -> in is bit-equal for every variant and format, and torch's own readers agree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import opening, writing
from llava_sp_jax.convert import export, folding, formats, leaves
from llava_sp_jax.convert.loaded import Loaded, is_adapter
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.folders import FolderError
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS

TOWER = config_lib.TowerConfig(
  image_size=96, patch_size=4, width=8, layers=2, heads=2, mlp_width=16
)
TEXT = config_lib.LanguageModelConfig(
  vocab_size=32, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=12
)
GRID_16 = dataclasses.replace(TOWER, image_size=64)


def source(variant: str, dtype: str = "float32", rank: int = 2, **model: Any) -> Loaded:
  """A whole random model in memory."""
  tower = GRID_16 if variant == "crop_224" else TOWER
  values = config_lib.ModelConfig(
    tower=tower,
    language_model=TEXT,
    projector=config_lib.ProjectorConfig(variant=variant, token_width=8),
    lora=config_lib.LoraConfig(rank=rank, alpha=3.0),
    dtype=dtype,
    frozen_dtype=dtype,
  )
  values = dataclasses.replace(values, **model)
  rng = np.random.default_rng(0)
  wanted = np.dtype(jax.numpy.dtype(dtype))
  arrays = {
    path: rng.normal(size=leaf.shape).astype(wanted)
    for path, leaf in flatten_dict(build.abstract(values), sep="/").items()
  }
  config = config_lib.Config(name="random", model=values, train=config_lib.TrainConfig(steps=0))
  return Loaded("memory", config, leaves.in_memory(arrays), formats.PARTS, None)


def assert_same(one: Loaded, two: Loaded) -> None:
  assert set(one.leaves) == set(two.leaves)
  for path, leaf in one.leaves.items():
    ours, theirs = leaf.read(), two.leaves[path].read()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), path
    assert ours.tobytes() == theirs.tobytes(), path


# Rows whose kernels are of other kinds than those of the others, which are slow.
KINDS = ("none", "pooling", "cropping", "cropping_transformer", "register")
CASES = [
  *(
    pytest.param(variant, "float32", marks=[pytest.mark.slow] * (variant not in KINDS))
    for variant in VARIANTS
  ),
  ("cropping", "bfloat16"),
  ("pooling", "bfloat16"),
  ("none", "float16"),
  ("pooling_transformer", "bfloat16"),
]


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_adapter_folder_and_our_own(variant: str, dtype: str, tmp_path: Path) -> None:
  ours = source(variant, dtype)
  export.export(ours, "llava_lora", tmp_path / "lora")
  back = formats.open_checkpoint(tmp_path / "lora")
  assert back.config.model.projector.variant == variant
  assert back.config.model.lora == dataclasses.replace(ours.config.model.lora)
  assert back.config.model.language_model == TEXT
  assert_same(ours, back)
  writing.write(back, tmp_path / "ours")
  assert_same(ours, opening.open_any(tmp_path / "ours", formats.Options()))


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_merged_folder(variant: str, dtype: str, tmp_path: Path) -> None:
  ours = source(variant, dtype, rank=0)
  export.export(ours, "llava", tmp_path / "merged")
  back = formats.open_checkpoint(tmp_path / "merged")
  assert back.config.model.projector.variant == variant
  assert_same(ours, back)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llava_hf", "language_model", "vision_tower"])
def test_layouts_of_transformers(name: str, dtype: str, tmp_path: Path) -> None:
  ours = source("none", dtype, rank=0)
  export.export(ours, name, tmp_path / "out")
  back = formats.open_checkpoint(tmp_path / "out", formats.Options(select_layer=-1))
  kept = {p: leaf for p, leaf in ours.leaves.items() if p.split("/")[0] in back.parts}
  assert_same(dataclasses.replace(ours, leaves=kept), without_image_row(back))


def without_image_row(model: Loaded) -> Loaded:
  """Without the rows that llava_hf puts behind an embedding for its `<image>`."""
  rows = TEXT.vocab_size
  cut = {
    "language_model/token_embed/embedding": np.s_[:rows],
    "language_model/lm_head/kernel": np.s_[:, :rows],
  }
  kept = {p: model.leaves[p].read()[index] for p, index in cut.items() if p in model.leaves}
  return dataclasses.replace(model, leaves={**model.leaves, **leaves.in_memory(kept)})


def test_folding_adds_the_scaled_product() -> None:
  ours = source("none")
  folded = folding.fold(ours)
  assert not [p for p in folded.leaves if is_adapter(p)]
  assert folded.config.model.lora.rank == 0
  stem = "language_model/layers/gate_proj/"
  kernel, a, b = (ours.leaves[stem + n].read() for n in ("kernel", "lora_a", "lora_b"))
  wanted = kernel + 1.5 * np.einsum("lir,lro->lio", a, b)
  found = folded.leaves[stem + "kernel"]
  for _ in range(2):  # reading changes nothing
    np.testing.assert_allclose(found.read(), wanted, rtol=1e-6, atol=1e-6)
  index = (slice(1, 2), slice(2, 5), slice(0, 3))
  np.testing.assert_array_equal(found.read(index), found.read()[index])


def test_the_note_decides_what_names_cannot(tmp_path: Path) -> None:
  export.export(source("pooling_transformer", rank=0), "llava", tmp_path / "x")
  assert (
    formats.open_checkpoint(tmp_path / "x").config.model.projector.variant == "pooling_transformer"
  )
  (tmp_path / "x" / formats.NOTE).unlink()
  with pytest.raises(
    FormatError, match=r"variants cropping_transformer and pooling_transformer.*--variant"
  ):
    formats.open_checkpoint(tmp_path / "x")
  told = formats.open_checkpoint(tmp_path / "x", formats.Options(variant="cropping_transformer"))
  assert told.config.model.projector.variant == "cropping_transformer"


def test_scales_of_one_s_own_come_back(tmp_path: Path) -> None:
  projector = config_lib.ProjectorConfig(variant="pooling", scales=(3, 5), token_width=8)
  ours = source("pooling", rank=0, projector=projector)
  export.export(ours, "llava", tmp_path / "x")
  back = formats.open_checkpoint(tmp_path / "x")
  assert back.config.model.projector == projector
  assert_same(ours, back)
  note = tmp_path / "x" / formats.NOTE
  said = json.loads(note.read_text())
  former = {"row" if key == "variant" else key: value for key, value in said.items()}
  note.write_text(json.dumps(former))
  assert formats.open_checkpoint(tmp_path / "x").config.model.projector == projector
  note.write_text(json.dumps({**former, "row": "pool"}))
  with pytest.raises(config_lib.ConfigError, match=r"llava_sp.json: variant: unknown 'pool'"):
    formats.open_checkpoint(tmp_path / "x")
  for changed, message in (
    ({"variant": "pool"}, "llava_sp.json: variant: unknown 'pool'"),
    ({"template": "v2"}, "llava_sp.json: template: unknown 'v2'"),
    ({"scales": [3, 6]}, "of no known variant"),
  ):
    note.write_text(json.dumps({**said, **changed}))
    with pytest.raises((FormatError, config_lib.ConfigError), match=message):
      formats.open_checkpoint(tmp_path / "x")


def test_another_base_than_the_trained_one_is_refused(tmp_path: Path) -> None:
  ours = source("pooling")
  ours = dataclasses.replace(ours, fingerprint=opening.base_fingerprint(ours))
  export.export(ours, "llava_lora", tmp_path / "lora")
  opening.verify_base(formats.open_checkpoint(tmp_path / "lora"))
  other = source("pooling", rank=0)
  other.leaves["language_model/final_norm/scale"].read()[0] += 1
  export.export(other, "language_model", tmp_path / "other")
  given = formats.open_checkpoint(tmp_path / "lora", formats.Options(base=str(tmp_path / "other")))
  with pytest.raises(
    FormatError, match=r"was trained on a base with fingerprint \w+, but base and"
  ):
    opening.verify_base(given)


def test_exports_that_cannot_be_are_refused(tmp_path: Path) -> None:
  plain = source("pooling", rank=0)
  for name, message in (("llava_lora", "has no adapters"), ("llava_hf", "no spatial tokens")):
    with pytest.raises(FormatError, match=message):
      export.export(plain, name, tmp_path / "x")
  with pytest.raises(
    config_lib.ConfigError, match=r"--format: unknown 'onnx'; known: .*language_model"
  ):
    export.export(plain, "onnx", tmp_path / "x")
  only = dataclasses.replace(plain, leaves=plain.part("language_model"))
  with pytest.raises(
    FormatError, match="needs vision_tower, projector, which this checkpoint lack"
  ):
    export.export(only, "llava", tmp_path / "x")
  qwen = dataclasses.replace(TEXT, attention_bias=True)
  with pytest.raises(FormatError, match="no LLaVA on qwen2"):
    export.export(source("pooling", rank=0, language_model=qwen), "llava", tmp_path / "x")
  assert not (tmp_path / "x").exists()
  export.export(plain, "language_model", tmp_path / "y")
  with pytest.raises(FolderError, match=r"y: exists and holds .*; name a new folder"):
    export.export(plain, "language_model", tmp_path / "y")


def test_dtype_rounds_every_leaf(tmp_path: Path) -> None:
  export.export(source("pooling"), "llava", tmp_path / "x", "bfloat16")
  back = formats.open_checkpoint(tmp_path / "x")
  assert {str(leaf.dtype) for p, leaf in back.leaves.items() if "vision" not in p} == {"bfloat16"}
  assert json.loads((tmp_path / "x/config.json").read_text())["torch_dtype"] == "bfloat16"
