"""What vLLM makes of our exports: its own parser, chat template, processor and encoder, on a CPU.

What is left is the decoder, whose attention needs an accelerator there.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax.convert import image_embeds
from llava_sp_jax.data import anyres
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.engine import Request
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.infer.vlm import VisionLanguageModel
from llava_sp_jax.models import build
from tests.clients import run
from tests.conftest import ConfigMaker
from tests.convert.leaving import QUESTION, SIZES, pictures, random_one, write
from tests.serve.pictures import data_url

pytestmark = pytest.mark.slow

# Its transformers backend, from a chat to the features of its images: vLLM's own code computes them
# of what its processor made, with the model of the folder.
WHOLE = """
import json, sys
import numpy as np
import torch
from transformers import AutoModel
from vllm.config import ModelConfig
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

folder, given, out = sys.argv[1:]
given = json.load(open(given))
config = ModelConfig(model=folder, dtype="float32", **given["config"])
processor = MULTIMODAL_REGISTRY.create_processor(config)
tokenizer = processor.info.get_tokenizer()
form = resolve_chat_template_content_format(None, None, "auto", tokenizer, model_config=config)

def read(messages):
  conversation, data, _ = parse_chat_messages(messages, config, content_format=form)
  text = safe_apply_chat_template(
    config, tokenizer, conversation, tokenize=False, add_generation_prompt=True)
  ids = tokenizer.encode(text, add_special_tokens=False)
  found = processor(ids, processor.info.parse_mm_data(data or {}))
  ranges = found["mm_placeholders"].get("image", [])
  assert all(r.is_embed is None or bool(r.is_embed.all()) for r in ranges)
  return found, {"ids": found["prompt_token_ids"], "places": [[r.offset, r.length] for r in ranges]}

assert config.architecture == "TransformersMultiModalForCausalLM"
backend = object.__new__(type("Backend", (MultiModalMixin,), {}))
torch.nn.Module.__init__(backend)
backend.model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
chats, arrays = [], {}
for messages in given["chats"]:
  found, said = read(messages)
  if items := found["mm_kwargs"].get("image"):
    data = found["mm_kwargs"].get_data()
    arrays[f"pixels_{len(chats)}"] = data["pixel_values"].numpy()
    with torch.no_grad():
      features = torch.cat(list(backend.embed_multimodal(**data)))
    arrays[f"features_{len(chats)}"] = features.numpy()
  chats.append(said)
info = processor.info
json.dump({
  "chats": chats,
  "most": info.get_mm_max_tokens_per_item(4096, {"image": 1}),
  "limits": dict(info.supported_mm_limits),
}, open(f"{out}.json", "w"))
np.savez(f"{out}.npz", **arrays)
"""
# What vLLM does with the tokens of images, up to its LLaVA, which needs torchvision.
TOKENS = """
import json, sys
import numpy as np
import torch
from transformers import AutoConfig
from vllm.multimodal.media.image import ImageEmbeddingMediaIO
from vllm.multimodal.parse import MultiModalDataParser

folder, given, out = sys.argv[1:]
given = json.load(open(given))
width = AutoConfig.from_pretrained(folder).text_config.hidden_size
parser = MultiModalDataParser(expected_hidden_size=width)

def items(tensor):
  try:
    found = parser.parse_mm_data({"image": tensor})["image"]
  except ValueError as error:
    return str(error)
  return [type(found).__name__, *(len(found.get(i)) for i in range(len(found)))]

tokens = torch.load(given["tokens"], weights_only=True)
parts = [ImageEmbeddingMediaIO().load_base64("", part["image_embeds"]) for part in given["parts"]]
found = {
  "written": items(tokens), "parts": items(parts), "one part": items(parts[:1]),
  "bare": items(parts[0]), "narrow": items(tokens[..., :-1]),
}
json.dump(found, open(f"{out}.json", "w"))
np.savez(f"{out}.npz", tokens=tokens, parts=torch.stack(parts))
"""


def ask(program: str, folder: Path, given: dict[str, Any]) -> Any:
  """Runs a program of vLLM in a folder; returns what it says."""
  work = folder.parent
  (work / "given.json").write_text(json.dumps(given))
  run("vllm", program, folder, work / "given.json", work / "found", cwd=work)
  return json.loads((work / "found.json").read_text())


def chat(question: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
  return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def runs(ids: list[int], image: int) -> list[list[int]]:
  """[first, length] of each run of the image token."""
  found, at = [], 0
  for token, group in itertools.groupby(ids):
    length = len(list(group))
    found += [[at, length]] if token == image else []
    at += length
  return found


@pytest.mark.parametrize(
  ("variant", "tiles"),
  [("none", False), ("pooling", False), ("cropping", False), ("cropping", True)],
)
def test_its_transformers_backend_reads_as_we_do(
  variant: str, tiles: bool, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  """Ids, places of images, pixels (bit for bit) and image tokens."""
  ours = random_one(tiny_config, variant, tiles)
  folder = write(ours, tmp_path / "x")
  files: list[Path] = []
  for i, picture in enumerate(pictures(len(SIZES))):
    files.append(tmp_path / f"{i}.png")
    picture.save(files[-1])
  groups: list[list[Path]] = [[], *([file] for file in files), files[1:4]]
  links = [[{"type": "image_url", "image_url": {"url": data_url(f.read_bytes())}} for f in g]
           for g in groups]  # fmt: skip
  chats = [chat(QUESTION, *parts) for parts in links]
  settings = {"model_impl": "transformers", "trust_remote_code": True}
  found = ask(WHOLE, folder, {"config": settings, "chats": chats})
  arrays = np.load(tmp_path / "found.npz")

  image = json.loads((folder / "config.json").read_text())["image_token_id"]
  prompts = Prompts(ours.config, ours.tokenizer, PictureCache.of(ours.config), share=False)
  reader = anyres.Reader(ours.config.data, anyres.Tile(*build.tile_shape(ours.config.model)))
  model = VisionLanguageModel(ours)
  counts = []
  for i, (group, said) in enumerate(zip(groups, found["chats"], strict=True)):
    pieces = prompts(Request(QUESTION, tuple(group))).pieces
    ids = [int(t) for p in pieces for t in np.where(p.slots >= 0, image, p.tokens)]
    assert said["ids"] == ids
    tokens = [model.encode_image(file) for file in group]
    if len(group) <= 1:
      assert said["places"] == runs(ids, image)
    assert [length for _, length in said["places"]] == [len(t) for t in tokens]
    counts += [len(t) for t in tokens]
    if group:
      pixels = arrays[f"pixels_{i}"]
      for file, row in zip(group, pixels if tiles else pixels[:, None], strict=True):
        wanted = np.moveaxis(reader(Image.open(file)).tiles, -1, 1)
        np.testing.assert_array_equal(row[: len(wanted)], wanted)
      wanted = np.concatenate(tokens)
      tolerance = 1e-5 * np.abs(wanted).max()
      np.testing.assert_allclose(arrays[f"features_{i}"], wanted, atol=tolerance, rtol=0)
  assert found["limits"] == {"image": None}
  assert found["most"]["image"] >= max(counts)
  assert (len(set(counts)) > 2) == tiles


@pytest.mark.parametrize("variant", ["pooling", "cropping"])
def test_its_parser_reads_tokens_as_we_wrote_them(
  variant: str, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  """As many images with as many tokens; a bare [N, D] would be N images."""
  ours = random_one(tiny_config, variant, tiles=False)
  folder = write(ours, tmp_path / "x", "vllm")
  model = VisionLanguageModel(ours)
  files = []
  for i, picture in enumerate(pictures(2)):
    files.append(tmp_path / f"{i}.png")
    picture.save(files[-1])
  tokens = [model.encode_image(file) for file in files]
  count, width = tokens[0].shape
  image_embeds.write(tokens, tmp_path / "tokens.pt")
  image_embeds.write(tokens, tmp_path / "parts.jsonl")
  parts = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
  given = {"tokens": str(tmp_path / "tokens.pt"), "parts": parts}
  found = ask(TOKENS, folder, given)
  assert found == {
    "written": ["ImageEmbeddingItems", count, count],
    "parts": ["ImageEmbeddingItems", count, count],
    "one part": ["ImageEmbeddingItems", count],
    "bare": ["ImageProcessorItems", *[width] * count],
    "narrow": found["narrow"],
  }
  assert f"got {width - 1}, but model expects {width}" in found["narrow"]
  arrays = np.load(tmp_path / "found.npz")
  for name in ("tokens", "parts"):
    np.testing.assert_array_equal(arrays[name], np.stack(tokens))
