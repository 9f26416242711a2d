"""Folders that transformers and PEFT save today open here and compute what they compute there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import opening
from llava_sp_jax.convert import export, folding, formats
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import anyres
from llava_sp_jax.models import build
from tests.convert.foreign import (
  IMAGE,
  PATCHES,
  PIXELS,
  SIZE,
  TEXT,
  VISION,
  asked,
  decoder,
  loaded,
  randomized,
  same_logits,
  same_text_logits,
)
from tests.convert.test_exports_in_torch import close, run
from tests.convert.test_formats import GOLDEN, change_json
from tests.convert.test_round_trip import source

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LLAMA = {"model_type": "llava_llama", **TEXT}


# ---- adapters on a part of the modules and layers ---------------------------------------------------


RECIPES: dict[str, dict[str, Any]] = {
  "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
  "queries and values": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
  "one layer": {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1]},
  "a pattern": {"target_modules": r".*layers\.0\.mlp\.down_proj"},
  "and an embedding": {
    "target_modules": ["o_proj"],
    "modules_to_save": ["embed_tokens", "lm_head"],
  },
}


@pytest.mark.parametrize("name", RECIPES)
def test_modules_without_an_adapter_have_none(llm: Path, tmp_path: Path, name: str) -> None:
  recipe = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **RECIPES[name])
  adapted = randomized(peft.get_peft_model(decoder(llm), recipe))
  adapted.save_pretrained(tmp_path / "adapter")
  # PEFT's own reading is the reference: what it does not save is the base's.
  theirs = peft.PeftModel.from_pretrained(decoder(llm), tmp_path / "adapter").eval()
  opened = formats.open_checkpoint(tmp_path / "adapter", formats.Options(base=str(llm)))
  same_text_logits(opened, theirs)


def adapter(llm: Path, folder: Path, **changes: Any) -> Path:
  recipe = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"])
  peft.get_peft_model(decoder(llm), recipe).save_pretrained(folder)
  change_json(folder / "adapter_config.json", **changes)
  return folder


def test_an_adapter_of_a_decoder_alone_is_merged(llm: Path, tmp_path: Path) -> None:
  """Its logits are compared as those of a whole model are; a tower has nothing to merge."""
  folder, out = adapter(llm, tmp_path / "a"), tmp_path / "out"
  assert cli.main(["merge", str(folder), str(out), "--base", str(llm)]) == 0
  theirs = peft.PeftModel.from_pretrained(decoder(llm), folder).eval()
  same_text_logits(opening.open_any(out, formats.Options()), theirs)
  assert cli.main(["merge", str(GOLDEN / "clip-vit-tiny"), str(tmp_path / "no")]) == 1
  assert not (tmp_path / "no").exists()


def test_an_adapter_that_the_settings_promise_is_missed(llm: Path, tmp_path: Path) -> None:
  promised = adapter(llm, tmp_path / "a", target_modules=["q_proj", "v_proj", "up_proj"])
  with pytest.raises(
    FormatError, match=r"adapters are missing .*layers\.0\.mlp\.up_proj, .*1\.mlp"
  ):
    formats.open_checkpoint(promised, formats.Options(base=str(llm)))
  path = promised / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({k: v for k, v in tensors.items() if "lora" not in k}, path)
  with pytest.raises(FormatError, match="no adapters in it"):
    formats.open_checkpoint(promised, formats.Options(base=str(llm)))


@pytest.mark.parametrize(
  "changed",
  [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}, {"exclude_modules": ["v_proj"]}],
)
def test_an_adapter_that_the_settings_leave_out(
  llm: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
  """PEFT would open the folder and compute without it."""
  folder = adapter(llm, tmp_path / "a", target_modules=["q_proj", "v_proj"])
  change_json(folder / "adapter_config.json", **changed)
  with pytest.raises(FormatError, match=r"leaves out, so that PEFT .*layers\.1\.self_attn"):
    formats.open_checkpoint(folder, formats.Options(base=str(llm)))


def test_an_adapter_of_a_training_on_its_way_lacks_the_projector(llm: Path, tmp_path: Path) -> None:
  folder = adapter(llm, tmp_path / "checkpoint-500")
  (folder / "trainer_state.json").write_text("{}")
  formats.open_checkpoint(folder, formats.Options(base=str(llm)))  # a plain decoder's training
  (folder / "training_args.bin").write_bytes(b"..llava.train.train TrainingArguments")
  with pytest.raises(FormatError, match=r"without its projector.*is in no file of this folder"):
    formats.open_checkpoint(folder, formats.Options(base=str(llm)))
  (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "clip", **LLAMA}))
  with pytest.raises(FormatError, match=r"config.json says .* non_lora_trainables.bin, where"):
    formats.open_checkpoint(folder, formats.Options(base=str(llm)))
  (folder / "config.json").unlink()
  (folder / "global_step500").mkdir()
  with pytest.raises(FormatError, match=r"is in global_step500/ .*non_lora_trainables.bin"):
    formats.open_checkpoint(folder, formats.Options(base=str(llm)))


# ---- transformers' LLaVA ----------------------------------------------------------------------------


def test_llava_as_transformers_saves_it(llava: Path) -> None:
  names = safetensors.numpy.load_file(llava / "model.safetensors")
  assert "vision_tower.pre_layrnorm.weight" in names  # not under vision_model
  opened = formats.open_checkpoint(llava)
  assert opened.config.data.image_mean == (0.4, 0.5, 0.6)
  same_logits(opened, loaded(llava))


@pytest.mark.parametrize(
  "targets", [["q_proj", "v_proj", "linear_1"], r".*language_model.*up_proj"]
)
def test_an_adapter_trained_on_llava_hf(llava: Path, tmp_path: Path, targets: Any) -> None:
  """q_proj and v_proj are also the tower's: these go into its kernels."""
  recipe = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, target_modules=targets)
  adapted = peft.get_peft_model(loaded(llava), recipe).eval()
  adapted.save_pretrained(tmp_path / "adapter")
  opened = formats.open_checkpoint(tmp_path / "adapter", formats.Options(base=str(llava)))
  assert opened.parts == formats.PARTS
  assert opened.config.model.lora.rank == 2
  same_logits(opened, adapted)


def test_llava_next(tmp_path: Path) -> None:
  """Canvases are (height, width) there; its pictures are read as those of anyres."""
  from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

  grid = [[SIZE, 2 * SIZE], [3 * SIZE, SIZE]]
  config = LlavaNextConfig(
    vision_config={"model_type": "clip_vision_model", **VISION},
    text_config={"model_type": "llama", **TEXT},
    image_token_index=IMAGE,
    image_grid_pinpoints=grid,
  )
  theirs = randomized(LlavaNextForConditionalGeneration(config))
  theirs.save_pretrained(tmp_path)
  said = {
    **PIXELS,
    "image_processor_type": "LlavaNextImageProcessor",
    "do_pad": True,
    "image_grid_pinpoints": grid,
  }
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
  opened = formats.open_checkpoint(tmp_path)
  data, model = opened.config.data, opened.config.model
  assert data.grid_pinpoints == ((2 * SIZE, SIZE), (SIZE, 3 * SIZE))
  assert (data.image_aspect, data.patch_merge, model.image_newline) == (
    "anyres",
    "spatial_unpad",
    True,
  )
  reader = anyres.Reader(data, anyres.Tile(*build.tile_shape(model)))
  rng = np.random.default_rng(3)
  picture = reader(Image.fromarray(rng.integers(0, 256, (34, 70, 3), dtype=np.uint8)))
  count = len(picture.plan.slots)
  ids, _ = asked(count)
  slots = np.full(ids.shape, -1)
  newline = len(picture.tiles) * PATCHES
  slots[ids == IMAGE] = np.where(picture.plan.slots < 0, newline, picture.plan.slots)
  tiles = torch.tensor(picture.tiles.transpose(0, 3, 1, 2)[None])
  with torch.no_grad():
    found = theirs(
      input_ids=torch.tensor(ids), pixel_values=tiles, image_sizes=torch.tensor([[34, 70]])
    ).logits[0]
  close(run(opened, np.where(ids == IMAGE, 0, ids), picture.tiles[None], slots), found)


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision", "Siglip"])
def test_towers_as_transformers_saves_them(tmp_path: Path, kind: str) -> None:
  """Their last hidden state but one, through the tower alone; SigLIP 2 is bilinear."""
  import transformers

  values: Any = VISION
  if kind == "Siglip":
    small = {
      "hidden_size": 16,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "intermediate_size": 24,
      "vocab_size": 32,
    }
    values = {"vision_config": VISION, "text_config": small}
  theirs = randomized(
    getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**values))
  )
  theirs.save_pretrained(tmp_path)
  if kind == "Siglip":
    said = {
      "image_processor_type": "SiglipImageProcessor",
      "resample": 2,
      "do_convert_rgb": None,
      "size": {"height": SIZE, "width": SIZE},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
  opened = formats.open_checkpoint(tmp_path)
  assert opened.config.data.image_resample == ("bilinear" if kind == "Siglip" else "bicubic")
  pixels = np.random.default_rng(2).normal(size=(1, SIZE, SIZE, 3)).astype(np.float32)
  inner = getattr(theirs, "vision_model", theirs)
  with torch.no_grad():
    states = inner(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
  wanted = states.hidden_states[-2][0]
  if kind == "CLIPVision":
    wanted = wanted[1:]
  whole = completed_tower(opened)
  close(whole(pixels)[0].reshape(-1, VISION["hidden_size"]), wanted)


def completed_tower(opened: Loaded) -> Any:
  from flax.traverse_util import unflatten_dict

  tree = unflatten_dict({p.split("/", 1)[1]: x.read() for p, x in opened.leaves.items()}, sep="/")
  module = build.model(opened.config.model).vision_tower
  return lambda pixels: np.asarray(module.apply({"params": tree}, pixels))


# ---- what is no whole model -------------------------------------------------------------------------


def test_quantized_weights_are_one_line(llm: Path, tmp_path: Path) -> None:
  tensors = safetensors.numpy.load_file(llm / "model.safetensors")
  name = "model.layers.0.mlp.up_proj.weight"
  tensors[f"{name}.absmax"] = np.zeros(3, np.float32)
  tensors[f"{name}.quant_map"] = np.zeros(16, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text((llm / "config.json").read_text())
  with pytest.raises(FormatError, match=r"quantized weights .*absmax and 1 more") as error:
    formats.open_checkpoint(tmp_path)
  assert "\n" not in str(error.value)


def test_what_zero_3_saved_in_parts_is_named(tmp_path: Path) -> None:
  export.export(source("none"), "llava_lora", tmp_path / "x")
  path = tmp_path / "x/adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  first = sorted(tensors)[0]
  tensors[first] = np.zeros((0,), np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(FormatError, match=r"1 tensors have no values \(shape \[0\].*ZeRO-3"):
    formats.open_checkpoint(tmp_path / "x")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
  ours = source("none", rank=0)
  ours.leaves["projector/fc1/kernel"].read()[3, 2] = 7e4
  with pytest.raises(FormatError, match="fc1/kernel: 70000 is too large for float16"):
    export.export(ours, "llava", tmp_path / "x", dtype="float16")
  assert not (tmp_path / "x").exists()


def test_an_adapter_that_overflows_is_not_folded(tmp_path: Path) -> None:
  ours = source("none", lora=config_lib.LoraConfig(rank=2, alpha=1e6))
  ours.leaves["language_model/layers/q_proj/lora_a"].read()[...] *= np.float32(1e34)
  with pytest.raises(FormatError, match="q_proj/kernel: its adapter at scale 500000 is too large"):
    folding.fold(ours).leaves["language_model/layers/q_proj/kernel"].read()


def test_files_have_the_mode_of_files(tmp_path: Path) -> None:
  export.export(source("none", rank=0), "language_model", tmp_path / "x")
  (tmp_path / "plain").write_text("")
  wanted = (tmp_path / "plain").stat().st_mode
  assert {p.stat().st_mode for p in (tmp_path / "x").iterdir()} == {wanted}
