"""A name of the hub goes wherever a folder goes, out of its local cache; folders on folders."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import initial
from llava_sp_jax.convert import export, formats, places, torch_io, torch_write
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.infer import pretrained
from tests.convert.test_formats import GOLDEN, change_json
from tests.convert.test_round_trip import TEXT, source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """An empty cache of the hub that is asked without a network."""
  from huggingface_hub import constants

  cache = tmp_path / "hub"
  cache.mkdir()
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.chdir(tmp_path)
  return cache


def keep(hub: Path, name: str, folder: Path) -> Path:
  """Puts a folder where the cache has the repository `name`."""
  repository = hub / f"models--{name.replace('/', '--')}"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs/main").write_text(COMMIT)
  return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))


def test_names_of_the_hub(hub: Path) -> None:
  snapshot = keep(hub, "org/clip", GOLDEN / "clip-vit-tiny")
  for name in ("hf:org/clip", "org/clip", f"hf:org/clip@{COMMIT}", "org/clip@main"):
    assert places.local(name).resolve() == snapshot.resolve(), name
  assert formats.open_checkpoint("hf:org/clip").format == "vision_tower"
  with pytest.raises(FormatError, match=r"org/gone: no such folder, and not fetched from the hub"):
    places.local("org/gone")
  with pytest.raises(FormatError, match=r"hf:clip: expected hf:organization/name"):
    places.local("hf:clip")


def test_a_folder_comes_before_a_name_of_the_hub(hub: Path) -> None:
  keep(hub, "org/clip", GOLDEN / "clip-vit-tiny")
  Path("org/clip").mkdir(parents=True)
  assert places.local("org/clip") == Path("org/clip")
  assert places.local("hf:org/clip") != Path("org/clip")
  assert places.local("/no/such/folder") == Path("/no/such/folder")


def test_base_and_tower_are_names_of_the_hub(hub: Path, tmp_path: Path) -> None:
  keep(hub, "org/llm", GOLDEN / "base-llm")
  keep(hub, "org/clip", GOLDEN / "clip-vit-tiny")
  folder = Path(shutil.copytree(GOLDEN / "pooling/llava-lora", tmp_path / "alone/pooling"))
  change_json(folder / "adapter_config.json", base_model_name_or_path="org/llm")
  change_json(folder / "config.json", mm_vision_tower="org/clip")
  found = formats.open_checkpoint(folder)
  assert (found.base, found.tower) == ("org/llm", "org/clip")
  given = formats.Options(base="hf:org/llm", tower="hf:org/clip")
  assert formats.open_checkpoint(folder, given).leaves.keys() == found.leaves.keys()


def test_a_whole_model_of_the_hub_answers(hub: Path, tmp_path: Path) -> None:
  rows = dataclasses.replace(TEXT, vocab_size=512)  # as many as the tokenizer has
  model = source("none", rank=0, language_model=rows)
  ours = dataclasses.replace(model, tokenizer=GOLDEN / "base-llm")
  export.export(ours, "llava", tmp_path / "llava")
  keep(hub, "org/llava", tmp_path / "llava")
  loaded = pretrained.from_any("hf:org/llava", formats.Options(select_layer=-1))
  assert len(loaded.tokenizer) == 512


def beginning(language_model: str, vision_tower: str = "") -> Any:
  """Parameters of a model of the golden sizes before its training."""
  given = formats.Options(base=str(GOLDEN / "base-llm"), tower=str(GOLDEN / "clip-vit-tiny"))
  model = formats.open_checkpoint(GOLDEN / "baseline/llava-lora", given).config.model
  init = config_lib.InitConfig(language_model=language_model, vision_tower=vision_tower)
  return flatten_dict(initial.initial_params(config_lib.Config(model=model, init=init)), sep="/")


def test_training_begins_from_names_of_the_hub(hub: Path) -> None:
  for name in ("base-llm", "clip-vit-tiny"):
    keep(hub, f"org/{name}", GOLDEN / name)
  found = beginning("org/base-llm", "hf:org/clip-vit-tiny")
  for name in ("base-llm", "clip-vit-tiny"):
    for path, leaf in formats.open_checkpoint(GOLDEN / name).leaves.items():
      np.testing.assert_array_equal(found[path], leaf.read(), err_msg=path)


def test_training_begins_from_a_folder_with_an_unknown_key(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """The refusal names the command that passes it over; what that writes is taken."""
  folder, out = Path(shutil.copytree(GOLDEN / "base-llm", tmp_path / "llm")), tmp_path / "ours"
  change_json(folder / "config.json", novel_scaling=2)
  with pytest.raises(FormatError, match=r"unknown key novel_scaling: .* convert --allow-unknown"):
    beginning(str(folder))
  assert cli.main(["convert", str(folder), str(out), "--allow-unknown"]) == 0
  found = beginning(str(out))
  path = "language_model/final_norm/scale"
  wanted = formats.open_checkpoint(GOLDEN / "base-llm").leaves[path].read()
  np.testing.assert_array_equal(found[path], wanted)


# ---- a LoRA folder on a merged LLaVA, and towers that learned ---------------------------------------


def exported(folder: Path, variant: str, factor: float, name: str = "llava", rank: int = 0) -> Path:
  """A random model with all its values times `factor`."""
  model = source(variant, rank=rank)
  for leaf in model.leaves.values():
    leaf.read()[...] *= factor
  export.export(model, name, folder)
  return folder


def rewrite(folder: Path, change: Any) -> None:
  """Changes the tensors of a folder's non_lora_trainables.bin."""
  path = folder / "non_lora_trainables.bin"
  kept = {name: np.array(t.array()) for name, t in torch_io.open_file(path).items()}
  change(kept)
  tensors = [torch_io.Tensor(n, "", a.shape, a.dtype, lambda a=a: a) for n, a in kept.items()]
  torch_write.save_bin(tensors, path)


def value(model: Loaded, path: str) -> np.ndarray:
  return model.leaves[path].read()


def test_adapters_over_a_merged_llava(tmp_path: Path) -> None:
  """Decoder, tower, and what the LoRA folder lacks come from the base; the rest stands on top."""
  base = exported(tmp_path / "llava-v1.5-7b", "pooling", 0.5)
  task = exported(tmp_path / "task-lora", "pooling", 1.0, "llava_lora", rank=2)
  change_json(task / "config.json", _name_or_path=base.name, mm_vision_tower=str(base / "clip-vit"))
  change_json(task / "adapter_config.json", base_model_name_or_path=base.name)
  rewrite(task, lambda kept: [kept.pop(n) for n in list(kept) if "mm_projector" not in n])
  opened = formats.open_checkpoint(task, formats.Options(select_layer=-1))
  under, over = source("pooling", rank=0), source("pooling", rank=2)
  for path in opened.leaves:
    if path.startswith("projector/fc") or "/lora_" in path:
      wanted = value(over, path)
    else:
      wanted = value(under, path) * np.float32(0.5)
    np.testing.assert_array_equal(value(opened, path), wanted, err_msg=path)
  assert opened.config.model.projector.variant == "pooling"
  assert opened.base == base.name


@pytest.mark.parametrize("part", ["", "pre_layrnorm"])
def test_tower_weights_that_learned_come_before_the_tower_s_folder(
  tmp_path: Path, part: str
) -> None:
  folder = exported(tmp_path / "lora", "none", 1.0, "llava_lora", rank=2)
  tower = torch_io.open_named(folder / "clip-vit", torch_io.WEIGHTS)

  def add(kept: dict[str, np.ndarray]) -> None:
    for name, tensor in tower.items():
      if part in name:
        kept[f"base_model.model.model.vision_tower.vision_tower.{name}"] = 2 * tensor.array()

  rewrite(folder, add)
  opened = formats.open_checkpoint(folder, formats.Options(select_layer=-1))
  ours = source("none")
  for path in (p for p in ours.leaves if p.startswith("vision_tower/")):
    factor = 2 if not part or "pre_norm" in path else 1
    np.testing.assert_array_equal(value(opened, path), factor * value(ours, path), err_msg=path)


def test_a_base_that_is_none(tmp_path: Path) -> None:
  folder = exported(tmp_path / "lora", "none", 1.0, "llava_lora", rank=2)
  given = formats.Options(base=str(folder / "clip-vit"))
  with pytest.raises(FormatError, match=r"expected the base of .*, a language model or a merged"):
    formats.open_checkpoint(folder, given)
