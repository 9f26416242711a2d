"""What `--format huggingface` writes opens in transformers, computes as ours, and comes back."""

from __future__ import annotations

import ast
import dataclasses
import json
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
from llava_sp_jax.convert import export, export_huggingface, formats, leaves
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import anyres
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS
from tests.conftest import IMAGE_SIZE, ConfigMaker
from tests.convert.test_round_trip import assert_same, source, without_image_row
from tests.infer.tiny import random_model

SIZES = [(24, 24), (31, 24), (18, 40), (60, 33), (96, 20), (7, 90)]
CANVASES = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72))  # (width, height)
QUESTION = "what colour is it?"
TOLERANCE = 1e-5  # of float32 logits around 1, which the two sum in another order
TILES = {
  "image_aspect": "anyres",
  "grid_pinpoints": CANVASES,
  "patch_merge": "spatial_unpad",
  "images_per_row": 5,
  "row_length": 512,
}


def pictures(count: int = 6) -> list[Image.Image]:
  rng = np.random.default_rng(5)
  sizes = [SIZES[i % len(SIZES)] for i in range(count)]
  return [
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for width, height in sizes
  ]


def random_one(tiny_config: ConfigMaker, variant: str, tiles: bool) -> Pretrained:
  model = {"lora": {"rank": 0}, "image_newline": tiles}
  return random_model(
    tiny_config("finetune", variant, model=model, data=TILES if tiles else {"row_length": 288})
  )


def write(model: Pretrained, out: Path, name: str = "huggingface") -> Path:
  arrays = flatten_dict(model.params, sep="/")
  tokenizer = Path(model.config.data.tokenizer)
  loaded = Loaded("memory", model.config, leaves.in_memory(arrays), formats.PARTS, tokenizer)
  export.export(loaded, name, out)
  return out


# In -> out -> in, without torch.


def comes_back(variant: str, out: Path) -> None:
  ours = source(variant, "bfloat16" if variant == "cropping" else "float32", rank=0)
  export.export(ours, "huggingface", out)
  back = formats.open_checkpoint(out)
  assert back.format == "huggingface"
  assert back.config.model.projector.variant == variant
  assert build.view_sizes(back.config.model) == build.view_sizes(ours.config.model)
  assert back.config.model.projector.scales == ()
  assert back.config.model.frozen_dtype == ours.config.model.frozen_dtype
  assert_same(ours, without_image_row(back))


@pytest.mark.parametrize("variant", ["none", "cropping", "pooling_transformer", "register"])
def test_variants_come_back(variant: str, tmp_path: Path) -> None:
  comes_back(variant, tmp_path / "x")


def test_settings_come_back(tmp_path: Path) -> None:
  """Those of images, tokens and templates, and the scales of a variant."""
  projector = config_lib.ProjectorConfig(variant="both", scales=(3, 5), token_width=8)
  ours = source("both", rank=0, projector=projector, image_newline=True)
  data = dataclasses.replace(
    ours.config.data,
    image_aspect="anyres",
    grid_pinpoints=((96, 192), (192, 96)),
    patch_merge="spatial_unpad",
    image_fit="stretch",
    image_resample="bilinear",
    image_mean=(0.5, 0.4, 0.3),
    template="chatml_direct",
    row_length=777,
  )
  ours = dataclasses.replace(ours, config=dataclasses.replace(ours.config, data=data))
  export.export(ours, "huggingface", tmp_path / "x")
  back = formats.open_checkpoint(tmp_path / "x")
  assert back.config.data == data
  assert back.config.model.projector == projector
  assert_same(ours, without_image_row(back))


@pytest.mark.parametrize(
  ("file", "change", "message"),
  [
    ("config.json", {"projector": {"detail_sizes": [8]}}, r"detail_sizes is \[8\], but \[16\] is"),
    ("config.json", {"projector": {"variant": "crop"}}, "projector.variant: unknown 'crop'"),
    ("config.json", {"projector": {"scales": [4, 3]}}, "expected growing sizes"),
    ("config.json", {"num_spatial_tokens": 5}, "num_spatial_tokens is 6, expected 5"),
    ("config.json", {"projector": {"kernels": 1}}, "projector: unknown key kernels"),
    ("processor_config.json", {"patch_size": 5}, "patch_size is 5, expected 4"),
    ("processor_config.json", {"image_processor": {"image_fit": None}}, "image_fit"),
    ("processor_config.json", {"image_processor": {"do_pad": True}}, "unknown key do_pad"),
  ],
)
def test_folders_that_contradict_themselves(
  file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
  export.export(source("cropping", rank=0), "huggingface", tmp_path / "x")
  values = json.loads((tmp_path / "x" / file).read_text())
  for key, value in change.items():
    values[key] = {**values[key], **value} if isinstance(value, dict) else value
  (tmp_path / "x" / file).write_text(json.dumps(values))
  with pytest.raises((FormatError, config_lib.ConfigError), match=message):
    formats.open_checkpoint(tmp_path / "x")


def test_a_variant_that_the_code_lacks_is_refused(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  monkeypatch.setattr(export_huggingface, "EXTRACTORS", frozenset({"register"}))
  with pytest.raises(FormatError, match=r"variant pooling has conv, which the code .* lacks"):
    export.export(source("pooling", rank=0), "huggingface", tmp_path / "x")


def test_the_code_stands_alone() -> None:
  """It imports nothing of this package, and is copied as it is."""
  allowed = {"__future__", "collections", "math", "typing", "numpy", "PIL", "torch", "transformers"}
  for file in export_huggingface.FILES:
    tree = ast.parse((export_huggingface.CODE / f"{file}.py").read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        assert {alias.name.split(".")[0] for alias in node.names} <= allowed
      elif isinstance(node, ast.ImportFrom):
        assert node.module is not None
        own = node.level == 1 and node.module in export_huggingface.FILES
        assert own or (not node.level and node.module.split(".")[0] in allowed)


# The code of the folder, imported from where it stands in the package.


def test_its_order_of_tokens_is_ours() -> None:
  from llava_sp_jax.convert.remote_code import configuration_llava_sp as theirs

  rng = np.random.default_rng(0)
  canvases = ((672, 336), (336, 672), (672, 672), (1008, 336))
  swapped = [(height, width) for width, height in canvases]
  assert set(theirs.MERGES) == set(anyres.MERGES)
  for _ in range(300):
    width, height = (int(side) for side in rng.integers(1, 1500, 2))
    for merge in anyres.MERGES:
      for spatial, tiled in ((6, True), (0, True), (6, False)):
        tile = anyres.Tile(336, 24, spatial, newline=True)
        best = anyres.best_resolution((width, height), canvases) if tiled else None
        plan = anyres.plan(tile, (width, height), best, merge)
        order, tiles = theirs.token_order(
          (height, width), 336, 24, spatial, swapped if tiled else (), merge
        )
        assert tiles == plan.tiles
        ours = np.where(plan.slots == anyres.NEWLINE, theirs.NEWLINE, plan.slots)
        np.testing.assert_array_equal(order, ours)


@pytest.mark.parametrize("aspect", anyres.ASPECTS)
@pytest.mark.parametrize(("fit", "resample"), [("crop", "bicubic"), ("stretch", "bilinear")])
def test_its_pixels_are_ours(aspect: str, fit: str, resample: str) -> None:
  pytest.importorskip("torch")
  from llava_sp_jax.convert.remote_code import processing_llava_sp as theirs

  data = config_lib.DataConfig(
    image_aspect=aspect, image_fit=fit, image_resample=resample, grid_pinpoints=CANVASES
  )
  reader = anyres.Reader(data, anyres.Tile(IMAGE_SIZE, 6, 0))
  processor = theirs.LlavaSPImageProcessor(
    {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    aspect,
    fit,
    int(Image.Resampling[resample.upper()]),
    image_grid_pinpoints=[(height, width) for width, height in CANVASES],
  )
  given = pictures()
  given[1:4] = [given[1].convert("L"), given[2].convert("RGBA"), given[3].convert("P")]
  given.append(Image.fromarray(np.arange(24 * 30, dtype=np.uint16).reshape(24, 30) * 90))
  found = np.asarray(processor(given)["pixel_values"])
  for picture, pixels in zip(given, found, strict=True):
    ours = reader(picture).tiles.transpose(0, 3, 1, 2)
    tiles = pixels if aspect == "anyres" else pixels[None]
    np.testing.assert_array_equal(tiles[: len(ours)], ours)
    assert not tiles[len(ours) :].any()
  with pytest.raises(ValueError, match="do_resize: images are prepared as in training"):
    processor(given, do_resize=False)
  with pytest.raises(ValueError, match=r"found float64 \[24, 24, 3\]"):
    processor([np.zeros((24, 24, 3))])


def test_its_parts_are_those_that_are_listed() -> None:
  pytest.importorskip("torch")
  from llava_sp_jax.convert.remote_code import modeling_llava_sp as theirs

  assert set(theirs.VIEWS) == export_huggingface.VIEWS
  assert set(theirs.EXTRACTORS) == export_huggingface.EXTRACTORS
  assert set(theirs.MERGES) == export_huggingface.MERGES


# The folder in transformers.


def opened(folder: Path) -> tuple[Any, Any]:
  """Model and processor of a folder, by transformers."""
  torch = pytest.importorskip("torch")
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
  torch = pytest.importorskip("torch")
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
    assert np.abs(mine).max() > 0.5
    np.testing.assert_allclose(found[..., : mine.shape[-1]], mine, atol=TOLERANCE, rtol=TOLERANCE)


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
  torch = pytest.importorskip("torch")
  ours = random_one(tiny_config, variant, tiles)
  model, processor = opened(write(ours, tmp_path / "x"))
  given = pictures(12)
  engine = Engine(ours, 4, Generation(max_new_tokens=6))
  wanted = [a.ids for a in engine.answer([Request(QUESTION, (p,)) for p in given])]
  assert len(set(wanted)) > 5  # they do depend on the picture
  inputs = inputs_of(processor, given)
  with torch.no_grad():
    made = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :].tolist()
  stops = set(model.generation_config.eos_token_id)
  ends = [next((i for i, t in enumerate(ids) if t in stops), len(ids)) for ids in made]
  assert [tuple(ids[:end]) for ids, end in zip(made, ends, strict=True)] == wanted


def test_what_transformers_saves_comes_back(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """Model and processor, bit-equal, with the code; and vLLM finds what it asks for."""
  torch = pytest.importorskip("torch")
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
  pytest.importorskip("torch")
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
print(model.generate(**inputs, max_new_tokens=3).shape[1] - inputs["input_ids"].shape[1])
"""
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
    cwd=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[-1] == "3"
