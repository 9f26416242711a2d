"""Image tokens for a server of the decoder, and programs that run without this package."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import llava_sp_jax as llava
from llava_sp_jax import cli
from llava_sp_jax.convert import export, export_stablehlo, formats, image_embeds, torch_io
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import anyres
from llava_sp_jax.infer.engine import Request
from llava_sp_jax.models import build
from tests.conftest import ConfigMaker
from tests.convert.leaving import QUESTION, pictures, random_one, write
from tests.convert.test_round_trip import source
from tests.infer.tiny import Oracle

# Image tokens for vLLM.


def test_one_picture_is_no_two_dimensional_tensor(tmp_path: Path) -> None:
  """vLLM would read [N, D] as N pictures of one token each."""
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 7, 4)).astype(ml_dtypes.bfloat16)
  short = a[:5]
  for name, given, shape in (("one", [a], (1, 7, 4)), ("two", [a, b], (2, 7, 4))):
    image_embeds.write(given, tmp_path / f"{name}.pt")
    found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert found.shape == shape
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float().numpy(), np.stack(given).astype(np.float32))
  image_embeds.write([a, short], tmp_path / "tiles.pt")  # anyres: of different lengths
  found = torch.load(tmp_path / "tiles.pt", weights_only=True)
  assert [tuple(part.shape) for part in found] == [(7, 4), (5, 4)]
  image_embeds.write([a, short], tmp_path / "x.jsonl")
  parts = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
  for part, tokens in zip(parts, (a, short), strict=True):
    assert part["type"] == "image_embeds"
    file = io.BytesIO(base64.b64decode(part["image_embeds"]))
    found = torch.load(file, weights_only=True)
    np.testing.assert_array_equal(found.float().numpy(), tokens.astype(np.float32))
  for wrong in ([], [a[0]], [a, b[:, :3]], [np.stack([a, b])]):
    with pytest.raises(FormatError, match=r"expected the tokens \[N, D\]"):
      image_embeds.write(wrong, tmp_path / "wrong.pt")
  with pytest.raises(FormatError, match=r"ends with .pt, .jsonl, .npy, .safetensors"):
    image_embeds.write([a], tmp_path / "x.bin")


def test_arrays_of_image_tokens(tmp_path: Path) -> None:
  """For llama.cpp, which is given them picture by picture."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 7, 4)).astype(np.float32)
  image_embeds.write([a, b], tmp_path / "x.npy")
  np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), [a, b])
  rounded = [x.astype(ml_dtypes.bfloat16) for x in (a, b[:5])]
  image_embeds.write(rounded, tmp_path / "x.safetensors")
  found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
  assert list(found) == ["0", "1"]
  for name, tokens in zip("01", rounded, strict=True):
    np.testing.assert_array_equal(found[name], tokens)
  with pytest.raises(FormatError, match=r"\[5, 7\] tokens.*name a .safetensors"):
    image_embeds.write([a, b[:5]], tmp_path / "y.npy")
  with pytest.raises(FormatError, match=r"numpy has no bfloat16; take --dtype float32"):
    image_embeds.write(rounded[:1], tmp_path / "y.npy")


def test_the_folder_of_vllm_is_not_taken_for_a_whole_model(tmp_path: Path) -> None:
  """Read as a LLaVA, it would answer without its spatial tokens."""
  export.export(source("cropping", rank=0), "vllm", tmp_path / "x")
  with pytest.raises(FormatError, match=r"missing model\.conv_4\.weight"):
    formats.open_checkpoint(tmp_path / "x")
  opened = torch_io.open_named(tmp_path / "x", torch_io.WEIGHTS)
  assert {name.split(".")[0] for name in opened} == {
    "language_model",
    "vision_tower",
    "multi_modal_projector",
  }


@pytest.mark.guard
def test_a_server_of_the_decoder_answers_as_ours(
  run_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
  """transformers' decoder, given the tokens that `encode` wrote where the prompt has `<image>`."""
  torch = pytest.importorskip("torch")
  from transformers import AutoTokenizer, LlavaForConditionalGeneration

  paths = [tiny_data / "images" / f"{i}.png" for i in range(3)]
  assert not cli.main(["export", str(run_folder), str(tmp_path / "x"), "--format", "vllm"])
  assert not cli.main(["encode", str(run_folder), str(tmp_path / "x.pt"), *map(str, paths)])
  tokens = torch.load(tmp_path / "x.pt", weights_only=True)
  assert tokens.shape == (3, 42, 32)
  model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
  ours = llava.load(run_folder)
  generation = llava.Generation(max_new_tokens=6)
  for path, image in zip(paths, tokens, strict=True):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    (ids,) = tokenizer(
      text.replace("<image>", "<image>" * len(image)), add_special_tokens=False, return_tensors="pt"
    ).input_ids
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[ids == model.config.image_token_id] = image
    with torch.no_grad():
      found = model.generate(inputs_embeds=embeds[None], max_new_tokens=6)
    (answer,) = ours.answers([Request(QUESTION, (path,))], generation)
    stops = set(model.generation_config.eos_token_id)
    made = found[0].tolist()
    end = next((i for i, token in enumerate(made) if token in stops), len(made))
    assert tuple(made[:end]) == answer.ids


# Programs of StableHLO.

RUN = """
import json, sys
sys.modules["llava_sp_jax"] = sys.modules["flax"] = None
import jax, numpy as np, safetensors.numpy
from pathlib import Path

folder, given = Path(sys.argv[1]), np.load(sys.argv[2])
said = json.loads((folder / "programs.json").read_text())
weights = safetensors.numpy.load_file(folder / "model.safetensors")

def call(name, inputs):
  program = jax.export.deserialize((folder / f"{name}.jax").read_bytes())
  assert program.platforms == tuple(said["platforms"])
  return program.call({path: weights[path] for path in said["programs"][name]["parameters"]}, inputs)

image = call("encode", {"tiles": given["tiles"]})["image"]
image = np.asarray(image).reshape(1, -1, image.shape[-1])
if said["image_newline"]:
  image = np.concatenate([image, weights["projector/image_newline"][None, None]], axis=1)
tokens, slots = given["tokens"], given["slots"]
room = next(n for n in sorted(int(name[8:]) for name in said["programs"] if "prefill" in name)
            if n >= len(tokens))
padded = np.zeros((1, room), np.int32)
padded[0, : len(tokens)] = tokens
places = np.full((1, room), -1, np.int32)
places[0, : len(tokens)] = slots
length = np.asarray([len(tokens)], np.int32)
found = call(f"prefill_{room}", {"tokens": padded, "slots": places, "length": length, "image": image})
logits, ids = [], []
for _ in range(int(given["new"])):
  logits.append(np.asarray(found.pop("logits")[0]))
  ids.append(int(logits[-1].argmax()))
  found = call("decode", {**found, "token": np.asarray(ids[-1:], np.int32)})
np.savez(sys.argv[3], logits=np.stack(logits), ids=ids)
"""


@pytest.mark.guard
@pytest.mark.parametrize(("variant", "tiles"), [("pooling", False), ("cropping", True)])
def test_programs_answer_as_ours_without_this_package(
  variant: str, tiles: bool, tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  pytest.importorskip("flatbuffers")
  ours = random_one(tiny_config, variant, tiles)
  folder = write(ours, tmp_path / "x", "stablehlo")
  picture, file = pictures(3)[2], tmp_path / "a.png"
  picture.save(file)
  oracle, request = Oracle(ours), Request(QUESTION, (file,))
  (piece,) = oracle.prompts(request).pieces
  reader = anyres.Reader(ours.config.data, anyres.Tile(*build.tile_shape(ours.config.model)))
  np.savez(
    tmp_path / "given.npz",
    tiles=reader(picture).tiles,
    tokens=piece.tokens,
    slots=piece.slots,
    new=4,
  )
  (tmp_path / "run.py").write_text(RUN)
  subprocess.run(
    [sys.executable, "run.py", str(folder), "given.npz", "found.npz"],
    cwd=tmp_path,
    check=True,
    capture_output=True,
    text=True,
  )
  found = np.load(tmp_path / "found.npz")
  ids: tuple[int, ...] = ()
  for logits, token in zip(found["logits"], found["ids"], strict=True):
    np.testing.assert_allclose(logits, oracle.logits(request, ids), atol=1e-5, rtol=1e-5)
    ids = (*ids, int(token))
  stop = min((i for i, t in enumerate(ids) if t in oracle.prompts.stop_ids), default=len(ids))
  assert ids[:stop] == oracle.greedy(request, 4)


def test_what_writes_programs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  with pytest.raises(FormatError, match="with flatbuffers; pip install it"):
    export.export(source("pooling", rank=0), "stablehlo", tmp_path / "x")
  assert not (tmp_path / "x").exists()


@pytest.mark.guard
def test_programs_say_what_they_read_and_return(tmp_path: Path) -> None:
  """And are there for every platform, with weights outside, layer by layer."""
  pytest.importorskip("flatbuffers")
  ours = source("pooling", rank=0)
  export.export(ours, "stablehlo", tmp_path / "x")
  said = json.loads((tmp_path / "x/programs.json").read_text())
  assert set(said["programs"]) == {
    "encode",
    "decode",
    *(f"prefill_{n}" for n in (512, 1024, 1536, 2048)),
  }
  opened = torch_io.open_named(tmp_path / "x", torch_io.WEIGHTS)
  every = {path for program in said["programs"].values() for path in program["parameters"]}
  assert every == set(opened)
  assert "language_model/layers_1/q_proj/kernel" in opened
  kernel = ours.leaves["language_model/layers/q_proj/kernel"].read()[1]
  np.testing.assert_array_equal(opened["language_model/layers_1/q_proj/kernel"].array(), kernel)
  for name, program in said["programs"].items():
    exported = jax.export.deserialize((tmp_path / f"x/{name}.jax").read_bytes())
    assert exported.platforms == export_stablehlo.PLATFORMS
    assert len(exported.in_avals) == len(program["parameters"]) + len(program["inputs"])
    sizes = [tuple(map(str, x["shape"])) for x in program["inputs"]]
    inputs = exported.in_avals[len(program["parameters"]) :]
    assert [tuple(map(str, x.shape)) for x in inputs] == sizes
    assert [str(x.dtype) for x in inputs] == [x["dtype"] for x in program["inputs"]]
    assert (tmp_path / f"x/{name}.jax").stat().st_size < 200_000  # no weights in it
  assert {x["name"] for x in said["programs"]["decode"]["outputs"]} >= {"logits", "keys_001"}
