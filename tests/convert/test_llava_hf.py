"""The llava_hf export opens with AutoProcessor and answers as ours; so do padded embeddings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from llava_sp_jax.checkpoints import opening
from llava_sp_jax.convert import export, formats, hf_prompts, leaves
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.example import IMAGE_ID
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import Pretrained
from tests.conftest import ConfigMaker
from tests.convert.leaving import trained
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
  return [
    Image.fromarray(rng.integers(0, 256, (*sizes[i % 4], 3), dtype=np.uint8)) for i in range(20)
  ]


@pytest.fixture(scope="module")
def exported(model: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
  arrays = flatten_dict(model.params, sep="/")
  ours = Loaded(
    "memory",
    model.config,
    leaves.in_memory(arrays),
    formats.PARTS,
    Path(model.config.data.tokenizer),
  )
  out = tmp_path_factory.mktemp("hf") / "out"
  export.export(ours, "llava_hf", out)
  return out


def answers(model: Pretrained, pictures: list[Image.Image], **how: Any) -> list[tuple[int, ...]]:
  engine = Engine(model, 4, Generation(max_new_tokens=NEW, **how))
  return [a.ids for a in engine.answer([Request("what colour is it?", (p,)) for p in pictures])]


def theirs_answer(exported: Path, asked: list[tuple[Image.Image, str]], new: int) -> list[Any]:
  """Greedy ids of transformers, through its processor and chat template, cut at the first end."""
  from transformers import AutoProcessor, LlavaForConditionalGeneration

  processor = AutoProcessor.from_pretrained(exported)
  model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
  prompts = [
    processor.apply_chat_template(
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
      add_generation_prompt=True,
    )
    for _, question in asked
  ]
  pictures = [picture for picture, _ in asked]
  inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True)
  with torch.no_grad():
    found = model.generate(**inputs, max_new_tokens=new)
  made = found[:, inputs["input_ids"].shape[1] :].tolist()
  stops = set(model.generation_config.eos_token_id)
  return [
    tuple(ids[: next((i for i, t in enumerate(ids) if t in stops), len(ids))]) for ids in made
  ]


def test_the_export_answers_as_ours(
  model: Pretrained, exported: Path, pictures: list[Image.Image]
) -> None:
  """For twenty pictures of several shapes."""
  from transformers import AutoProcessor, LlavaConfig

  processor = AutoProcessor.from_pretrained(exported)
  assert processor.patch_size == model.config.model.tower.patch_size
  image = LlavaConfig.from_pretrained(exported).image_token_index
  assert processor.tokenizer.convert_tokens_to_ids("<image>") == image
  assert image not in range(len(model.tokenizer))
  wanted = answers(model, pictures)
  assert len(set(wanted)) > 5  # they do depend on the picture
  assert theirs_answer(exported, [(p, "what colour is it?") for p in pictures], NEW) == wanted


@pytest.mark.slow
def test_a_trained_export_answers_twenty_questions_of_easy_vqa_as_ours(tmp_path: Path) -> None:
  """The published pictures and questions, after a training that is long enough to tell them apart."""
  run, chosen = trained(tmp_path, "none", 20)
  asked = [(Image.open(path).convert("RGB"), question) for path, question in chosen]
  ours = pretrained.from_run(run)
  export.export(opening.open_any(run, formats.Options()), "llava_hf", tmp_path / "hf")
  engine = Engine(ours, 4, Generation(max_new_tokens=8))
  wanted = [a.ids for a in engine.answer([Request(q, (p,)) for p, q in asked])]
  assert len(asked) == 20
  assert len(set(wanted)) > 3
  assert theirs_answer(tmp_path / "hf", asked, 8) == wanted


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
  """It puts a blank in front of the text behind an image, which transformers leaves out."""
  from transformers import AutoTokenizer

  ours = Tokenizer(GOLDEN / "base-llm")
  tokens = hf_prompts.Tokens.of(GOLDEN / "base-llm", "v1", 512, tmp_path)
  assert tokens.new
  assert tokens.image == len(ours) == 512
  theirs = AutoTokenizer.from_pretrained(tmp_path)
  assert theirs.padding_side == "left"
  said = "USER: <image>\nwhat shape? ASSISTANT: a circle</s>USER: and <image>\nthis? ASSISTANT:"
  runs = reading.tokenize([conversation.TextPiece(said, False, 0)], ours)
  wanted = [512 if i == IMAGE_ID else i for run in runs for i in run.ids]
  assert theirs(said).input_ids == wanted
  back = reading.tokenize([conversation.TextPiece(said, False, 0)], Tokenizer(tmp_path))
  assert [run.ids for run in back] == [run.ids for run in runs]


def test_what_transformers_does_not_compute(tmp_path: Path) -> None:
  tiles = source("none", rank=0, image_newline=True)
  with pytest.raises(FormatError, match=r"llava_hf: tiles \(anyres\) are not written"):
    export.export(tiles, "llava_hf", tmp_path / "x")
