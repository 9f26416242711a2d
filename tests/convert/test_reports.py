"""Checkpoints that public reports tell of, each made small: they open as their makers computed them.

The reports are named by repository and number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llava_sp_jax.convert import export, formats
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data.tokenizer import Tokenizer, TokenizerError
from tests.convert.foreign import (
  PIXELS,
  TEXT,
  TOKENS,
  VISION,
  completed,
  decoder,
  randomized,
  same_text_logits,
)
from tests.convert.test_exports_in_torch import close, run
from tests.convert.test_formats import GOLDEN, change_json
from tests.convert.test_round_trip import source

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
  pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
  pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def rewrite(path: Path, change: Any) -> None:
  """Replaces what a safetensors file holds."""
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def saved(adapted: Any, folder: Path) -> Path:
  randomized(adapted).save_pretrained(folder)
  return folder


# ---- embeddings and output layers -------------------------------------------------------------------


def test_an_output_layer_that_settings_tie_but_training_did_not(llm: Path, tmp_path: Path) -> None:
  """huggingface/peft#2777, huggingface/transformers#45127: two tensors, and a config that ties them."""
  folder = Path(shutil.copytree(llm, tmp_path / "merged"))
  change_json(folder / "config.json", tie_word_embeddings=True)
  opened = formats.open_checkpoint(folder)
  assert not opened.config.model.language_model.tie_embeddings
  same_text_logits(opened, decoder(folder))  # it does not tie them either


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
def test_one_tensor_of_a_tied_pair_is_enough(tied: Path, tmp_path: Path, kept: str) -> None:
  """huggingface/transformers#34759: under either name; #30202: both with the same values."""
  both = Path(shutil.copytree(tied, tmp_path / "both"))
  embedding = safetensors.numpy.load_file(tied / WEIGHTS)["model.embed_tokens.weight"]
  rewrite(both / WEIGHTS, lambda all_: {**all_, "lm_head.weight": embedding})
  one = Path(shutil.copytree(both, tmp_path / "one"))
  rewrite(
    one / WEIGHTS,
    lambda all_: {
      n: t for n, t in all_.items() if kept in n or n.split(".")[1] in ("layers", "norm")
    },
  )
  for folder in (both, one):
    opened = formats.open_checkpoint(folder)
    assert opened.config.model.language_model.tie_embeddings
    same_text_logits(opened, decoder(tied))


TOUCHED: dict[str, dict[str, Any]] = {
  "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
  "output saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
  "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
  "output adapted": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("base", ["llm", "tied"])
@pytest.mark.parametrize("name", TOUCHED)
def test_adapters_of_the_embedding_and_the_output_layer(
  base: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
  """huggingface/peft#2018, #2777: on a tied base PEFT trains a copy, the other one stays."""
  folder = request.getfixturevalue(base)
  recipe = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **TOUCHED[name])
  adapter = peft.get_peft_model(decoder(folder), recipe)
  for parameter in adapter.parameters():
    parameter.data += 0.1
  adapter.save_pretrained(tmp_path)
  theirs = peft.PeftModel.from_pretrained(decoder(folder), tmp_path).eval()
  opened = formats.open_checkpoint(tmp_path, formats.Options(base=str(folder)))
  assert not opened.config.model.language_model.tie_embeddings
  same_text_logits(opened, theirs)


def test_a_tied_base_whose_two_ends_were_trained_as_one(tied: Path, tmp_path: Path) -> None:
  recipe = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
  peft.get_peft_model(decoder(tied), recipe).save_pretrained(tmp_path)
  change_json(tmp_path / "adapter_config.json", ensure_weight_tying=True)
  with pytest.raises(FormatError, match="ensure_weight_tying=True on a base whose output layer"):
    formats.open_checkpoint(tmp_path, formats.Options(base=str(tied)))


def test_a_vocabulary_that_grew_with_the_adapter(llm: Path, tmp_path: Path) -> None:
  """huggingface/peft#1457, unslothai/unsloth#978: its embedding has more rows than the base's."""
  grown = decoder(llm)
  grown.resize_token_embeddings(TEXT["vocab_size"] + 3)
  recipe = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"], init_lora_weights=False)
  adapted = peft.get_peft_model(grown, recipe)
  for parameter in adapted.parameters():
    parameter.data += 0.1
  adapted.save_pretrained(tmp_path, save_embedding_layers=True)
  again = decoder(llm)
  again.resize_token_embeddings(TEXT["vocab_size"] + 3)
  theirs = peft.PeftModel.from_pretrained(again, tmp_path).eval()
  opened = formats.open_checkpoint(tmp_path, formats.Options(base=str(llm)))
  assert opened.config.model.language_model.vocab_size == TEXT["vocab_size"] + 3
  same_text_logits(opened, theirs, TOKENS + 3)


# ---- adapters in other places -----------------------------------------------------------------------


def test_an_adapter_trained_without_the_output_layer(llm: Path, tmp_path: Path) -> None:
  """huggingface/peft#1579: AutoModel's names have one `model.` less."""
  from transformers import AutoModel

  recipe = peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False
  )
  theirs = peft.get_peft_model(AutoModel.from_pretrained(llm, dtype=torch.float32), recipe).eval()
  theirs.save_pretrained(tmp_path)
  names = safetensors.numpy.load_file(tmp_path / ADAPTER)
  assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
  opened = formats.open_checkpoint(tmp_path, formats.Options(base=str(llm)))
  head = decoder(llm).lm_head
  with torch.no_grad():
    wanted = head(theirs(torch.tensor(TOKENS)).last_hidden_state)[0]
  close(run(completed(opened), TOKENS), wanted)


def test_adapters_of_a_llava_on_its_tower(tmp_path: Path) -> None:
  """haotian-liu/LLaVA#1647, YiyangZhou/POVID#13: the tower is in a folder of its own."""
  folder, rank = tmp_path / "lora", 2
  ours = source("none", rank=rank)
  export.export(ours, "llava_lora", folder)
  rng = np.random.default_rng(4)
  width = ours.config.model.tower.width
  a, b = rng.normal(size=(rank, width)), rng.normal(size=(width, rank))
  name = (
    "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0."
    "self_attn.v_proj.lora_{}.weight"
  )
  pair = {name.format("A"): a.astype(np.float32), name.format("B"): b.astype(np.float32)}
  rewrite(folder / ADAPTER, lambda all_: {**all_, **pair})
  given = formats.Options(select_layer=-1)
  opened = formats.open_checkpoint(folder, given)
  path = "vision_tower/layers/v_proj/kernel"
  wanted = ours.leaves[path].read().copy()
  lora = ours.config.model.lora
  wanted[0] += (lora.alpha / lora.rank * (b @ a).T).astype(np.float32)
  np.testing.assert_allclose(opened.leaves[path].read(), wanted, atol=1e-5)

  pair = {key.replace("v_proj", "w_proj"): value for key, value in pair.items()}
  rewrite(folder / ADAPTER, lambda all_: {**all_, **pair})
  with pytest.raises(FormatError, match=r"fit no weight of this model: vision_model.*w_proj$"):
    formats.open_checkpoint(folder, given)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_names_that_torch_puts_around_a_model(llm: Path, tmp_path: Path, wrapper: str) -> None:
  """pytorch/pytorch#101107, karpathy/nanoGPT#325: saved while it was compiled, or by DDP."""
  folder = Path(shutil.copytree(llm, tmp_path / "wrapped"))
  rewrite(folder / WEIGHTS, lambda all_: {wrapper + name: t for name, t in all_.items()})
  same_text_logits(formats.open_checkpoint(folder), decoder(llm))


# ---- towers, and files that are not what they seem --------------------------------------------------


def test_a_tower_of_variable_resolution_is_one_line(tmp_path: Path) -> None:
  """google/siglip2-..-naflex: any number of patches; as a whole, its vision part, and a LLaVA's."""
  from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

  small = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
  }
  vision = {**small, "num_patches": 16, "patch_size": 4}
  whole = Siglip2Config(vision_config=vision, text_config={**small, "vocab_size": 32})
  Siglip2Model(whole).save_pretrained(tmp_path / "whole")
  Siglip2VisionModel(Siglip2VisionConfig(**vision)).save_pretrained(tmp_path / "part")
  export.export(source("none", rank=0), "llava", tmp_path / "llava")
  for given in ("whole", "part", "llava"):
    with pytest.raises(FormatError, match=r"siglip2.*: SigLIP 2 of variable resolution") as error:
      formats.open_checkpoint(tmp_path / given, formats.Options(tower=str(tmp_path / "part")))
    assert "\n" not in str(error.value)


def test_a_tower_s_own_tokenizer_is_not_read(tmp_path: Path) -> None:
  """SigLIP 2's adds an end to each text, which a decoder's may not."""
  from transformers import SiglipVisionConfig, SiglipVisionModel

  SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True}))
  (tmp_path / "tokenizer.json").write_text("{}")
  assert formats.open_checkpoint(tmp_path).tokenizer is None


def test_siglip_with_the_first_patch_dropped(tmp_path: Path) -> None:
  """huggingface/transformers#34447, TinyLLaVA/TinyLLaVA_Factory#203: what is not said is `default`."""
  from transformers import LlavaConfig, LlavaForConditionalGeneration

  config = LlavaConfig(
    vision_config={"model_type": "siglip_vision_model", **VISION},
    text_config={"model_type": "llama", **TEXT},
  )
  LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
  pixels = {
    **PIXELS,
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "crop_size": None,
  }
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
  for said in ("default", None):
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values.pop("vision_feature_select_strategy", None)
    path.write_text(json.dumps(values | ({"vision_feature_select_strategy": said} if said else {})))
    with pytest.raises(FormatError, match=r"vision_feature_select_strategy='default' with siglip"):
      formats.open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next_video", "vipllava"])
def test_relatives_of_llava_are_refused_by_name(llava: Path, tmp_path: Path, kind: str) -> None:
  """They pool, cut or join features in ways of their own, under the same names of tensors."""
  folder = Path(shutil.copytree(llava, tmp_path / "x"))
  change_json(folder / "config.json", model_type=kind)
  with pytest.raises(FormatError, match=rf"unknown format \({kind}\)"):
    formats.open_checkpoint(folder)


def test_shards_without_their_index(llm: Path, tmp_path: Path) -> None:
  folder = Path(shutil.copytree(llm, tmp_path / "parts"))
  (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
  with pytest.raises(
    FormatError, match=r"no weights .*model-00001-of-00002\.safetensors are parts"
  ):
    formats.open_checkpoint(folder)


NO_TOKENIZERS = {
  "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
  "nothing": b"",
  "cut off": None,
}


@pytest.mark.parametrize("what", NO_TOKENIZERS)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_that_is_none(tmp_path: Path, name: str, what: str) -> None:
  """DAMO-NLP-SG/Video-LLaMA#148, SALT-NLP/LLaVAR#6: a clone without Git LFS."""
  good = (GOLDEN / "base-llm/tokenizer.model").read_bytes()
  held = NO_TOKENIZERS[what]
  (tmp_path / name).write_bytes(good[:1000] if held is None else held)
  with pytest.raises(ValueError, match=r"Git LFS|no tokenizer can be read from its files") as error:
    Tokenizer(tmp_path)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 500


@pytest.mark.parametrize("number", [-7, 10**11, "seven"])
def test_an_added_token_with_an_id_that_none_can_have(tmp_path: Path, number: Any) -> None:
  shutil.copy(GOLDEN / "base-llm/tokenizer.model", tmp_path)
  (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": number}))
  with pytest.raises(TokenizerError):
    Tokenizer(tmp_path)
