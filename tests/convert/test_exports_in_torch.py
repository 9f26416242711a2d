"""What is exported opens in transformers, PEFT and torch, and computes the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from llava_sp_jax.convert import export, folding, torch_io, torch_write
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.models import build
from tests.convert.test_round_trip import TEXT, TOWER, source

torch = pytest.importorskip("torch")

TOLERANCE = 2e-5  # of the largest logit, float32; the two multiply in another order


def run(model: Loaded, tokens: np.ndarray, pixels: Any = None, slots: Any = None) -> Any:
  """Our logits. [1, T] -> [T, V]."""
  module = build.model(model.config.model)
  flat = {p: jnp.asarray(leaf.read()) for p, leaf in model.leaves.items()}
  side = model.config.model.tower.image_size
  pixels = np.zeros((1, 1, side, side, 3), np.float32) if pixels is None else pixels
  positions = np.arange(tokens.shape[1])[None]
  slots = np.full(tokens.shape, -1) if slots is None else slots
  variables = {"params": unflatten_dict(flat, sep="/")}
  segments = np.full(tokens.shape, 1 << 12)
  hidden = module.apply(variables, tokens, positions, segments, pixels, slots)
  return np.asarray(module.apply(variables, hidden, method="logits"))[0]


def close(ours: np.ndarray, theirs: Any) -> None:
  theirs = theirs.detach().float().numpy()
  assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def scaled(model: Loaded) -> Loaded:
  """Weights small enough for attention that is not all on one token."""
  for leaf in model.leaves.values():
    leaf.read()[...] *= 0.3
  return model


TOKENS = np.random.default_rng(1).integers(0, TEXT.vocab_size, (1, 12))


@pytest.mark.guard
def test_language_model_in_transformers(tmp_path: Path) -> None:
  from transformers import AutoModelForCausalLM

  ours = folding.fold(scaled(source("pooling")))
  export.export(ours, "language_model", tmp_path / "llm")
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32).eval()
  close(run(ours, TOKENS), theirs(torch.tensor(TOKENS)).logits[0])
  wanted = theirs.generate(torch.tensor(TOKENS), max_new_tokens=8, do_sample=False, eos_token_id=-1)
  tokens = TOKENS
  for _ in range(8):
    tokens = np.append(tokens, run(ours, tokens)[-1].argmax())[None]
  assert tokens.tolist() == wanted.tolist()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
def test_adapter_in_peft(tmp_path: Path) -> None:
  peft = pytest.importorskip("peft")
  from transformers import AutoModelForCausalLM

  ours = scaled(source("cropping"))
  export.export(ours, "llava_lora", tmp_path / "lora")
  base = AutoModelForCausalLM.from_pretrained(tmp_path / "lora/base", dtype=torch.float32)
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
  close(run(ours, TOKENS), theirs(torch.tensor(TOKENS)).logits[0])
  merged = theirs.merge_and_unload()
  close(run(folding.fold(ours), TOKENS), merged(torch.tensor(TOKENS)).logits[0])


def test_llava_in_transformers(tmp_path: Path) -> None:
  from transformers import LlavaForConditionalGeneration

  ours = scaled(source("none", rank=0))
  export.export(ours, "llava_hf", tmp_path / "hf")
  theirs, report = LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "hf", dtype=torch.float32, output_loading_info=True
  )
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  values = json.loads((tmp_path / "hf/config.json").read_text())
  image, count = values["image_token_index"], values["image_seq_length"]
  assert count == build.image_token_count(ours.config.model) == 24 * 24
  pixels = np.random.default_rng(2).normal(size=(TOWER.image_size, TOWER.image_size, 3))
  pixels = pixels.astype(np.float32)
  ids = np.concatenate([[3], np.full(count, image), [5, 7, 9]])[None]
  slots = np.where(ids == image, np.arange(ids.shape[1]) - 1, -1)
  with torch.no_grad():
    found = theirs.eval()(
      input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(2, 0, 1)[None])
    ).logits[0]
  wanted = found[:, : TEXT.vocab_size]  # the last is the image's own
  close(run(ours, np.where(ids == image, 0, ids), pixels[None, None], slots), wanted)


def test_non_lora_trainables_in_torch(tmp_path: Path) -> None:
  ours = source("cropping", "bfloat16")
  export.export(ours, "llava_lora", tmp_path / "lora")
  loaded = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
  opened = torch_io.open_file(tmp_path / "lora/non_lora_trainables.bin")
  assert list(loaded) == list(opened)
  assert "base_model.model.model.conv_4.weight" in loaded
  for name, tensor in loaded.items():
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(
      tensor.float().numpy(), opened[name].array().astype(np.float32), err_msg=name
    )


def test_a_file_of_every_dtype_and_shape_in_torch(tmp_path: Path) -> None:
  rng = np.random.default_rng(0)
  tensors = []
  for dtype in torch_io.STORAGES.values():
    for shape in ((), (0, 3), (1,), (3, 4, 5), (300, 1000)):
      array = (rng.normal(size=shape) * 9).astype(dtype)
      tensors.append(torch_io.Tensor(f"{dtype}{shape}", "", shape, dtype, lambda a=array: a))
  torch_write.save_bin(tensors, tmp_path / "x.bin")
  loaded = torch.load(tmp_path / "x.bin", weights_only=True)
  assert list(loaded) == [t.name for t in tensors]
  for tensor in tensors:
    found = loaded[tensor.name]
    assert str(found.dtype).removeprefix("torch.") == str(tensor.dtype)
    np.testing.assert_array_equal(found.double().numpy(), tensor.array().astype(np.float64))


def test_shards_have_the_limit_and_an_index(tmp_path: Path) -> None:
  from transformers import AutoModelForCausalLM

  ours = source("none", rank=0)
  export.export(ours, "language_model", tmp_path / "whole")
  tensors = list(torch_io.open_named(tmp_path / "whole", torch_io.WEIGHTS).values())
  (tmp_path / "parts").mkdir()
  torch_write.save_safetensors(tensors, tmp_path / "parts", shard_bytes=1500)
  files = sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors"))
  assert len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  (tmp_path / "parts/config.json").write_text((tmp_path / "whole/config.json").read_text())
  models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("whole", "parts")]
  for one, two in zip(*(m.parameters() for m in models), strict=True):
    assert torch.equal(one, two)
