"""The decoder with real weights: SmolLM2-135M from a GGUF file, against transformers' own LLaMA.

Oracle: torch `LlamaForCausalLM` on the same dequantised weights, float32.
"""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.checkpoints import own_folders
from llava_sp_jax.convert import formats, gguf, gguf_tokenizer, settings
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.engine import Answer, Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build
from llava_sp_jax.training import optimizer

REPOSITORY = Path(__file__).parents[2]
RECIPE = "configs/easy_vqa_smollm2.py"
TOLERANCE = 2e-5  # of the largest logit: float32 sums over 30 layers in another order
QUESTIONS = (
  "What is the capital of France?",
  "Write one sentence about the sea.",
  "How many legs do 3 dogs and 14 birds have?",
  "What colour is a ripe banana?",
  "Translate to French: good morning",
)
NEW_TOKENS = 40
TEXTS = (
  "The quick brown fox jumps over the lazy dog, and it's 3.14159 in 2024!",
  "Naïve café – 日本語, emoji 🙂, tabs\tand\n\n  blanks  ",
  "def f(x):\n    return x ** 2  # 1234567890",
)


@pytest.fixture(scope="module")
def tensors(smollm2_file: Path) -> dict[str, np.ndarray]:
  return {name: tensor.array() for name, tensor in gguf.open_gguf(smollm2_file).items()}


@pytest.fixture(scope="module")
def tokenizer(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
  folder = tmp_path_factory.mktemp("smollm2")
  gguf_tokenizer.write_tokenizer(smollm2_file, folder)
  return Tokenizer(folder)


@pytest.fixture(scope="module")
def config(smollm2_file: Path) -> config_lib.Config:
  """Text only: the smallest tower and the plain projector stand beside the real decoder."""
  return config_lib.Config(
    model=config_lib.ModelConfig(
      tower=config_lib.TowerConfig(
        image_size=4, patch_size=4, width=4, layers=1, heads=1, mlp_width=4, select_layer=-1
      ),
      language_model=settings.language_model(gguf.config(smollm2_file), "gguf"),
      projector=config_lib.ProjectorConfig(variant="none"),
      dtype="float32",
      frozen_dtype="float32",
      remat="none",
    ),
    data=config_lib.DataConfig(template="smollm2"),
  )


@pytest.fixture(scope="module")
def params(config: config_lib.Config, smollm2_file: Path) -> dict:
  found = {p: leaf.read() for p, leaf in formats.open_checkpoint(smollm2_file).leaves.items()}
  expected = own_folders.abstract_leaves(config.model)
  rest = own_folders.random_leaves(config, {p: s for p, s in expected.items() if p not in found})
  return jax.device_put(unflatten_dict({**found, **rest}, sep="/"))


@pytest.fixture(scope="module")
def oracle(smollm2_file: Path, tensors: dict[str, np.ndarray]):
  torch = pytest.importorskip("torch")
  from transformers import LlamaConfig, LlamaForCausalLM

  sizes = {k: v for k, v in gguf.config(smollm2_file).items() if k != "model_type"}
  with torch.device("meta"):  # no random weights first
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=False))
  weights = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
  weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
  model.load_state_dict(weights, assign=True, strict=True)
  model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
  return model.eval()


def prompt_ids(question: str, tokenizer: Tokenizer) -> list[int]:
  pieces = conversation.prompt(question, conversation.TEMPLATES["smollm2"])
  return [i for run in reading.tokenize(pieces, tokenizer) for i in run.ids]


def test_sizes(config: config_lib.Config) -> None:
  text = config.model.language_model
  assert (text.vocab_size, text.width, text.layers, text.mlp_width) == (49152, 576, 30, 1536)
  assert (text.heads, text.kv_heads, text.head_dim) == (9, 3, 64)
  assert (text.rope_theta, text.norm_eps, text.tie_embeddings) == (1e5, 1e-5, True)
  assert build.parameter_counts(config.model)["language_model"] == 134_515_008


@pytest.mark.guard
def test_logits_equal_transformers(config, params, tokenizer, oracle) -> None:
  import torch

  text = " ".join(TEXTS) + " " + " ".join(QUESTIONS)
  ids = np.asarray([tokenizer.encode(text)])
  module = build.model(config.model)

  @jax.jit
  def logits(params, tokens):
    positions = np.arange(tokens.shape[1])[None]
    segments = np.full(tokens.shape, BRANCHES)
    variables = {"params": params}
    hidden, _ = module.apply(
      variables, tokens, positions, segments, None, None, None, method="extend"
    )
    return module.apply(variables, hidden, method="logits")

  ours = np.asarray(logits(params, ids))
  with torch.no_grad():
    theirs = oracle(torch.from_numpy(ids)).logits.numpy()
  difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
  print(f"\nlargest difference {difference:.2e} of the largest logit, {ids.shape[1]} tokens")
  assert difference <= TOLERANCE


@pytest.fixture(scope="module")
def answers(config, params, tokenizer) -> list[Answer]:
  engine = Engine(
    Pretrained(config, params, tokenizer), len(QUESTIONS), Generation(max_new_tokens=NEW_TOKENS)
  )
  return list(engine.answer(Request(q) for q in QUESTIONS))


@pytest.mark.guard
def test_every_token_is_the_one_that_transformers_prefers(answers, tokenizer, oracle) -> None:
  """Greedy text, checked in one pass a question: each token is torch's best after those before."""
  import torch

  for question, answer in zip(QUESTIONS, answers, strict=True):
    print(f"\n{question} -> {answer.text}")
    ended = len(answer.ids) < NEW_TOKENS
    ids = [*answer.ids, *tokenizer.encode("<|im_end|>")] if ended else list(answer.ids)
    prompt = prompt_ids(question, tokenizer)
    with torch.no_grad():
      best = oracle(torch.tensor([prompt + ids])).logits[0].argmax(-1).tolist()
    assert best[len(prompt) - 1 : -1] == ids
  assert "Paris" in answers[0].text  # the weights mean something


@pytest.mark.slow  # follows from the test above
def test_greedy_text_equals_transformers_generate(answers, tokenizer, oracle) -> None:
  import torch

  stop = tokenizer.encode("<|im_end|>")[0]
  for question, answer in zip(QUESTIONS, answers, strict=True):
    prompt = torch.tensor([prompt_ids(question, tokenizer)])
    with torch.no_grad():
      ids = oracle.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
      )[0, prompt.shape[1] :].tolist()
    theirs = ids[: ids.index(stop)] if stop in ids else ids
    assert list(answer.ids) == theirs


def test_tokenizer(tokenizer: Tokenizer) -> None:
  assert len(tokenizer) == 49152
  assert tokenizer.bos_id is None
  assert len(tokenizer.encode("31415")) == 5  # every digit is a token
  assert [tokenizer.decode([i]) for i in tokenizer.encode(" is 42")] == [" is", " ", "4", "2"]
  assert tokenizer.encode("<|im_start|>") == (1,)
  assert tokenizer.encode("<|im_end|>\n") == (2, tokenizer.encode("\n")[0])
  assert tokenizer.encode("<|endoftext|>") == (0,)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer: Tokenizer, text: str) -> None:
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_agrees_with_the_merges(smollm2_file: Path, tokenizer: Tokenizer) -> None:
  """A byte-pair encoder written out here gives the same ids for each word."""
  values = gguf.open_llama(smollm2_file).values
  vocabulary = {t.decode(): i for i, t in enumerate(values["tokenizer.ggml.tokens"])}
  merges = [merge.decode() for merge in values["tokenizer.ggml.merges"]]
  ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
  for word in ("rectangle", " rectangle", " triangle", " teal", " extraordinarily", "assistant"):
    parts = list(word.replace(" ", "Ġ"))
    while pairs := [p for p in itertools.pairwise(parts) if p in ranks]:
      best = min(pairs, key=ranks.__getitem__)
      at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
      parts[at : at + 2] = ["".join(best)]
    assert tokenizer.encode(word) == tuple(vocabulary[p] for p in parts)


def test_template_is_the_models_own(smollm2_file: Path, tokenizer: Tokenizer) -> None:
  """`TEMPLATES["smollm2"]`, piece by piece, gives the ids of the GGUF's chat template."""
  jinja2 = pytest.importorskip("jinja2")
  source = gguf.open_llama(smollm2_file).values["tokenizer.chat_template"].decode()
  rendered = jinja2.Template(source)
  turns = [("what is the blue shape?", "circle"), ("how many are 12 and 7?", "19, I think.")]
  messages = []
  for question, reply in turns:
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
  template = conversation.TEMPLATES["smollm2"]
  pieces = conversation.chain(turns, template)
  ours = [i for run in reading.tokenize(pieces, tokenizer) for i in run.ids]
  assert ours == list(tokenizer.encode(rendered.render(messages=messages)))
  system = template.system.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
  spoken = [{"role": "system", "content": system}, *messages]
  assert ours == list(tokenizer.encode(rendered.render(messages=spoken)))
  asked = rendered.render(messages=messages[:1], add_generation_prompt=True)
  assert prompt_ids(turns[0][0], tokenizer) == list(tokenizer.encode(asked))


def recipe(options: str) -> config_lib.Config:
  values = runpy.run_path(str(REPOSITORY / RECIPE))["get_config"](options)
  return config_lib.from_dict(values.to_dict())


@pytest.mark.parametrize("variant", ["none", "pooling", "cropping"])
def test_recipe_has_the_sizes_of_the_file(smollm2_file: Path, variant: str) -> None:
  ours = [
    recipe(f"variant={variant},stage=pretrain"),
    recipe(f"variant={variant},stage=finetune,init=somewhere"),
  ]
  for stage in ours:
    assert stage.model.language_model == settings.language_model(gguf.config(smollm2_file), "gguf")
    build.model(stage.model)
    assert build.image_token_count(stage.model) == (36 if variant == "none" else 42)
  assert ours[0].init.language_model == str(smollm2_file)
  trained = {
    p.split("/")[0]
    for p in own_folders.abstract_leaves(ours[0].model)
    if optimizer.group_of(p, ours[0].optimizer.stage) != optimizer.FROZEN
  }
  assert trained == {"vision_tower", "projector"}
