"""Eight simulated devices, a compilation cache, and a tiny model with a tiny data set."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]

# These are read when jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES_FLAG = "--xla_force_host_platform_device_count=8"
# Tests compile much and compute little: XLA's own passes are all there, LLVM's are not.
LEVEL_FLAG = "--xla_backend_optimization_level=0"
for _flag in (DEVICES_FLAG, LEVEL_FLAG):
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jaxtyping  # noqa: E402

import tests.checker  # noqa: E402, F401

# Every test checks the shapes and dtypes of annotations here.
# (The rest of infer holds no arrays, and gets stand-ins for tokenizers and the like.)
ARRAYS = (
  "beam",
  "caches",
  "decode",
  "generate",
  "log_probabilities",
  "prefill",
  "programs",
  "sampling",
)
CHECKED = (
  "llava_sp_jax.models",
  *(f"llava_sp_jax.infer.{name}" for name in ARRAYS),
  "llava_sp_jax.training.loss",
)
jaxtyping.install_import_hook(CHECKED, "tests.checker.check")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from llava_sp_jax import config as config_lib  # noqa: E402
from llava_sp_jax.data.conversation import TEMPLATES  # noqa: E402
from llava_sp_jax.data.tokenizer import train_bpe  # noqa: E402
from tests import object_store  # noqa: E402

IMAGE_SIZE, PATCH_SIZE = 24, 4  # a 6x6 grid, the smallest that six scales fit into
VOCAB_SIZE = 384
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# Sizes of the decoder that the blocks of quantised kernels divide.
WIDE = {"language_model": {"width": 64, "head_dim": 16, "mlp_width": 128}}

ConfigMaker = Callable[..., config_lib.Config]


def dialogue(index: int) -> list[dict[str, str]]:
  """Two to four turns about picture `index`."""
  turns = []
  for turn in range(2 + index % 3):
    color = COLORS[(index + turn) % len(COLORS)]
    question = f"is it {color}?" if turn else f"<image>\nwhat colour is it, {color}?"
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"{color}, yes"}]
  return turns


def write_data(folder: Path, count: int = 12) -> None:
  """Random pictures, captions.json, train.json and test.json about them, and a tokenizer."""
  (folder / "images").mkdir(parents=True)
  rng = np.random.default_rng(0)
  captions, dialogues, questions = [], [], []
  for i in range(count):
    pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    color = COLORS[i % len(COLORS)]
    caption = [
      {"from": "human", "value": "<image>"},
      {"from": "gpt", "value": f"a {color} picture"},
    ]
    captions.append({"id": f"caption-{i}", "image": f"{i}.png", "conversations": caption})
    dialogues.append({"id": f"train-{i}", "image": f"{i}.png", "conversations": dialogue(i)})
    answer = ("yes", "circle", color)[i % 3]
    questions.append(
      {"id": f"test-{i}", "image": f"{i}.png", "question": "what is it?", "answer": answer}
    )
  for name, rows in (("captions", captions), ("train", dialogues), ("test", questions)):
    (folder / f"{name}.json").write_text(json.dumps(rows))
  v1 = TEMPLATES["v1"]
  texts = [m["value"] for d in dialogues for m in d["conversations"]]
  train_bpe([*texts, *[f"{v1.system}{v1.before}{v1.after}"] * 20], folder / "tokenizer", VOCAB_SIZE)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with images/, captions.json, train.json, test.json and tokenizer/."""
  folder = tmp_path_factory.mktemp("tiny") / "data"
  write_data(folder)
  return folder


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
  """Nested `values` with `changes` put over them."""
  result = dict(values)
  for key, value in changes.items():
    nested = isinstance(value, dict) and isinstance(result.get(key), dict)
    result[key] = merged(result[key], value) if nested else value
  return result


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path) -> ConfigMaker:
  return config_maker(tiny_data)


def config_maker(tiny_data: Path) -> ConfigMaker:
  """`make(stage, variant, **changes)`: a valid config of a model that trains in a second."""

  def make(stage: str = "finetune", variant: str = "pooling", **changes: Any) -> config_lib.Config:
    captions = stage.startswith("pretrain")
    values = {
      "name": f"tiny-{variant}-{stage}",
      "model": {
        "tower": {
          "image_size": IMAGE_SIZE,
          "patch_size": PATCH_SIZE,
          "width": 32,
          "layers": 2,
          "heads": 2,
          "mlp_width": 64,
          "select_layer": -2,
        },
        "language_model": {
          "vocab_size": VOCAB_SIZE,
          "width": 32,
          "layers": 2,
          "heads": 4,
          "kv_heads": 2,
          "head_dim": 8,
          "mlp_width": 64,
        },
        "projector": {"variant": variant, "token_width": 16},
        "lora": {"rank": 0 if captions else 8, "alpha": 20.0, "dropout": 0.05},
        "dtype": "float32",
        "frozen_dtype": "float32",
        "remat": "none",
      },
      "data": {
        "path": str(tiny_data / f"{'captions' if captions else 'train'}.json"),
        "image_folder": str(tiny_data / "images"),
        "tokenizer": str(tiny_data / "tokenizer"),
        "template": "plain" if captions else "v1",
        "row_length": 64 if captions else 208,
        "threads": 2,
      },
      "optimizer": {"stage": stage, "learning_rate": 1e-2, "projector_learning_rate": 5e-3},
      "train": {"steps": 4, "batch_size": 8, "log_every": 1, "save_every": 100},
    }
    return config_lib.from_dict(merged(values, changes))

  return make


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
  """The address of an emulated bucket; each test has a folder of its own in it."""
  if importlib.util.find_spec("gcsfs") is None:  # not imported before its environment is set
    pytest.skip("the extra gcs is not installed")
  with object_store.running():
    yield f"gs://{object_store.BUCKET}"


@pytest.fixture(scope="session")
def run_folder(tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A finished run of two steps, which its readers leave as it is."""
  import llava_sp_jax as llava

  folder = tmp_path_factory.mktemp("run") / "finetune"
  done = llava.train(tiny_config("finetune", train={"steps": 2}), folder)
  assert (done.step, done.quarantined) == (2, 0)
  return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Evaluation folders of all benchmarks, in the official formats."""
  from tests.tasks import formats

  folder = tmp_path_factory.mktemp("eval")
  for write in formats.WRITERS.values():
    write(folder)
  return folder


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
  """A copy of `root` to damage."""
  shutil.copytree(root, tmp_path / "eval")
  return tmp_path / "eval"


# The files that take minutes, longest first: they start first, so that none is left for the end.
LONGEST = (
  "end_to_end/test_every_variant",
  "end_to_end/test_stopping_together",
  "end_to_end/test_distributed",
  "parity/test_ladder",
  "end_to_end/test_one_reading",
  "distributed/test_sharding",
  "convert/test_smollm2",
  "end_to_end/test_resume",
  "infer/test_engine",
  "infer/test_likelihood",
  "training/test_step",
  "training/test_packing",
  "end_to_end/test_qlora",
  "convert/test_round_trip",
  "models/test_llava",
  "eval/test_in_loop",
  "eval/test_never_lost",
  "test_demo",
  "training/test_stages",
  "training/test_watching",
  "test_tables",
  "test_recipes",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  places = {REPOSITORY / "tests" / f"{name}.py": place for place, name in enumerate(LONGEST)}
  items.sort(key=lambda item: places.get(item.path, len(places)))
