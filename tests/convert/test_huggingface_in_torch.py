"""What `--format huggingface` writes computes as ours in transformers, and comes back from there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import export, formats
from llava_sp_jax.data import anyres
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS
from tests.conftest import ConfigMaker
from tests.convert.leaving import QUESTION, comes_back, pictures, random_one, write
from tests.convert.test_round_trip import TEXT, TOWER, assert_same, source
from tests.infer.tiny import random_model

torch = pytest.importorskip("torch")

# Of the largest logit, which is 5 to 10 here. Both sum float32 in another order: torch in float32
# is up to 1.3e-5 from torch in float64, which is 2e-6 of the largest logit.
TOLERANCE = 3e-6


def opened(folder: Path) -> tuple[Any, Any]:
  """Model and processor of a folder, by transformers."""
  from transformers import AutoModelForImageTextToText, AutoProcessor

  model, report = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
  )
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def prompt(processor: Any, images: int = 1, question: str = QUESTION) -> str:
  content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
  asked: str = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
  )
  return asked


def inputs_of(processor: Any, given: list[Image.Image], **how: Any) -> Any:
  texts = [prompt(processor)] * len(given)
  return processor(images=given, text=texts, return_tensors="pt", padding=True, **how)


def agrees(ours: Pretrained, folder: Path) -> None:
  """Compares ids and logits of a question about each of some pictures."""
  model, processor = opened(folder)
  prompts = Prompts(ours.config, ours.tokenizer, PictureCache.of(ours.config), share=False)
  reader = anyres.Reader(ours.config.data, anyres.Tile(*build.tile_shape(ours.config.model)))
  module = build.model(ours.config.model)

  @jax.jit
  def logits(params: Any, tokens: Any, slots: Any, tiles: Any) -> Any:
    index = np.arange(tokens.shape[1])[None]
    variables = {"params": params}
    segments = np.full(tokens.shape, 1 << 12)
    hidden = module.apply(variables, tokens, index, segments, tiles, slots)
    return module.apply(variables, hidden, method="logits")

  for picture in pictures(2):
    (piece,) = prompts(Request(QUESTION, (picture,))).pieces
    inputs = inputs_of(processor, [picture])
    ids = np.where(piece.slots >= 0, processor.image_token_id, piece.tokens)
    np.testing.assert_array_equal(inputs["input_ids"][0], ids)
    tiles = reader(picture).tiles
    mine = np.asarray(logits(ours.params, piece.tokens[None], piece.slots[None], tiles[None]))
    with torch.no_grad():
      found = model(**inputs).logits.numpy()
    largest = np.abs(mine).max()
    assert largest > 0.5
    np.testing.assert_allclose(found[..., : mine.shape[-1]], mine, atol=TOLERANCE * largest, rtol=0)


@pytest.mark.parametrize(("variant", "tiles"), [("pooling", False), ("cropping", True)])
def test_logits_are_ours(
  variant: str, tiles: bool, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  ours = random_one(tiny_config, variant, tiles)
  agrees(ours, write(ours, tmp_path / "x"))


@pytest.mark.guard
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_variant_are_ours(
  variant: str, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  if variant in ("tokens_12", "crop_224"):  # a grid of 12: as many scales as the variant has
    ours = random_model(
      tiny_config(
        "finetune",
        variant,
        model={"lora": {"rank": 0}, "tower": {"patch_size": 2}},
        data={"row_length": 288},
      )
    )
  else:
    ours = random_one(tiny_config, variant, tiles=False)
  agrees(ours, write(ours, tmp_path / "x"))
  comes_back(variant, tmp_path / "back")


@pytest.mark.guard
@pytest.mark.parametrize(
  ("variant", "tiles"),
  [("none", False), ("pooling", False), ("cropping", False), ("cropping", True)],
)
def test_greedy_answers_are_ours(
  variant: str, tiles: bool, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  ours = random_one(tiny_config, variant, tiles)
  model, processor = opened(write(ours, tmp_path / "x"))
  given = pictures(100)
  engine = Engine(ours, 16, Generation(max_new_tokens=6))
  wanted = [a.ids for a in engine.answer([Request(QUESTION, (p,)) for p in given])]
  assert len(set(wanted)) > 5  # they do depend on the picture
  inputs = inputs_of(processor, given)
  with torch.no_grad():
    made = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :].tolist()
  stops = set(model.generation_config.eos_token_id)
  ends = [next((i for i, t in enumerate(ids) if t in stops), len(ids)) for ids in made]
  assert [tuple(ids[:end]) for ids, end in zip(made, ends, strict=True)] == wanted


@pytest.mark.guard
@pytest.mark.parametrize(
  ("tower", "decoder"),
  [
    ({"variant": "siglip"}, {}),
    ({}, {"tie_embeddings": True}),
    ({}, {"attention_bias": True}),  # Qwen2
    ({}, {"sliding_window": 100}),  # Mistral
    ({}, {"rope_scaling": config_lib.RopeScaling(kind="linear", factor=4.0)}),
  ],
)
def test_other_towers_and_decoders_compute_as_ours(
  tower: dict[str, Any], decoder: dict[str, Any], tmp_path: Path
) -> None:
  from transformers import AutoModelForImageTextToText

  from tests.convert.test_exports_in_torch import close, run, scaled

  text, vision = dataclasses.replace(TEXT, **decoder), dataclasses.replace(TOWER, **tower)
  ours = scaled(source("cropping", rank=0, language_model=text, tower=vision))
  export.export(ours, "huggingface", tmp_path / "x")
  model, report = AutoModelForImageTextToText.from_pretrained(
    tmp_path / "x", dtype=torch.float32, trust_remote_code=True, output_loading_info=True
  )
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  count, image = build.image_token_count(ours.config.model), model.config.image_token_id
  ids = np.asarray([[5, 7, *[image] * count, 9, 3]])
  slots = np.asarray([[-1, -1, *range(count), -1, -1]])
  pixels = np.random.default_rng(2).normal(size=(1, 1, 96, 96, 3)).astype(np.float32)
  wanted = run(ours, np.where(slots < 0, ids, 0), pixels, slots)
  tiles = torch.tensor(pixels[0].transpose(0, 3, 1, 2))
  with torch.no_grad():
    found = model.eval()(torch.tensor(ids), pixel_values=tiles).logits[0, :, : text.vocab_size]
  close(wanted, found)
  model.save_pretrained(tmp_path / "again")
  for name in ("processor_config.json", "generation_config.json"):
    (tmp_path / "again" / name).write_text((tmp_path / "x" / name).read_text())
  assert_same(formats.open_checkpoint(tmp_path / "x"), formats.open_checkpoint(tmp_path / "again"))


def test_what_transformers_saves_comes_back(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """Model and processor, bit-equal, with the code; and vLLM finds what it asks for."""
  ours = random_one(tiny_config, "cropping", tiles=True)
  folder = write(ours, tmp_path / "x")
  model, processor = opened(folder)
  model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
  processor.save_pretrained(tmp_path / "again")
  assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
  first, again = formats.open_checkpoint(folder), formats.open_checkpoint(tmp_path / "again")
  assert_same(first, again)
  assert again.config.data == first.config.data
  assert again.config.model == first.config.model
  for path, leaf in flatten_dict(ours.params, sep="/").items():
    found = first.leaves[path].read()
    rows = tuple(slice(0, side) for side in np.shape(leaf))  # without that of <image>
    np.testing.assert_array_equal(found[rows], leaf, err_msg=path)
  model, processor = opened(tmp_path / "again")

  # As vLLM calls them.
  given = pictures(2)
  asked = prompt(processor, images=2)
  start = processor.tokenizer.bos_token
  assert asked.startswith(start)  # servers add no special tokens to the text of a chat
  inputs = processor(
    images=given,
    text=asked,
    return_tensors="pt",
    return_mm_token_type_ids=True,
    return_text_replacement_offsets=True,
  )
  assert inputs["input_ids"][0, :2].tolist().count(processor.tokenizer.bos_token_id) == 1
  counted = processor._get_num_multimodal_tokens(image_sizes=[(p.height, p.width) for p in given])
  assert counted["num_image_patches"] == [1, 1]
  assert int(inputs["mm_token_type_ids"].sum()) == sum(counted["num_image_tokens"])
  assert len(inputs["text_replacement_offsets"][0]) == 2
  features = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
  assert [len(part) for part in features.pooler_output] == counted["num_image_tokens"]
  assert model.model.get_decoder() is model.model.language_model
  embeds = torch.zeros(1, 3, ours.config.model.language_model.width)
  assert model.model(inputs_embeds=embeds, return_dict=False)[0].shape == embeds.shape
  with pytest.raises(ValueError, match="places for image tokens, but the images have"):
    model(input_ids=inputs["input_ids"][:, :60], pixel_values=inputs["pixel_values"],
          image_sizes=inputs["image_sizes"])  # fmt: skip
  with pytest.raises(ValueError, match="need image_sizes"):
    model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


@pytest.mark.guard
def test_the_folder_needs_nothing_of_this_package(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """A process that cannot import it opens model and processor by their auto classes, and trains."""
  folder = write(random_one(tiny_config, "pooling_transformer", tiles=False), tmp_path / "x")
  code = f"""
import sys
sys.modules["llava_sp_jax"] = sys.modules["jax"] = None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert config.text_config.model_type == "llama" and config.projector["views"] == ["pool"]
base = AutoModel.from_config(config, trust_remote_code=True)
assert type(base).__name__ == "LlavaSPModel" and all(p.isfinite().all() for p in base.parameters())
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
chat = [{{"role": "user", "content": [
  {{"type": "image", "image": Image.new("RGB", (30, 20))}}, {{"type": "text", "text": "red?"}}]}}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                       return_dict=True, return_tensors="pt")
loss = model(**inputs, labels=inputs["input_ids"]).loss
loss.backward()
assert model.model.multi_modal_projector.pool_0.query.grad.abs().sum() > 0
print(model.generate(**inputs, min_new_tokens=3, max_new_tokens=3).shape[1] - inputs["input_ids"].shape[1])
"""
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
    cwd=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[-1] == "3"
