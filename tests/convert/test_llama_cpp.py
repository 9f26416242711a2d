"""llama.cpp computes with exported files what this package computes.

Needs llama-cpp-python, which is built from source: pip install llama-cpp-python
"""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

import llava_sp_jax as llava
from llava_sp_jax import cli
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.convert import export
from llava_sp_jax.convert.gguf_mmproj import CLASS_LAST, FILE
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.example import IMAGE_ID
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.engine import Request
from llava_sp_jax.infer.vlm import VisionLanguageModel
from llava_sp_jax.models import build
from tests.conftest import ConfigMaker
from tests.convert import llama_cpp_side as theirs
from tests.convert.leaving import QUESTION, random_one, trained, write
from tests.convert.test_export_gguf import DECODERS, model
from tests.convert.test_gguf_vocabulary import PRE, made
from tests.data.six_tokenizers import texts
from tests.infer.tiny import random_model

pytest.importorskip("gguf")
IDS = (1, 7, 40, 3, 99, 12, 60, 5, 250, 31, 8, 2)
LOGITS = 2e-5  # of the largest: float32 sums in another order
# Of the largest value: llama.cpp has tables of float16 for the activations of tower and projector,
# and the tanh approximation of the projector's GELU.
TOKENS = 5e-3


def logits(ours: Loaded) -> np.ndarray:
  """Of the whole decoder, for IDS. -> [T, V]."""
  module = build.model(ours.config.model)

  @jax.jit
  def run(params: Any, tokens: Any) -> Any:
    positions = np.arange(len(IDS))[None]
    segments = np.full(tokens.shape, BRANCHES)
    variables = {"params": params}
    hidden: Any = module.apply(
      variables, tokens, positions, segments, None, None, None, method="extend"
    )
    return module.apply(variables, hidden[0], method="logits")

  params = unflatten_dict(ours.params(), sep="/")
  return np.asarray(run(params, np.asarray([IDS], np.int32))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_decoders(name: str, tmp_path: Path) -> None:
  folder = made("small_bpe", tmp_path)
  ours = model(folder, **DECODERS[name])
  export.export(ours, "gguf", tmp_path / "x")
  wanted = logits(ours)
  with theirs.opened(tmp_path / "x", logits_all=True) as llm:
    llm.eval(list(IDS))
    found = llm.scores[: len(IDS)].copy()
  difference = np.abs(found - wanted[:, : found.shape[1]]).max() / np.abs(wanted).max()
  assert difference <= LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE)
def test_ids_of_prompts(name: str, tmp_path: Path) -> None:
  folder = made(name, tmp_path)
  ours = Tokenizer(folder)
  export.export(model(folder), "gguf", tmp_path / "x")
  v1 = conversation.TEMPLATES["v1"]
  with theirs.opened(tmp_path / "x", vocab_only=True) as llm:
    for text in list(texts(random.Random(3)))[:30]:
      assert theirs.ids_of(llm, text, False) == list(ours.encode(text))
      runs = reading.question(text, 1, v1, ours)
      head, tail = f"{v1.system}{v1.before}", f"\n{text}{v1.after}"
      ids = [*theirs.ids_of(llm, head, True), IMAGE_ID, *theirs.ids_of(llm, tail, False)]
      assert ids == [i for run in runs for i in run.ids]


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tokens_of_square_pictures(tower: str, tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """With ggml-org/llama.cpp#25814, CLIP's tokens begin with the second and end with the class token."""
  changes = {"tower": {"variant": tower}, "lora": {"rank": 0}}
  ours = random_model(tiny_config("finetune", "none", model=changes, data={"row_length": 288}))
  out = write(ours, tmp_path / "x", "gguf")
  rng = np.random.default_rng(5)
  sizes = (24, 60, 13)
  pictures = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in sizes]
  vlm = VisionLanguageModel(ours)
  wanted = [np.asarray(vlm.encode_image(picture)) for picture in pictures]
  differences = []
  for file, cut in ((FILE, np.s_[:]), (CLASS_LAST, np.s_[1:])):
    if not (out / file).exists():
      continue
    with theirs.opened(out) as llm:
      handler = theirs.with_pictures(llm, out / file)
      for picture, tokens in zip(pictures, wanted, strict=True):
        found = theirs.encoded(llm, handler, picture)[: len(tokens[cut])]
        differences.append(np.abs(found - tokens[cut]).max() / np.abs(tokens).max())
  by_file = [max(differences[i : i + 3]) for i in range(0, len(differences), 3)]
  assert len(by_file) == (2 if tower == "clip" else 1)
  assert min(by_file) <= TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pooling", "cropping"])
def test_image_tokens_as_embeddings(variant: str, tiny_config: ConfigMaker, tmp_path: Path) -> None:
  ours = random_one(tiny_config, variant, False)
  out = write(ours, tmp_path / "x", "gguf")
  vlm, v1 = VisionLanguageModel(ours), conversation.TEMPLATES["v1"]
  rng = np.random.default_rng(5)
  pictures = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(8)]
  wanted = vlm.answers(
    [Request(QUESTION, (p,)) for p in pictures], llava.Generation(max_new_tokens=6)
  )
  with theirs.opened(out) as llm:
    for picture, answer in zip(pictures, wanted, strict=True):
      tokens = np.asarray(vlm.encode_image(picture))
      head, tail = f"{v1.system}{v1.before}", f"\n{QUESTION}{v1.after}"
      assert theirs.answer(llm, head, tokens, tail, 6) == answer.ids


def with_pictures(out: Path, file: str, asked: list[tuple[Path, str]]) -> list[str]:
  with theirs.opened(out) as llm:
    theirs.with_pictures(llm, out / file)
    urls = [f"data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}" for p, _ in asked]
    pairs = zip(urls, asked, strict=True)
    return [theirs.said(llm, url, question, 8).strip() for url, (_, question) in pairs]


def with_embeddings(
  run: Path, out: Path, template: conversation.Template, asked: list[tuple[Path, str]]
) -> list[str]:
  file = out / "tokens.npy"
  assert not cli.main(["encode", str(run), str(file), *(str(path) for path, _ in asked)])
  tokenizer = Tokenizer(run / "tokenizer")
  head = f"{template.system}{template.before}"
  with theirs.opened(out) as llm:
    found = [
      theirs.answer(llm, head, tokens, f"\n{question}{template.after}", 8)
      for tokens, (_, question) in zip(np.load(file), asked, strict=True)
    ]
  return [tokenizer.decode(ids).strip() for ids in found]


@pytest.mark.guard
@pytest.mark.parametrize("variant", ["none", "pooling"])
def test_a_hundred_answers_of_easy_vqa(variant: str, tmp_path: Path) -> None:
  """`none` with pictures, through the file that fits this llama.cpp; `pooling` with embeddings."""
  run, asked = trained(tmp_path, variant, 100)
  out = tmp_path / "x"
  assert not cli.main(["export", str(run), str(out), "--format", "gguf"])
  ours = llava.load(run)
  requests = [Request(question, (path,)) for path, question in asked]
  wanted = [a.text for a in ours.answers(requests, llava.Generation(max_new_tokens=8))]
  assert (len(wanted), len(set(wanted)) > 3) == (100, True)
  if variant == "none":
    found = {file: with_pictures(out, file, asked) for file in (FILE, CLASS_LAST)}
  else:
    template = conversation.TEMPLATES[ours.config.data.template]
    found = {"tokens.npy": with_embeddings(run, out, template, asked)}
  equal = {name: sum(map(str.__eq__, answers, wanted)) for name, answers in found.items()}
  print(f"\n{variant}: equal answers of 100: {equal}")
  assert max(equal.values()) >= 98
