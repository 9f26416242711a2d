"""The engine against a torch loop on this machine: same weights, same questions, float32.

Usage: python benchmarks/eval_throughput.py [--minutes 6] [--repeats 3] [--out docs/results/eval_throughput]

Random weights at sizes where shapes matter: a CLIP tower with a 24x24 grid and a decoder with the
shape of SmolLM2-135M. Answers have a fixed number of tokens. Needs torch (the extra `test`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOWER = {"image_size": 336, "patch_size": 14, "width": 384, "layers": 8, "heads": 6,
         "mlp_width": 1536, "select_layer": -2}  # fmt: skip
SIZES = {  # of the decoder
  "smol": {"vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
           "mlp_width": 1536, "tie_embeddings": True},
  "medium": {"vocab_size": 32000, "width": 512, "layers": 8, "heads": 8, "kv_heads": 8,
             "head_dim": 64, "mlp_width": 1376},
}  # fmt: skip
ROWS = ("none", "pooling", "cropping")
PROMPT, STEPS = 640, 16  # positions and steps of the parts that are timed alone
THINGS = ["cat", "dog", "car", "tree", "person", "bench", "bottle", "chair", "bird", "boat", "truck", "horse", "sheep", "cow", "cup", "fork", "bowl", "clock", "vase", "book"]  # fmt: skip
SHORT = "\nAnswer the question using a single word or phrase."
UNKNOWN = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

# name: (images, questions about each, tokens of an answer, what is asked)
Workload = tuple[int, int, int, Callable[[int], str]]
WORKLOADS: dict[str, Workload] = {
  "pope": (2, 18, 2, lambda i: f"Is there a {THINGS[i]} in the image?{SHORT}"),
  "vizwiz": (12, 1, 8, lambda i: f"What is on the {THINGS[i]} here?{UNKNOWN}{SHORT}"),
}


class Torch:
  """The other process."""

  def __init__(self, folder: Path, row: str, layers: int):
    script = Path(__file__).with_name("torch_loop.py")
    command = [sys.executable, str(script), str(folder), row, str(layers)]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    self.about = self._answer()

  def _answer(self) -> dict[str, Any]:
    assert self.process.stdout
    while line := self.process.stdout.readline():
      if line.startswith("{"):
        return json.loads(line)
    raise SystemExit("torch_loop.py ended; its message is above")

  def do(self, name: str, **task: Any) -> dict[str, Any]:
    assert self.process.stdin
    self.process.stdin.write(json.dumps({"do": name, **task}) + "\n")
    self.process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    assert self.process.stdin
    self.process.stdin.close()
    self.process.wait()


def config_of(row: str, size: str, tokenizer: Path) -> Any:
  from llava_sp_jax import config as config_lib

  return config_lib.from_dict({
    "model": {
      "tower": TOWER, "language_model": SIZES[size],
      "projector": {"row": row, "token_width": 128}, "dtype": "float32",
      "frozen_dtype": "float32", "remat": "none",
    },
    "data": {"tokenizer": str(tokenizer), "template": "v1", "threads": 2},
  })  # fmt: skip


def weights(config: Any, folder: Path) -> Any:
  """Random parameters, also as torch opens them in `folder`. Returns a `Pretrained`."""
  import jax
  import numpy as np
  from flax.traverse_util import flatten_dict

  from llava_sp_jax.convert import formats, leaves, save
  from llava_sp_jax.data.tokenizer import Tokenizer
  from llava_sp_jax.infer.pretrained import Pretrained
  from llava_sp_jax.models import build

  params = jax.jit(lambda key: build.initialise(config.model, key))(jax.random.key(0))
  flat = {k: np.asarray(v) for k, v in flatten_dict(params, sep="/").items()}
  source = formats.Source("memory", config, leaves.in_memory(flat), formats.PARTS, None)
  folder.mkdir()
  save.export(source, "vision_tower", folder / "tower")
  save.export(source, "language_model", folder / "text")
  projector = {k.removeprefix("projector/"): v for k, v in flat.items() if "projector/" in k}
  np.savez(folder / "projector.npz", **projector)
  return Pretrained(config, params, Tokenizer(config.data.tokenizer))


def write_tokenizer(folder: Path) -> None:
  from llava_sp_jax.data import conversation
  from llava_sp_jax.data.tokenizer import train_bpe

  v1 = conversation.TEMPLATES["v1"]
  texts = [ask(i) for _, _, _, ask in WORKLOADS.values() for i in range(len(THINGS))]
  train_bpe([*texts * 3, *[f"{v1.system}{v1.before}{v1.after}"] * 40], folder, 1024)


def write_images(folder: Path, count: int) -> list[Path]:
  """JPEG files of 640x480 smooth colours, as large as a benchmark's."""
  import numpy as np
  from PIL import Image

  folder.mkdir()
  rng, paths = np.random.default_rng(0), []
  for i in range(count):
    small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    paths.append(folder / f"{i}.jpg")
    small.resize((640, 480), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
  return paths


class Bench:
  """Both sides of one row of the projector."""

  def __init__(self, row: str, size: str, folder: Path, images: list[Path]):
    from llava_sp_jax.models import build

    self.images = images
    self.config = config_of(row, size, folder / "tokenizer")
    self.model = weights(self.config, folder / row)
    self.layers = build.tower_layers(self.config.model)
    self.torch = Torch(folder / row, row, self.layers)

  def requests(self, workload: Workload) -> list[Any]:
    from llava_sp_jax.infer.engine import Request

    images, each, _, ask = workload
    return [Request(ask(i % len(THINGS) if each == 1 else j), (self.images[i],))
            for i in range(images) for j in range(each)]  # fmt: skip

  def torch_rows(self, requests: list[Any]) -> list[dict[str, Any]]:
    """What our prompts say, as the other side reads it: ids with one for the image."""
    from llava_sp_jax.data import conversation, example

    template = conversation.TEMPLATES[self.config.data.template]
    rows = []
    for request in requests:
      pieces = conversation.prompt(f"{conversation.IMAGE}\n{request.question}", template)
      runs = example.tokenize(pieces, self.model.tokenizer)
      rows.append({"image": str(request.images[0]), "ids": [i for run in runs for i in run.ids]})
    return rows

  def engine(self, new: int, batch: int = 16) -> Any:
    from llava_sp_jax.infer.engine import Engine
    from llava_sp_jax.infer.generation import Generation

    made = Engine(self.model, batch, Generation(max_new_tokens=new))
    made.stop_ids = ()
    return made


def machine() -> str:
  return f"{os.cpu_count()} cores {platform.machine()}, CPU, Python {platform.python_version()}"
