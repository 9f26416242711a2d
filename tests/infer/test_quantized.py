"""Answers of quantized weights and of an int8 cache: those of dequantised twins, however asked."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.checkpoints import own_folders
from llava_sp_jax.convert import folding, quantized
from llava_sp_jax.convert.leaves import in_memory
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.infer import pretrained, vlm
from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.quantize import FORMATS, is_quantized
from llava_sp_jax.plan import traffic
from llava_sp_jax.tools import arguments, evaluate, generate
from tests.conftest import WIDE, ConfigMaker
from tests.infer.tiny import Oracle, random_model

NEW = 6
GENERATION = Generation(max_new_tokens=NEW)
# Formats that the default tests leave to the slow ones; every one costs an engine's programs.
WEIGHTS = [pytest.param("int8", marks=pytest.mark.slow), "int4"]


@pytest.fixture(scope="module")
def few(asked: list[Request]) -> list[Request]:
  """Questions of two lengths about two pictures, in few shapes."""
  return asked[:4]


@pytest.fixture(scope="module")
def wide(tiny_config: ConfigMaker) -> Pretrained:
  """A model whose sizes the blocks of int4 divide."""
  return random_model(tiny_config("finetune", model={**WIDE, "lora": {"rank": 0}}))


def with_formats(model: Pretrained, weights: str = "none", cache: str = "float") -> Pretrained:
  """The model with its kernels and its cache in other formats."""
  config = build.answering(model.config.model, weights, cache)
  expected = own_folders.abstract_leaves(config)
  leaves = in_memory(flatten_dict(model.params, sep="/"))
  leaves = quantized.quantize(leaves, expected, FORMATS[weights])
  params = unflatten_dict({p: leaf.read() for p, leaf in leaves.items()}, sep="/")
  return dataclasses.replace(
    model, config=dataclasses.replace(model.config, model=config), params=params
  )


def floats_of(model: Pretrained) -> Pretrained:
  """The twin: floats that the codes of its kernels stand for."""
  form = build.quantization(model.config.model)
  leaves = in_memory(flatten_dict(model.params, sep="/"))
  leaves = quantized.dequantize(leaves, form, "float32")
  config = build.unquantized(model.config.model)
  params = unflatten_dict({p: leaf.read() for p, leaf in leaves.items()}, sep="/")
  return dataclasses.replace(
    model, config=dataclasses.replace(model.config, model=config), params=params
  )


def ids(answers: Any) -> list[tuple[int, ...]]:
  found = list(answers)
  assert not [a.error for a in found if a.error]
  return [a.ids for a in found]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_answers_are_those_of_the_dequantized_model(
  wide: Pretrained, few: list[Request], weights: str
) -> None:
  model = with_formats(wide, weights)
  oracle = Oracle(floats_of(model))
  wanted = [oracle.greedy(request, NEW) for request in few]
  assert len(set(wanted)) > 2
  engine = Engine(model, 2, GENERATION)
  assert ids(engine.answer(few)) == wanted
  held = engine._programs._params["language_model"]["layers_0"]["q_proj"]
  assert set(held) == {name for name in held if is_quantized(f"x/{name}")}


@pytest.mark.guard
@pytest.mark.parametrize("product", ["int8", "fp8"])
def test_answers_with_products_in_codes_are_those_that_training_would_compute(
  wide: Pretrained, few: list[Request], product: str
) -> None:
  """Cached, unstacked, two at a time, beside the whole uncached model with the same products."""
  made = with_formats(wide, product)
  model = dataclasses.replace(made.config.model, frozen_matmul=product)
  made = dataclasses.replace(made, config=dataclasses.replace(made.config, model=model))
  oracle = Oracle(made)
  wanted = [oracle.greedy(request, NEW) for request in few]
  assert len(set(wanted)) > 2
  assert ids(Engine(made, 2, GENERATION).answer(few)) == wanted


class CachedOracle(Oracle):
  """Decodes alone, one token at a time, and rounds keys and values as an int8 cache does."""

  def __init__(self, model: Pretrained):
    super().__init__(model)
    self.prefill = jax.jit(self._prefill)
    self.step = jax.jit(self._step)

  def _prefill(self, params: Any, tokens: Any, slots: Any, tiles: Any, length: Any) -> Any:
    text, index = self.module.language_model, jnp.arange(tokens.shape[1])[None]
    segments = jnp.where(index < length, BRANCHES, 0)
    none = cache_lib.allocate(text.layers, 1, 0, text.kv_heads, text.head_dim, jnp.float32)
    variables = {"params": params}
    image = self.module.apply(variables, tiles, method="encode_image")
    return self._next(
      params, (tokens, index, segments, image, slots), none, tokens.shape[1], length
    )

  def _step(self, params: Any, token: Any, held: Any) -> Any:
    segments = jnp.full((1, 1), BRANCHES)
    return self._next(params, (token, held.length[:, None], segments, None, None), held, 0, 1)

  def _next(self, params: Any, inputs: Any, held: Any, room: int, count: Any) -> Any:
    """The logits after the new positions, and a float cache of values rounded as int8 has them."""
    variables = {"params": params}
    hidden, new = self.module.apply(variables, *inputs, held, method="extend")
    pair = [cache_lib.quantize(x, axis) for x, axis in ((new.keys, -2), (new.values, -1))]
    new = cache_lib.New(*(x.codes * x.scale for x in pair))
    held = cache_lib.widen(held, held.capacity + room + NEW if room else held.capacity)
    held = cache_lib.append(held, new, jnp.full((1,), count, jnp.int32))
    return self.module.apply(variables, hidden[0, count - 1], method="logits"), held

  def greedy(self, request: Request, new: int) -> tuple[int, ...]:
    (tokens, slots), tiles = self._prompt(request)
    fill = -(-len(tokens) // 64) * 64 - len(tokens)
    whole = np.pad(tokens, (0, fill))[None], np.pad(slots, (0, fill), constant_values=-1)[None]
    logits, held = self.prefill(self.model.params, *whole, tiles[None], len(tokens))
    found: tuple[int, ...] = ()
    while len(found) < new:
      token = int(logits.argmax())
      if token in self.prompts.stop_ids:
        break
      found = (*found, token)
      logits, held = self.step(self.model.params, jnp.full((1, 1), token), held)
    return found


@pytest.fixture(scope="module")
def wanted(model: Pretrained, few: list[Request]) -> list[tuple[int, ...]]:
  oracle = CachedOracle(model)
  return [oracle.greedy(request, NEW) for request in few]


@pytest.fixture(scope="module")
def cached(model: Pretrained) -> Pretrained:
  config = dataclasses.replace(model.config.model, cache="int8")
  return dataclasses.replace(model, config=dataclasses.replace(model.config, model=config))


@pytest.fixture(scope="module")
def engine(cached: Pretrained) -> Engine:
  return Engine(cached, 2, GENERATION)


def test_an_int8_cache_answers_like_its_twin(
  engine: Engine, few: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  """Rows are refilled, prefixes are shared and kept as floats, prompts differ in length."""
  assert len(set(wanted)) > 2
  assert ids(engine.answer(few)) == wanted
  state = engine.programs.state(2, 64)
  codes, scale = state.cache.keys[0]
  assert (codes.dtype, scale.dtype) == (jnp.int8, jnp.float32)
  text = engine.pretrained.config.model.language_model
  assert codes.shape == (2, text.kv_heads, text.head_dim, 64)


@pytest.mark.parametrize(
  ("weights", "cache"), [("none", "float"), ("none", "int8"), ("int8", "int8"), ("int4", "float")]
)
def test_the_bytes_of_a_step_are_those_of_the_arrays_it_reads(
  wide: Pretrained, weights: str, cache: str
) -> None:
  model = with_formats(wide, weights, cache)
  found = traffic.of(model.config.model)
  read = {
    path: x.nbytes
    for path, x in flatten_dict(model.params, sep="/").items()
    if path.startswith("language_model/") and "token_embed" not in path
  }
  assert found.weights == sum(read.values())
  kept = Engine(model, 2, GENERATION).programs.state(2, 64).cache
  held = sum(x.nbytes for x in jax.tree.leaves((kept.keys, kept.values)))
  assert found.step(2, 64) == found.weights + held


def test_a_decode_step_copies_nothing_of_the_codes(engine: Engine, few: list[Request]) -> None:
  list(engine.answer(few[:1]))
  programs = engine.programs
  for (name, *sizes), compiled in programs._table.items():
    if name != "decode":
      continue
    kept = programs.state(*sizes).cache
    held = (kept.keys[0].codes, kept.values[0].codes)
    shapes = "|".join({",".join(map(str, x.shape)) for x in held})
    text = compiled.as_text()
    assert re.search(rf"s8\[({shapes})\]", text), "the codes are there by these shapes"
    assert not re.findall(rf"= s8\[(?:{shapes})\]\S* copy\(", text)


LAYOUTS = {
  "one at a time": (1, EngineLayout()),
  "nothing shared": (4, EngineLayout(share=False)),
  "other buckets, no memory": (
    3,
    EngineLayout(prefix=48, suffix=24, capacity=96, prefix_bytes=1, feature_bytes=1, window=3),
  ),
}


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "one at a time")) for n in LAYOUTS]
)
def test_no_answer_of_an_int8_cache_depends_on_the_layout(
  name: str, cached: Pretrained, few: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  batch, layout = LAYOUTS[name]
  assert ids(Engine(cached, batch, GENERATION, layout=layout).answer(few)) == wanted


@pytest.mark.slow
def test_all_kinds_of_prompts_answer_like_their_twin(
  cached: Pretrained, asked: list[Request]
) -> None:
  """Several images, none, other system texts, and more requests than rows."""
  oracle = CachedOracle(cached)
  assert ids(Engine(cached, 4, GENERATION).answer(asked)) == [
    oracle.greedy(request, NEW) for request in asked
  ]


MESHES = [
  pytest.param((2, 2, 2), marks=pytest.mark.guard),
  pytest.param((4, 1, 1), marks=pytest.mark.slow),
  pytest.param((1, 4, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES)
def test_no_answer_depends_on_the_mesh(
  sizes: tuple[int, ...], wide: Pretrained, few: list[Request]
) -> None:
  """Weights of four bits and an int8 cache, over eight devices; as on one."""
  model = with_formats(wide, "int4", "int8")
  data, fsdp, tensor = sizes
  config = config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  mesh = mesh_lib.create(config, devices=jax.devices()[: data * fsdp * tensor])
  engine = Engine(model, 8, GENERATION, mesh=mesh)
  oracle = CachedOracle(floats_of(model))
  assert ids(engine.answer(few)) == [oracle.greedy(request, NEW) for request in few]
  codes = engine._programs._params["language_model"]["layers_0"]["q_proj"]["kernel_q"]
  assert codes.addressable_shards[0].data.size * fsdp * tensor == codes.size


@pytest.mark.slow
def test_beams_move_the_codes_of_an_int8_cache(cached: Pretrained, asked: list[Request]) -> None:
  """Beams of a row are those that it has alone."""
  settings = dataclasses.replace(GENERATION, num_beams=2)
  together = ids(Engine(cached, 3, settings).answer(asked[:4]))
  assert together == ids(Engine(cached, 1, settings).answer(asked[:4]))


def test_loading_folds_and_quantizes_the_float_checkpoint(run_folder: Path) -> None:
  """Codes are those of the folded floats in the files, whatever dtype is computed in."""
  source = folding.fold(own_folders.open_own(run_folder))
  found = pretrained.from_run(run_folder, dtype="bfloat16", weights="int8", cache="int8")
  model = found.config.model
  assert (model.quantize, model.cache, model.dtype, model.lora.rank) == (
    "int8", "int8", "bfloat16", 0,
  )  # fmt: skip
  form = FORMATS["int8"]
  assert form is not None
  flat = flatten_dict(found.params, sep="/")
  for path, leaf in source.leaves.items():
    stem = path.rpartition("/")[0]
    if path not in flat:
      layers = [form.quantize(kernel) for kernel in leaf.read()]
      for name in layers[0]:
        stacked = np.stack([layer[name] for layer in layers])
        np.testing.assert_array_equal(flat.pop(f"{stem}/{name}"), stacked)
    else:
      np.testing.assert_array_equal(flat.pop(path), leaf.read().astype(jnp.bfloat16))
  assert not flat


@pytest.mark.guard
def test_formats_are_options_of_load_and_of_commands(
  run_folder: Path, asked: list[Request], capsys: pytest.CaptureFixture
) -> None:
  loaded = vlm.load(run_folder, weights="int8", cache="int8", batch_size=1)
  (image,) = asked[0].images
  text = loaded.answer(asked[0].question, [image], generation=Generation(max_new_tokens=4))
  line = [f"--checkpoint={run_folder}", f"--image={image}", f"--question={asked[0].question}"]
  line += ["--max-new-tokens=4", "--weights=int8", "--cache=int8"]
  assert cli.main(["generate", *line]) == 0
  assert capsys.readouterr().out.strip() == text


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--weights=int3", "weights: unknown 'int3'; known: "),
    ("--cache=nf4", "cache: unknown 'nf4'; known: "),
    ("--weights=int4_64", "weights int4_64: blocks of 64 do not divide"),
  ],
)
def test_unknown_formats_are_one_line(
  run_folder: Path, option: str, message: str, capsys: pytest.CaptureFixture
) -> None:
  assert cli.main(["generate", f"--checkpoint={run_folder}", "--question=what?", option]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


@pytest.mark.parametrize("tool", [generate, evaluate])
def test_help_lists_the_rows_of_the_tables(tool: Any) -> None:
  text = re.sub(r"\s+", " ", tool.parser().format_help())
  for flag, table in (("weights", FORMATS), ("cache", cache_lib.FORMATS)):
    names = re.findall(r"\w+", arguments.FORMATS[flag].rpartition(":")[2].replace("(floats)", ""))
    assert names == list(table)
    assert arguments.FORMATS[flag] in text
