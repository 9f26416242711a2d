"""Every key of a foreign settings file has a place; types and ranges hold; errors are one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.convert import adapters, key_tables, keys, keys_page, places, processors, settings
from llava_sp_jax.convert.torch_io import FormatError
from tests.conftest import REPOSITORY
from tests.convert.settings_files import one_line, write
from tests.convert.test_processor_keys import CLIP
from tests.convert.test_settings import SIZES

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = {"model_type": "llama", **SIZES}
PLAIN_LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}


@pytest.mark.parametrize("name", keys_page.FILES)
def test_every_row_says_what_becomes_of_its_key(name: str) -> None:
  for key, row in keys_page.FILES[name].items():
    assert row.place in (keys.HONORED, keys.IDLE, keys.REFUSED), key
    assert row.why, key
    assert (row.values is not None) == (row.place == keys.REFUSED), key
    assert keys.problem(key, None, row) == "" or row.place == keys.HONORED or not row.null, key


def test_the_page_says_what_the_tables_say() -> None:
  """`python -m llava_sp_jax.convert.keys_page > docs/foreign_settings.md` makes it anew."""
  assert (REPOSITORY / "docs/foreign_settings.md").read_text() == keys_page.page()


def test_keys_that_transformers_writes_all_have_a_place() -> None:
  """Its config classes as they are today, with every default written out."""
  from transformers import CONFIG_MAPPING, GenerationConfig

  tables = {
    "llama": key_tables.DECODERS["llama"],
    "mistral": key_tables.DECODERS["mistral"],
    "qwen2": key_tables.DECODERS["qwen2"],
    "clip_vision_model": key_tables.TOWERS["clip"],
    "siglip_vision_model": key_tables.TOWERS["siglip"],
    "clip": key_tables.WHOLE_TOWER,
    "siglip": key_tables.WHOLE_TOWER,
    "llava": key_tables.LLAVA_HF,
    "llava_next": key_tables.LLAVA_HF,
  }
  for kind, table in tables.items():
    values = CONFIG_MAPPING[kind]().to_dict()
    keys.read({k: v for k, v in values.items() if v is not None}, table, kind)
  keys.read(GenerationConfig().to_dict(), key_tables.GENERATION, "generation")


def test_keys_that_peft_writes_all_have_a_place(tmp_path: Path) -> None:
  peft = pytest.importorskip("peft")
  peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(tmp_path)
  found = adapters.recipe(tmp_path)
  assert found is not None
  assert (found.lora.rank, found.lora.alpha) == (3, 6.0)


def test_a_key_without_a_place_is_refused_by_name_unless_told() -> None:
  with pytest.raises(FormatError, match="unknown key logits_scaling, mup") as error:
    settings.language_model({**LLAMA, "logits_scaling": 8.0, "mup": True}, "x")
  assert "--allow-unknown" in one_line(error)
  odd = settings.language_model({**LLAMA, "logits_scaling": 8.0}, "x", allow_unknown=True)
  assert odd == settings.language_model(LLAMA, "x")


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"hidden_size": "wide"}, "hidden_size: expected a whole number from 1"),
    ({"hidden_size": 24.0}, "hidden_size: expected a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number"),
    ({"vocab_size": -1}, "vocab_size: expected a whole number from 1"),
    ({"vocab_size": 10**30}, "vocab_size: expected a whole number from 1"),
    ({"intermediate_size": [40]}, "intermediate_size: expected a whole number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps: expected a number from 0"),
    ({"rope_theta": math.inf}, "rope_theta: expected a number from"),
    ({"rope_scaling": 2.0}, "rope_scaling: expected a group of keys, or null"),
    ({"rope_scaling": {"type": "linear"}}, "transformers refuses these settings: .*factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: expected a number from 1"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0]}},
     "longrope is not computed"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale=1.0"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope_section="),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": None}}, "'dynamic' without a factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}, "truncate=None"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * LLAMA["num_hidden_layers"]},
     "layer_types names windows, but no sliding_window is used"),
    ({"quantization_config": {"load_in_4bit": True}}, "give the folder that they were made from"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
    ({"model_type": ["llama"]}, r"model_type \['llama'\] is no LLaMA-family decoder"),
  ],
)  # fmt: skip
def test_a_decoder_s_values_are_checked(changed: dict[str, Any], message: str) -> None:
  with pytest.raises(FormatError, match=message) as error:
    settings.language_model({**LLAMA, **changed}, "config.json")
  assert one_line(error).startswith("config.json")


def test_all_that_is_wrong_in_a_file_is_told_at_once() -> None:
  with pytest.raises(FormatError, match=r"vocab_size.*hidden_act.*unknown key zz"):
    settings.language_model({**LLAMA, "vocab_size": 0, "hidden_act": "gelu", "zz": 1}, "x")


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
    ({"num_channels": 1}, "num_channels=1"),
    ({"image_size": {"height": 28, "width": 28}}, "image_size: expected a whole number"),
    ({"model_type": "siglip2_vision_model"}, "SigLIP 2 of variable resolution"),
    ({"model_type": "dinov2"}, "unknown vision tower 'dinov2'"),
    ({"num_hidden_layers": 1}, "layer -3 is selected of a tower with 1 layers"),
    ({"num_hidden_layers": 2}, "layer -3 is selected of a tower with 2 layers"),
    ({"window_size": 7}, "unknown key window_size"),
  ],
)
def test_a_tower_s_values_are_checked(changed: dict[str, Any], message: str) -> None:
  assert settings.tower(CLIP, "x", -3).layers == 3
  with pytest.raises(FormatError, match=message) as error:
    settings.tower({**CLIP, **changed}, "x", -3)
  one_line(error)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"init_lora_weights": "pissa"}, "not supported: init_lora_weights='pissa'"),
    ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights when PEFT loads it"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    ({"lora_alpha": math.nan}, "NaN is no number of JSON"),
    ({"lora_alpha": "16"}, "lora_alpha: expected a number"),
    ({"r": 0}, "r: expected a whole number from 1"),
    ({"r": 4.5}, "r: expected a whole number"),
    ({"lora_dropout": 2}, "lora_dropout: expected a number from 0 to 1"),
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "all"}, "bias='all'"),
    ({"alpha_pattern": {"q_proj": 16}}, "alpha_pattern="),
    ({"layer_replication": [[0, 1]]}, "layer_replication="),
    ({"trainable_token_indices": [5]}, "trainable_token_indices="),
    ({"target_parameters": ["experts"]}, "target_parameters="),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
    ({"use_hydra": True}, "unknown key use_hydra"),
  ],
)
def test_an_adapter_s_values_are_checked(
  tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
  with pytest.raises(FormatError, match=message) as error:
    adapters.recipe(write(tmp_path, "adapter_config.json", {**PLAIN_LORA, **changed}))
  one_line(error)


def test_rs_lora_is_honored(tmp_path: Path) -> None:
  said = {**PLAIN_LORA, "use_rslora": True, "init_lora_weights": "gaussian"}
  found = adapters.recipe(write(tmp_path, "adapter_config.json", said))
  assert found is not None
  assert found.lora.alpha / found.lora.rank == pytest.approx(8 / 2)


def test_settings_of_an_adapter_that_lacks_its_rank(tmp_path: Path) -> None:
  with pytest.raises(FormatError, match="r and lora_alpha missing"):
    adapters.recipe(write(tmp_path, "adapter_config.json", {"peft_type": "LORA"}))


LLAVA = json.loads((GOLDEN / "pooling/llava-lora/config.json").read_text())


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio: expected one of pad, square"),
    ({"mm_patch_merge_type": "spatial_pool"}, "mm_patch_merge_type: expected one of flat"),
    ({"tokenizer_model_max_length": None}, "tokenizer_model_max_length: expected a whole number"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch' with clip"),
    ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu'"),
    ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token=True"),
    ({"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver'"),
    ({"s2": True}, "s2=True"),
    ({"mm_hidden_size": 33}, "mm_hidden_size is 33, but the tower is 32 wide"),
    ({"image_grid_pinpoints": [[336, -672]]}, "image_grid_pinpoints: expected"),
    *(
      ({"image_grid_pinpoints": text}, r"no list of \(width, height\)")
      for text in ("[(336.5, 672)]", '[("336", 672)]', "[(336, -672)]", "[(336, 672, 3)]", "[336]")
    ),
    ({"mm_vision_tower": 7}, "mm_vision_tower: expected a text"),
    ({"mm_hd_transform_order": "sub_glb"}, "unknown key mm_hd_transform_order"),
  ],
)
def test_a_llava_s_values_are_checked(changed: dict[str, Any], message: str) -> None:
  folder = GOLDEN / "clip-vit-tiny"
  tower = settings.tower(settings.read_json(folder / "config.json"), "x", -2)
  assert processors.images(LLAVA, folder, folder, tower)["image_aspect"] == "pad"
  with pytest.raises(FormatError, match=message) as error:
    processors.images({**LLAVA, **changed}, folder, folder, tower)
  one_line(error)


def test_the_layer_that_is_read() -> None:
  assert settings.select_layer({}, "x") == -2
  assert settings.select_layer({"mm_vision_select_layer": -1}, "x") == -1
  assert settings.select_layer({"vision_feature_layer": [-3]}, "x") == -3
  for found in ([-2, -5], 0, [0]):
    with pytest.raises(FormatError, match=r"vision_feature_layer=.*: features behind one layer"):
      settings.select_layer({"vision_feature_layer": found}, "x")


@pytest.mark.parametrize(
  ("name", "choice"),
  [
    ("NousResearch/Nous-Hermes-2-Yi-34B", "chatml_direct"), ("01-ai/Yi-6B", "chatml_direct"),
    ("mistralai/Mistral-7B-Instruct-v0.2", "mistral_instruct"), ("mistral", "mistral_instruct"),
    ("Qwen/Qwen2-7B", "chatml_direct"), ("meta-llama/Llama-2-7b-chat-hf", "llava_llama_2"),
    ("meta-llama/Meta-Llama-3-8B-Instruct", ""), ("mosaicml/mpt-7b-chat", "mpt"),
    ("lmsys/vicuna-7b-v1.5", None), ("base-llm", None), ("llava_llama", None),
  ],
)  # fmt: skip
def test_names_that_speak_against_template_v1(name: str, choice: str | None) -> None:
  found = settings.other_template([name])
  assert found == (None if choice is None else (name, choice))


def test_settings_of_generation_and_tokenizer(tmp_path: Path) -> None:
  folder = write(tmp_path, "generation_config.json", {"temperature": 0.2, "eos_token_id": [1, 2]})
  write(tmp_path, "tokenizer_config.json", {"add_bos_token": True, "model_max_length": 1e30})
  places.check_settings((folder,), False)
  for i, (name, values, message) in enumerate(
    (
      ("generation_config.json", {"contrastive": 1}, "unknown key contrastive"),
      ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token=True"),
      ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs="),
      ("tokenizer_config.json", {"legacy": "no"}, "legacy: expected true or false"),
    )
  ):
    odd = write(tmp_path / str(i), name, values)
    with pytest.raises(FormatError, match=message):
      places.check_settings((odd,), False)
