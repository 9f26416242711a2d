"""The data check: each kind of damage is found, counted once and shown; sound data passes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.data import check, pipeline, validation_split
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import IMAGE_SIZE, ConfigMaker
from tests.data.test_pipeline import TILE

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")
TALK = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a circle"}]
TEXT = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a circle"}]
OPEN = [{"from": "human", "value": "<image>\nwhat is it?"}]
LONG = [
  {"from": "human", "value": "<image>\nwhat is it?"},
  {"from": "gpt", "value": "round " * 400},
]
LATE = [{"from": "human", "value": "what? " * 400}, {"from": "gpt", "value": "a circle"}]

# (image, conversation, kinds of problems); each stands among sound samples of every folder.
DAMAGE: list[tuple[Any, Any, set[str]]] = [
  ("gqa/images/gone.png", TALK, {"missing image"}),
  (["gqa/images/0.png", "vg/VG_100K_2/gone.png"], TALK, {"missing image"}),
  ("ocr_vqa/images/broken.png", TALK, {"unreadable image"}),
  (3, TALK, {"cannot be used"}),
  ("gqa/images/0.png", TEXT, {"cannot be used"}),
  (["gqa/images/0.png", "gqa/images/1.png"], TALK, {"cannot be used"}),
  ("gqa/images/0.png", ["hello"], {"cannot be used"}),
  ("gqa/images/0.png", OPEN, {"nothing to learn"}),
  (None, LATE, {"nothing to learn"}),
  ("gqa/images/0.png", LONG, {"cut off"}),
]


def sample(image: Any, conversation: Any) -> dict[str, Any]:
  item = {"id": "x", "conversations": conversation}
  return item if image is None else {**item, "image": image}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Two pictures in each of LLaVA's folders; sound.json, damaged.json."""
  root = tmp_path_factory.mktemp("llava")
  for name in FOLDERS:
    (root / name).mkdir(parents=True)
    for i in range(2):
      pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 40 * i, np.uint8)
      Image.fromarray(pixels).save(root / name / f"{i}.png")
  (root / "ocr_vqa/images/broken.png").write_bytes(b"not a picture")
  sound = [sample(f"{name}/{i}.png", TALK) for name in FOLDERS for i in range(2)]
  sound.append(sample(None, TEXT))
  (root / "sound.json").write_text(json.dumps(sound))
  damaged = [*sound, *(sample(image, talk) for image, talk, _ in DAMAGE), "not a dictionary"]
  (root / "damaged.json").write_text(json.dumps(damaged))
  return root


@pytest.fixture
def data(folder: Path, tiny_config: ConfigMaker) -> config_lib.DataConfig:
  return tiny_config(data={"path": str(folder / "damaged.json"), "image_folder": str(folder)}).data


@pytest.fixture
def tokenizer(data: config_lib.DataConfig) -> Tokenizer:
  return Tokenizer(data.tokenizer)


def test_each_kind_of_damage_is_found(data: config_lib.DataConfig, tokenizer: Tokenizer) -> None:
  checker = check.Checker(data, tokenizer, TILE)
  for i, (_, _, kinds) in enumerate(DAMAGE, start=11):
    assert {p.kind for p in checker(i, decode=True).problems} == kinds, DAMAGE[i - 11]
  assert {kind for *_, kinds in DAMAGE for kind in kinds} == set(check.KINDS)
  for i in range(11):
    assert not checker(i, decode=True).problems


def test_a_report_counts_samples_and_folders(
  data: config_lib.DataConfig, tokenizer: Tokenizer
) -> None:
  report = check.check(data, tokenizer, TILE, images=None)
  assert (report.total, report.checked) == (22, 22)
  assert dict(report.kinds) == {
    "missing image": 2,
    "unreadable image": 1,
    "cannot be used": 5,
    "nothing to learn": 2,
    "cut off": 1,
  }
  assert dict(report.missing) == {"gqa/images": 1, "vg/VG_100K_2": 1}
  assert report.images["coco/train2017"] == 2
  assert report.images["ocr_vqa/images"] == 3
  assert not report.passed
  assert report.examples["missing image"] == "sample 11: gqa/images/gone.png"


def test_what_the_check_loses_is_what_training_quarantines(
  data: config_lib.DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
  """But for samples without a reply, which training reads and learns nothing from."""
  quarantine = pipeline.Quarantine(tmp_path / "quarantine.jsonl")
  rows = pipeline.make(data, tokenizer, TILE, 2, 0, quarantine)
  for _ in range(40):  # several epochs
    next(rows)
  text = (tmp_path / "quarantine.jsonl").read_text()
  lost = {json.loads(line)["index"] for line in text.splitlines()}
  checker = check.Checker(data, tokenizer, TILE)
  kinds = {i: {p.kind for p in checker(i, decode=True).problems} for i in range(22)}
  found = {
    i for i, k in kinds.items() if k & {"missing image", "unreadable image", "cannot be used"}
  }
  assert lost == found


def test_sound_data_passes_and_its_length_is_the_row_s(
  data: config_lib.DataConfig, tokenizer: Tokenizer, folder: Path
) -> None:
  sound = config_lib.from_dict(
    {**config_lib.to_dict(data), "path": str(folder / "sound.json")}, config_lib.DataConfig
  )
  seen: list[int] = []
  report = check.check(sound, tokenizer, TILE, 3, progress=lambda r: seen.append(r.checked))
  assert report.passed
  assert seen == [11]
  assert report.decoded <= 3
  row = next(pipeline.make(sound, tokenizer, TILE, 1, 0))
  used = int((row["positions"][0] > 0).sum()) + 1
  checker = check.Checker(sound, tokenizer, TILE)
  assert used in {checker(i, decode=False).tokens for i in range(11)}


def test_fewer_samples_and_images(data: config_lib.DataConfig, tokenizer: Tokenizer) -> None:
  report = check.check(data, tokenizer, TILE, images=0, samples=7)
  assert (report.checked, report.total, report.decoded) == (7, 22, 0)
  whole = check.check(data, tokenizer, TILE, images=0)
  assert whole.kinds["unreadable image"] == 1  # its head shows it


def test_anyres_knows_every_size(data: config_lib.DataConfig, tokenizer: Tokenizer) -> None:
  """An image's tokens depend on its size, which stands in the head of its file."""
  side = IMAGE_SIZE
  values = {
    "image_aspect": "anyres",
    "grid_pinpoints": ((side, 2 * side), (2 * side, side)),
    "images_per_row": 3,
    "row_length": 300,
  }
  tiled = config_lib.from_dict({**config_lib.to_dict(data), **values}, config_lib.DataConfig)
  found = check.Checker(tiled, tokenizer, TILE)(0, decode=False)
  assert found.decoded == 0
  plain = check.Checker(data, tokenizer, TILE)(0, decode=False)
  assert found.tokens == plain.tokens + 2 * TILE.tokens


@pytest.fixture
def recipe(tiny_config: ConfigMaker, folder: Path, tmp_path: Path) -> str:
  config = tiny_config(data={"image_folder": str(folder), "path": str(folder / "sound.json")})
  path = tmp_path / "tiny.py"
  path.write_text(
    '"""Tiny."""\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config(arg=""):\n'
    f"  return ConfigDict({config_lib.to_dict(config)!r})\n"
  )
  return str(path)


def test_the_command_passes(recipe: str, capsys: pytest.CaptureFixture) -> None:
  assert cli.main(["check", "--config", recipe, "--images=all"]) == 0
  printed = capsys.readouterr()
  assert printed.err == ""
  assert "11 of 11 samples checked, 10 images decoded" in printed.out
  assert printed.out.endswith("\nwell\n")


def test_the_command_ends_with_one_and_a_table(
  recipe: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
  path = f"--config.data.path={folder / 'damaged.json'}"
  assert cli.main(["check", "--config", recipe, path]) == 1
  lines = capsys.readouterr().out.splitlines()
  assert "missing image              2  sample 11: gqa/images/gone.png" in lines
  assert [line.split() for line in lines if "VG_100K_2" in line] == [["vg/VG_100K_2", "1", "1"]]
  assert lines[-1] == "not well: missing image, unreadable image, cannot be used, nothing to learn"


def test_the_file_of_validation_has_a_report_of_its_own(
  recipe: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
  """By training's rule for it: the bad ones are left out of what is scored."""
  path = f"--config.data.validation_path={folder / 'damaged.json'}"
  assert cli.main(["check", "--config", recipe, path]) == 1
  first, second = capsys.readouterr().out.split(f"{folder / 'damaged.json'}: ")
  assert first.startswith(f"{folder / 'sound.json'}: 11 of 11 samples checked")
  assert first.endswith("\nwell\n")
  assert second.startswith("22 of 22 samples checked")
  assert "missing image              2  sample 11: gqa/images/gone.png" in second
  path = f"--config.data.validation_path={folder / 'gone.json'}"
  assert cli.main(["check", "--config", recipe, path]) == 1
  out, err = capsys.readouterr()
  assert (out, err.startswith("llava-sp check: data.validation_path: no file '")) == ("", True)
  both = (path, "--config.data.validation_fraction=0.5")
  assert cli.main(["check", "--config", recipe, *both]) == 1
  assert "data.validation_path, data.validation_fraction: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "no --config; see llava-sp check --help"),
    (["--config=x.py", "--colour=red"], "unknown --colour; see llava-sp check --help"),
    (
      ["--config=x.py", "--image=3"],
      "unknown --image (did you mean --images?); see llava-sp check",
    ),
    *[
      (
        ["--config=x.py", f"--{flag}={text}"],
        f"--{flag}: expected a whole number from {least}, found ",
      )
      for flag, least in (("images", 0), ("samples", 1))
      for text in ("some", "-1", "", "9" * 5000, "٣", *["0"] * least)
    ],
    (["--config=gone.py"], "--config: no file 'gone.py'"),
  ],
)
def test_one_clear_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
  assert cli.main(["check", *arguments]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"llava-sp check: {message}")


def test_a_template_that_the_tokenizer_cannot_end(
  recipe: str, capsys: pytest.CaptureFixture
) -> None:
  assert cli.main(["check", "--config", recipe, "--config.data.template=mpt"]) == 1
  assert "data.template 'mpt': replies end with '<|im_end|>'" in capsys.readouterr().err


def test_settings_that_training_refuses_are_refused(
  recipe: str, capsys: pytest.CaptureFixture
) -> None:
  for setting, message in {
    "data.packing=tight": "data.packing: unknown 'tight'",
    "data.augment=x": "data.augment: unknown 'x'",
    "data.bucket_lengths=(64, 999)": "data.bucket_lengths: 999 tokens, but data.row_length is ",
    "data.validation_fraction=0.0001": "data.validation_fraction: 0.0001 of 11 samples leaves none",
    "data.threads=0": "data.threads: expected at least 1",
    "data.row_length=36": "data.row_length: an image of 1 tile is ",
    "data.images_per_row=-1": "data.images_per_row: expected at least 0",
    "model.language_model.vocab_size=64": "data.tokenizer: 384 tokens, but model.language_model.",
  }.items():
    assert cli.main(["check", "--config", recipe, f"--config.{setting}"]) == 1, setting
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_folder_of_images_drives_no_terminal(
  recipe: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  path = tmp_path / "names.json"
  names = ["a\nb\x1b[31m/x.png", "long" * 100 + "/x.png", "\ud83d/x.png"]
  path.write_text(json.dumps([sample(name, TALK) for name in names] + [sample(None, TEXT)]))
  assert cli.main(["check", "--config", recipe, f"--config.data.path={path}"]) == 1
  out, err = capsys.readouterr()
  assert err == ""
  assert "\na b\\x1b[31m " in out
  assert "\n\\ud83d " in out
  assert all(line.isprintable() and len(line) < 300 for line in out.splitlines())


def test_one_file_for_both_splits_is_told_by_the_split(data: config_lib.DataConfig) -> None:
  gone = dataclasses.replace(data, path="gone.json", validation_path="gone.json")
  for part, key in (
    (validation_split.TRAIN, "path"),
    (validation_split.VALIDATION, "validation_path"),
  ):
    with pytest.raises(FileNotFoundError, match=rf"^data\.{key}: no file"):
      pipeline.open_parts(gone, TILE, part)
