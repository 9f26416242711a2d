"""The llava_hf export opens with AutoProcessor and answers as ours; so do padded embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from llava_sp_jax.convert import formats, leaves, save, save_hf
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import Pretrained
from tests.conftest import ConfigMaker
from tests.convert.test_round_trip import source
from tests.infer.tiny import random_model

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parents[1] / "golden"
NEW = 6
PADDED = 7  # rows of the embedding that the tokenizer knows nothing of


@pytest.fixture(scope="module")
def model(tiny_config: ConfigMaker) -> Pretrained:
  """A random model whose embedding has more rows than its tokenizer has ids."""
  config = tiny_config("finetune", "none", model={"lora": {"rank": 0}})
  rows = config.model.language_model.vocab_size + PADDED
  text = dataclasses.replace(config.model.language_model, vocab_size=rows)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, language_model=text))
  found = random_model(config)
  found.params["language_model"]["lm_head"]["kernel"][:, -PADDED:] *= 3.0  # that would be chosen
  return found


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
  rng = np.random.default_rng(5)
  sizes = [(24, 24), (31, 24), (18, 40), (60, 33)]
  return [Image.fromarray(rng.integers(0, 256, (*sizes[i % 4], 3), dtype=np.uint8))
          for i in range(20)]  # fmt: skip


@pytest.fixture(scope="module")
def exported(model: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
  arrays = flatten_dict(model.params, sep="/")
  ours = formats.Source("memory", model.config, leaves.in_memory(arrays), formats.PARTS,
                        Path(model.config.data.tokenizer))  # fmt: skip
  out = tmp_path_factory.mktemp("hf") / "out"
  save.export(ours, "llava_hf", out)
  return out


def answers(model: Pretrained, pictures: list[Image.Image], **how: Any) -> list[tuple[int, ...]]:
  engine = Engine(model, 4, Generation(max_new_tokens=NEW, **how))
  return [a.ids for a in engine.answer([Request("what colour is it?", (p,)) for p in pictures])]


def test_the_export_answers_as_ours(
  model: Pretrained, exported: Path, pictures: list[Image.Image]
) -> None:
  """Greedily, for twenty pictures of several shapes, through the processor and its chat template."""
  from transformers import AutoProcessor, LlavaForConditionalGeneration

  processor = AutoProcessor.from_pretrained(exported)
  theirs = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
  assert processor.patch_size == model.config.model.tower.patch_size
  image = theirs.config.image_token_index
  assert processor.tokenizer.convert_tokens_to_ids("<image>") == image
  assert image not in range(len(model.tokenizer))
  content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
  prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
  )
  inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")
  with torch.no_grad():
    found = theirs.generate(**inputs, max_new_tokens=NEW)
  made = found[:, inputs["input_ids"].shape[1] :].tolist()
  stops = set(theirs.generation_config.eos_token_id)
  wanted = answers(model, pictures)
  assert len(set(wanted)) > 5  # they do depend on the picture
  for ours, ids in zip(wanted, made, strict=True):
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    assert ours == tuple(ids[:end])


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}, {"num_beams": 2}])
def test_ids_that_the_tokenizer_lacks_are_never_chosen(
  model: Pretrained, pictures: list[Image.Image], how: dict[str, Any]
) -> None:
  found = answers(model, pictures[:4], **how)
  assert any(found)
  assert max(token for ids in found for token in ids) < len(model.tokenizer)


def test_the_export_comes_back(model: Pretrained, exported: Path) -> None:
  opened = formats.open_checkpoint(exported)
  assert opened.config.data.template == "v1"
  assert opened.config.data.image_aspect == "pad"
  assert opened.tokenizer == exported
  flat = flatten_dict(model.params, sep="/")
  head = opened.leaves["language_model/lm_head/kernel"].read()
  known = len(model.tokenizer)
  np.testing.assert_array_equal(head[:, :known], flat["language_model/lm_head/kernel"][:, :known])
  np.testing.assert_allclose(
    head[:, known], flat["language_model/lm_head/kernel"].mean(1), atol=1e-6
  )


def test_a_sentencepiece_tokenizer_reads_prompts_alike(tmp_path: Path) -> None:
  tokens = save_hf._Tokens.of(GOLDEN / "base-llm", "v1", 512, tmp_path)
  assert tokens.new
  assert tokens.image == len(Tokenizer(GOLDEN / "base-llm")) == 512
  assert json.loads((tmp_path / "tokenizer_config.json").read_text())["padding_side"] == "left"


def test_what_transformers_does_not_compute(tmp_path: Path) -> None:
  tiles = source("none", rank=0, image_newline=True)
  with pytest.raises(FormatError, match=r"llava_hf: tiles \(anyres\) are not written"):
    save.export(tiles, "llava_hf", tmp_path / "x")
