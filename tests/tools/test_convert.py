"""convert, inspect, export and merge from the command line, on what others wrote."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import opening, runs, stream, writing
from llava_sp_jax.convert import export, folding, formats, leaves
from llava_sp_jax.progress import Progress
from tests.convert.test_formats import GOLDEN
from tests.convert.test_gguf import write as write_gguf
from tests.convert.test_round_trip import TEXT, assert_same, source, without_image_row

LORA = [
  str(GOLDEN / "cropping/llava-lora"),
  "--base",
  str(GOLDEN / "base-llm"),
  "--tower",
  str(GOLDEN / "clip-vit-tiny"),
]


def llava_sp(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
  """What a command that succeeds prints."""
  status = cli.main([str(a) for a in arguments])
  printed = capsys.readouterr()
  assert status == 0, printed.err
  return printed.out


@pytest.mark.guard
def test_a_published_adapter_in_and_out(
  tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
  ours, merged = tmp_path / "ours", tmp_path / "merged"
  wanted = formats.open_checkpoint(LORA[0], formats.Options(base=LORA[2], tower=LORA[4]))
  assert "variant cropping" in llava_sp(capsys, "convert", LORA[0], ours, *LORA[1:])
  assert_same(wanted, opening.open_any(ours, formats.Options()))

  said = llava_sp(capsys, "inspect", ours, "--fingerprint")
  assert (
    "projector       variant cropping, views (4, 8, 12, 16, 20, 24), token width 8, 582 tokens"
    in said
  )
  assert "adapters        rank 4, alpha 8" in said
  assert f"fingerprint {opening.base_fingerprint(wanted)}" in said
  counts = {line.split()[0]: line.split()[1] for line in said.splitlines()[-3:]}
  for part in formats.PARTS:
    numbers = sum(
      np.prod(leaf.shape) for leaf in wanted.leaves.values() if leaf.path.startswith(part)
    )
    assert counts[part] == f"{int(numbers):,}"

  said = llava_sp(capsys, "merge", ours, merged, "--verify")
  assert "adapters of rank 4 folded" in said
  assert "the same at 100.0% of the positions" in said

  llava_sp(capsys, "export", ours, tmp_path / "lora", "--format", "llava_lora")
  assert_same(wanted, formats.open_checkpoint(tmp_path / "lora"))
  llava_sp(capsys, "export", merged, tmp_path / "llava", "--format", "llava")
  assert_same(
    opening.open_any(merged, formats.Options()), formats.open_checkpoint(tmp_path / "llava")
  )
  assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_converted_folder_is_moved_and_stands_alone(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """What it was made from is gone: its config names nothing of it, and its export brings its base."""
  here = tmp_path / "here"
  for name in ("base-llm", "clip-vit-tiny", "cropping/llava-lora"):
    shutil.copytree(GOLDEN / name, here / name)
  names = ["--base", here / "base-llm", "--tower", here / "clip-vit-tiny"]
  llava_sp(capsys, "convert", here / "cropping/llava-lora", here / "ours", *names)
  wanted = formats.open_checkpoint(LORA[0], formats.Options(base=LORA[2], tower=LORA[4]))
  moved = tmp_path / "there"
  (here / "ours").rename(moved)
  shutil.rmtree(here)
  assert str(tmp_path) not in (moved / "config.json").read_text()
  assert runs.read_config(moved).data.tokenizer == "tokenizer"
  llava_sp(capsys, "export", moved, tmp_path / "lora", "--format", "llava_lora")
  given = formats.Options(select_layer=-1)
  assert_same(wanted, formats.open_checkpoint(tmp_path / "lora", given))


def test_a_template_that_the_tokenizer_cannot_end(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Refused before a byte is written, with the templates that fit."""
  out = tmp_path / "ours"
  wanted = [str(a) for a in ("convert", LORA[0], out, *LORA[1:], "--template", "mpt")]
  assert cli.main(wanted) == 1
  said = capsys.readouterr().err
  assert "template 'mpt': replies end with '<|im_end|>'" in said
  assert "that fit: v1, vicuna_v1" in said
  assert "name one with --template" in said
  assert not out.exists()


def subclasses(kind: type) -> list[type]:
  return [kind, *(c for child in kind.__subclasses__() for c in subclasses(child))]


def test_inspect_reads_no_values(
  tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  """Neither of a torch folder, nor of ours, nor of the base of a run; only a fingerprint needs them."""
  ours, run = tmp_path / "ours", tmp_path / "run"
  whole = source("pooling")
  writing.write(whole, ours)
  init = config_lib.InitConfig(checkpoint=str(ours))
  runs.write_config(run, dataclasses.replace(runs.read_config(ours), init=init))
  (run / "checkpoints").mkdir()
  trained = {p: x for p, x in whole.leaves.items() if p.startswith("projector/") or "/lora_" in p}
  stream.write(run, trained, {"fingerprint": "another"}, Progress(1, "GB"))
  for kind in subclasses(leaves.Leaf):
    monkeypatch.setattr(kind, "read", lambda self, index=None: pytest.fail(f"{self.path} is read"))
  for given in (LORA, [str(ours)], [str(run)]):
    assert "projector       variant " in llava_sp(capsys, "inspect", *given)
    with pytest.raises(pytest.fail.Exception, match="is read"):
      cli.main(["inspect", *given, "--fingerprint"])


def test_a_merge_that_changes_the_answers_is_an_error(
  tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(folding.Folded, "read", lambda self, index=None: self.kernel.read(index))
  export.export(source("pooling"), "llava_lora", tmp_path / "lora")
  assert cli.main(["merge", str(tmp_path / "lora"), str(tmp_path / "out"), "--verify"]) == 1
  assert "out: does not compute what it was merged from: logits of" in capsys.readouterr().err


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  write_gguf(tmp_path / "x.gguf")
  llava_sp(capsys, "convert", tmp_path / "x.gguf", tmp_path / "ours")
  assert_same(
    formats.open_checkpoint(tmp_path / "x.gguf"),
    opening.open_any(tmp_path / "ours", formats.Options()),
  )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
def test_a_peft_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  """Written by PEFT itself on our export of a language model."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from transformers import AutoModelForCausalLM

  from tests.convert.test_exports_in_torch import TOKENS, close, run, scaled

  export.export(scaled(source("none", rank=0)), "language_model", tmp_path / "base")
  model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
  recipe = peft.LoraConfig(
    r=2,
    lora_alpha=5,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    init_lora_weights=False,
  )
  adapted = peft.get_peft_model(model, recipe).eval()
  adapted.save_pretrained(tmp_path / "adapter")
  llava_sp(capsys, "convert", tmp_path / "adapter", tmp_path / "ours", "--base", tmp_path / "base")
  opened = opening.open_any(tmp_path / "ours", formats.Options())
  lora = opened.config.model.lora
  assert (lora.rank, lora.alpha) == (2, 5.0)
  whole = source("none", lora=opened.config.model.lora)
  whole = dataclasses.replace(whole, leaves={**whole.leaves, **opened.leaves})
  close(run(whole, TOKENS), adapted(torch.tensor(TOKENS)).logits[0])


def test_llava_hf_under_its_newer_names(tmp_path: Path) -> None:
  """transformers >= 4.52 has `model.` before the parts and the head outside."""
  ours = source("none", rank=0)
  export.export(ours, "llava_hf", tmp_path / "x")
  path = tmp_path / "x/model.safetensors"
  renamed = {}
  for name, array in safetensors.numpy.load_file(path).items():
    new = name.replace("language_model.lm_head", "lm_head")
    new = new.replace("language_model.model.", "language_model.")
    renamed[new if new.startswith("lm_head") else f"model.{new}"] = array
  assert "model.language_model.embed_tokens.weight" in renamed
  safetensors.numpy.save_file(renamed, path)
  assert TEXT.vocab_size + 1 == renamed["lm_head.weight"].shape[0]  # and one for the image
  opened = formats.open_checkpoint(tmp_path / "x", formats.Options(select_layer=-1))
  assert_same(ours, without_image_row(opened))
