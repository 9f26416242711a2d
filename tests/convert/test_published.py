"""Settings as published folders have them: every key has a place, and sizes are the right ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import adapters, key_tables, keys, processors, settings

VICUNA: dict[str, Any] = {
  "_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
  "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
  "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
  "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAVA: dict[str, Any] = {
  **VICUNA, "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
  "model_type": "llava", "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
  "image_aspect_ratio": "pad", "max_length": 4096, "mm_hidden_size": 1024,
  "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
  "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
  "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
  "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
  "unfreeze_mm_vision_tower": False, "use_mm_proj": True, "image_grid_pinpoints": None,
}  # fmt: skip
GENERATION_OF_4 = {
  "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
  "bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
  "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
  "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2,
  "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
  "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
  "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
  "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
  "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
  "output_scores": False, "pad_token_id": 1, "prefix": None, "problem_type": None,
  "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
  "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
  "task_specific_params": None, "temperature": 1.0, "tie_encoder_decoder": False,
  "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
  "torch_dtype": None, "torchscript": False, "transformers_version": "4.21.3",
  "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
CLIP_336: dict[str, Any] = {
  "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
  "model_type": "clip", "projection_dim": 768, "torch_dtype": "float32", "_commit_hash": None,
  "transformers_version": None, "text_config": {"hidden_size": 768}, "text_config_dict": {},
  "vision_config_dict": {"hidden_size": 1024},
  "vision_config": {
    **GENERATION_OF_4, "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu",
    "hidden_size": 1024, "image_size": 336, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 4096, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14,
    "projection_dim": 768,
  },
}  # fmt: skip
CLIP_PIXELS = {
  "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
  "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 336,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
SIGLIP_2: dict[str, Any] = {
  "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
  "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model", "vocab_size": 256000},
  "torch_dtype": "float32", "transformers_version": "4.49.0.dev0",
  "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                    "model_type": "siglip_vision_model", "num_attention_heads": 16,
                    "num_hidden_layers": 27, "patch_size": 14},
}  # fmt: skip
SIGLIP_2_PIXELS = {
  "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
  "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor",
  "image_std": [0.5, 0.5, 0.5], "processor_class": "SiglipProcessor", "resample": 2,
  "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384},
}  # fmt: skip
LLAVA_HF: dict[str, Any] = {
  "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
  "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
  "projector_hidden_act": "gelu", "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
  "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                  "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
                  "torch_dtype": "float16", "vocab_size": 32064},
  "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                    "model_type": "clip_vision_model", "num_attention_heads": 16,
                    "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                    "vocab_size": 32000},
  "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
ADAPTER = {
  "auto_mapping": None, "base_model_name_or_path": "vicuna-7b-v1.5", "bias": "none",
  "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
  "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 256, "lora_dropout": 0.05,
  "modules_to_save": None, "peft_type": "LORA", "r": 128, "revision": None,
  "target_modules": ["k_proj", "v_proj", "gate_proj", "q_proj", "o_proj", "down_proj", "up_proj"],
  "task_type": "CAUSAL_LM",
}  # fmt: skip
TOKENIZER = {
  "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
  "bos_token": {"__type": "AddedToken", "content": "<s>"}, "legacy": False, "pad_token": None,
  "eos_token": {"__type": "AddedToken", "content": "</s>"}, "model_max_length": 4096,
  "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
  "unk_token": {"__type": "AddedToken", "content": "<unk>"},
}  # fmt: skip


def folder_with(path: Path, **files: Any) -> Path:
  for name, values in files.items():
    (path / f"{name}.json").write_text(json.dumps(values))
  return path


def test_vicuna_and_llava() -> None:
  default = config_lib.LanguageModelConfig()  # a LLaMA-2 of 7B
  assert settings.language_model(VICUNA, "x") == default
  assert settings.language_model(LLAVA, "x") == default
  assert settings.llava(LLAVA, "x")["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
  assert settings.select_layer(settings.llava(LLAVA, "x"), "x") == -2
  keys.read(TOKENIZER, key_tables.TOKENIZER, "tokenizer")


def test_clip(tmp_path: Path) -> None:
  tower = settings.tower(CLIP_336, "x", -2)
  assert tower == config_lib.TowerConfig()  # ViT-L/14 at 336
  folder = folder_with(tmp_path, preprocessor_config=CLIP_PIXELS)
  found = config_lib.DataConfig(**processors.images(LLAVA, folder, folder, tower))
  assert found == config_lib.DataConfig()


def test_siglip_2_of_fixed_size(tmp_path: Path) -> None:
  tower = settings.tower(SIGLIP_2, "x", -2)
  assert (tower.variant, tower.image_size, tower.width, tower.layers) == ("siglip", 384, 1152, 27)
  folder = folder_with(tmp_path, preprocessor_config=SIGLIP_2_PIXELS)
  found = processors.images(SIGLIP_2, folder, folder, tower)
  assert (found["image_fit"], found["image_resample"]) == ("stretch", "bilinear")


def test_llava_hf(tmp_path: Path) -> None:
  """Its embedding is padded beyond its tokenizer of 32,002 ids."""
  text = settings.language_model(LLAVA_HF["text_config"], "x")
  assert (text.vocab_size, text.width, text.layers) == (32064, 4096, 32)
  tower = settings.tower(LLAVA_HF, "x", settings.select_layer(settings.llava(LLAVA_HF, "x"), "x"))
  assert tower == config_lib.TowerConfig()
  folder = folder_with(
    tmp_path, preprocessor_config={**CLIP_PIXELS, "size": {"shortest_edge": 336}}
  )
  assert processors.images(LLAVA_HF, folder, folder, tower)["image_aspect"] == "square"


def test_the_original_s_adapter(tmp_path: Path) -> None:
  found = adapters.recipe(folder_with(tmp_path, adapter_config=ADAPTER))
  assert found is not None
  assert found.lora == config_lib.LoraConfig(rank=128, alpha=256.0, dropout=0.05)
