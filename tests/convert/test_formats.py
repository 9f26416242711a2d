"""Formats are told apart by their files; what does not fit is refused with all problems at once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llava_sp_jax.checkpoints import own_folders, writing
from llava_sp_jax.config import ConfigError
from llava_sp_jax.convert import formats, settings
from llava_sp_jax.convert.formats import Options, open_checkpoint
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.folders import MARK, FolderError
from tests.conftest import ConfigMaker

GOLDEN = Path(__file__).parents[1] / "golden"

FOUND = (  # folder, format, variant of the projector
  ("base-llm", "language_model", "none"),
  ("clip-vit-tiny", "vision_tower", "none"),
  ("clip-vit-tiny-224", "vision_tower", "none"),
  ("siglip-tiny-27", "vision_tower", "none"),
  ("cropping/llava-lora", "llava_lora", "cropping"),
  ("cropping/stage1", "stage1", "cropping"),
  ("pooling/llava-lora", "llava_lora", "pooling"),
  ("baseline/llava-lora", "llava_lora", "none"),
  ("conv224/llava-lora", "llava_lora", "crop_224"),
  ("siglip27/llava-lora", "llava_lora", "cropping"),
)


@pytest.mark.parametrize(("folder", "name", "variant"), FOUND)
def test_format_and_variant_are_found(folder: str, name: str, variant: str) -> None:
  source = open_checkpoint(GOLDEN / folder)
  assert (source.format, source.config.model.projector.variant) == (name, variant)


def test_settings_of_the_files_are_in_our_config() -> None:
  data = open_checkpoint(GOLDEN / "anyres/llava-lora").config.data
  assert (data.image_aspect, data.patch_merge) == ("anyres", "spatial_unpad")
  assert data.grid_pinpoints[0] == (336, 672)
  siglip = open_checkpoint(GOLDEN / "siglip27/llava-lora").config
  assert (siglip.data.image_fit, siglip.data.image_mean) == ("stretch", (0.5, 0.5, 0.5))
  assert siglip.model.projector.scales == (4, 8, 12, 16, 20, 24)  # of a 27 grid


def test_an_unknown_folder_lists_the_known_formats(tmp_path: Path) -> None:
  with pytest.raises(
    FormatError, match=r"unknown format \(no config.json with a model_type\)"
  ) as e:
    open_checkpoint(tmp_path)
  assert all(name in str(e.value) for name in formats.FORMATS)
  with pytest.raises(FormatError, match="nowhere: no such folder or file"):
    open_checkpoint(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
  with pytest.raises(FormatError, match=r"unknown format \(gpt2\)"):
    open_checkpoint(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A copy of the cropping case that a test may damage, with what it needs."""
  for name in ("base-llm", "clip-vit-tiny", "cropping/llava-lora"):
    shutil.copytree(GOLDEN / name, tmp_path / name)
  return tmp_path


def change_json(path: Path, **values: Any) -> None:
  path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path: Path, change: Any) -> None:
  """Changes the tensors of a safetensors file."""
  tensors = dict(safetensors.numpy.load_file(path))
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def test_all_that_is_wrong_is_listed_at_once(folder: Path) -> None:
  def damage(tensors: dict[str, np.ndarray]) -> None:
    layer = "base_model.model.model.layers."
    del tensors[f"{layer}1.mlp.up_proj.lora_A.weight"]
    tensors[f"{layer}0.mlp.odd_proj.lora_A.weight"] = np.zeros((4, 4), np.float32)
    for i in range(2):
      name = f"{layer}{i}.self_attn.q_proj.lora_B.weight"
      tensors[name] = np.zeros((7, 4), np.float32)

  rewrite(folder / "cropping/llava-lora/adapter_model.safetensors", damage)
  with pytest.raises(FormatError) as error:
    open_checkpoint(folder / "cropping/llava-lora")
  lines = str(error.value).splitlines()
  assert lines[0].endswith("does not fit the model, nothing was converted:")
  for part in (
    "unexpected tensor base_model.model.model.layers.0.mlp.odd_proj",
    "up_proj/lora_a: expected shape (2, 48, 4), found (1, 48, 4)",
    "q_proj/lora_b: expected shape (2, 4, 48), found (2, 4, 7)",
  ):
    assert any(part in line for line in lines), part


def test_an_adapter_whose_rank_disagrees_with_its_config(folder: Path) -> None:
  change_json(folder / "cropping/llava-lora/adapter_config.json", r=8)
  with pytest.raises(FormatError, match=r"lora_a: expected shape \(2, 48, 8\), found \(2, 48, 4\)"):
    open_checkpoint(folder / "cropping/llava-lora")


@pytest.mark.parametrize(
  ("key", "value"), [("use_dora", True), ("lora_bias", True), ("rank_pattern", {"q_proj": 2})]
)
def test_recipes_of_peft_that_are_not_computed(folder: Path, key: str, value: Any) -> None:
  change_json(folder / "cropping/llava-lora/adapter_config.json", **{key: value})
  with pytest.raises(FormatError, match=rf"adapter_config.json: not supported: {key}="):
    open_checkpoint(folder / "cropping/llava-lora")


@pytest.mark.parametrize(
  ("key", "value"), [("mm_use_im_start_end", True), ("mm_projector_type", "linear")]
)
def test_models_of_llava_that_are_not_computed(folder: Path, key: str, value: Any) -> None:
  change_json(folder / "cropping/llava-lora/config.json", **{key: value})
  with pytest.raises(FormatError, match=rf"config.json: not supported: {key}="):
    open_checkpoint(folder / "cropping/llava-lora")


def test_another_base_is_refused_by_its_sizes(folder: Path) -> None:
  change_json(folder / "base-llm/config.json", num_hidden_layers=3, rope_theta=5e5)
  with pytest.raises(FormatError, match="is not the base of") as error:
    open_checkpoint(folder / "cropping/llava-lora")
  assert "language_model.layers: 3 here, 2 there" in str(error.value)
  assert "language_model.rope_theta: 500000.0 here, 10000.0 there" in str(error.value)


def test_another_tower_is_refused_by_its_grid(folder: Path) -> None:
  shutil.copytree(GOLDEN / "clip-vit-tiny-224", folder / "small")
  with pytest.raises(FormatError, match="projector is incomplete or of no known variant"):
    open_checkpoint(folder / "cropping/llava-lora", Options(tower=str(folder / "small")))


def test_what_it_was_trained_on_must_be_there(folder: Path) -> None:
  shutil.rmtree(folder / "base-llm")
  with pytest.raises(FormatError, match=r"base-llm: no such folder, but .* needs it; .* --base"):
    open_checkpoint(folder / "cropping/llava-lora")


def test_hub_names_are_fetched_or_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  import huggingface_hub

  asked = []

  def fetch(name: str, **options: Any) -> str:
    asked.append(name)
    if name == "org/gone":
      raise OSError("offline")
    return str(GOLDEN / "base-llm")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  found = open_checkpoint(folder / "cropping/llava-lora", Options(base="org/base"))
  assert found.parts == formats.PARTS
  with pytest.raises(
    FormatError, match=r"org/gone: .* not fetched from the hub \(offline\).*--base"
  ):
    open_checkpoint(folder / "cropping/llava-lora", Options(base="org/gone"))
  assert asked == ["org/base", "org/gone"]


def test_an_incomplete_stage_1_file_names_what_it_lacks() -> None:
  """The original's intermediate checkpoints keep some of the spatial tensors only."""
  with pytest.raises(FormatError, match="nearest is 'cropping'") as error:
    open_checkpoint(
      GOLDEN / "cropping/stage1/checkpoint-7",
      Options(base=str(GOLDEN / "base-llm"), tower=str(GOLDEN / "clip-vit-tiny")),
    )
  assert "missing model.conv_24.weight" in str(error.value)
  assert "missing model.query_projector.1.weight" in str(error.value)


def test_a_row_that_does_not_exist_or_does_not_fit(folder: Path) -> None:
  with pytest.raises(ConfigError, match=r"--variant: unknown 'crop'; known: .*cropping"):
    open_checkpoint(folder / "cropping/llava-lora", Options(variant="crop"))
  with pytest.raises(FormatError, match="nearest is 'pooling'"):
    open_checkpoint(folder / "cropping/llava-lora", Options(variant="pooling"))


@pytest.mark.parametrize(
  "names",
  [
    # It saves adapted projections of its transformer under names that its own loader drops.
    [f"tfm_4.encoder.layers.0.linear2.{part}" for part in ("base_layer", "lora_A", "lora_B")],
    # Its statistics are not among what it saves.
    ["conv_block.0"],
  ],
)
def test_variants_that_the_original_cannot_restore_are_refused(
  folder: Path, names: list[str]
) -> None:
  def add(tensors: dict[str, np.ndarray]) -> None:
    for name in names:
      tensors[f"base_model.model.model.{name}.weight"] = np.zeros((4, 4), np.float32)

  rewrite(folder / "cropping/llava-lora/adapter_model.safetensors", add)
  with pytest.raises(FormatError) as error:
    open_checkpoint(folder / "cropping/llava-lora")
  module = re.escape(names[0].removesuffix(".base_layer"))
  assert re.search(rf"(unexpected tensor|that fit no weight) .*{module}", str(error.value))


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"hidden_act": "gelu"}, "not supported: hidden_act='gelu'"),
    ({"mlp_bias": True}, "not supported: mlp_bias=True"),
    ({"attention_bias": True}, "not supported: attention_bias=True"),
    ({"model_type": "phi3"}, "model_type 'phi3' is no LLaMA-family decoder"),
  ],
)
def test_decoders_that_are_not_computed(values: dict[str, Any], message: str) -> None:
  sizes = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "model_type": "llama",
  }
  assert settings.language_model(sizes, "x").head_dim == 4
  with pytest.raises(FormatError, match=message):
    settings.language_model({**sizes, **values}, "x")


def test_nan_weights_stop_the_conversion_and_leave_no_checkpoint(
  folder: Path, tmp_path: Path
) -> None:
  def damage(tensors: dict[str, np.ndarray]) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)

  rewrite(folder / "cropping/llava-lora/adapter_model.safetensors", damage)
  source = open_checkpoint(folder / "cropping/llava-lora")
  with pytest.raises(FormatError, match=r"adapter_model.safetensors: .*lora_B.weight: 384 of 384"):
    writing.write(source, tmp_path / "out")
  assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_an_interrupted_conversion_is_done_anew(folder: Path, tmp_path: Path) -> None:
  source = open_checkpoint(folder / "cropping/llava-lora")
  out = tmp_path / "out"
  (out / "checkpoints/0.orbax-checkpoint-tmp").mkdir(parents=True)
  (out / "config.json").write_text("{}")
  (out / MARK).write_text('{"command": "convert"}')
  writing.write(source, out)
  assert own_folders.open_own(out).leaves.keys() == source.leaves.keys()
  with pytest.raises(FolderError, match=r"out: exists and holds .*; name a new folder"):
    writing.write(source, out)


def test_a_run_is_opened_from_any_working_folder(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Its config names what it started from as it was seen from where training ran."""
  run, start = tmp_path / "runs" / "finetune", tmp_path / "runs" / "pretrain"
  start.mkdir(parents=True)
  config = tiny_config(init={"checkpoint": "runs/pretrain", "vision_tower": "gone/clip"})
  monkeypatch.chdir(tmp_path)
  assert own_folders.located(config, run) == config
  monkeypatch.chdir("/")
  found = own_folders.located(config, run).init
  assert (found.checkpoint, found.vision_tower) == (str(start), "gone/clip")
