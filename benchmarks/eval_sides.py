"""Builds the two sides of eval_throughput.py: engine and torch, with equal weights and questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKERS = 2  # threads or processes that read images, on either side
TOWER = {"image_size": 336, "patch_size": 14, "width": 384, "layers": 8, "heads": 6,
         "mlp_width": 1536, "select_layer": -2}  # fmt: skip
SIZES = {  # of the decoder
  "smol": {"vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
           "mlp_width": 1536, "tie_embeddings": True},
  "medium": {"vocab_size": 32000, "width": 512, "layers": 8, "heads": 8, "kv_heads": 8,
             "head_dim": 64, "mlp_width": 1376},
  "tiny": {"vocab_size": 2048, "width": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32,
           "mlp_width": 128},
}  # fmt: skip
THINGS = ["cat", "dog", "car", "tree", "person", "bench", "bottle", "chair", "bird", "boat", "truck", "horse", "sheep", "cow", "cup", "fork", "bowl", "clock", "vase", "book"]  # fmt: skip
SHORT = "\nAnswer the question using a single word or phrase."
UNKNOWN = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


# name: (images, questions about each, tokens of an answer, what is asked)
Workload = tuple[int, int, int, Callable[[int], str]]
WORKLOADS: dict[str, Workload] = {
  "pope": (2, 18, 2, lambda i: f"Is there a {THINGS[i]} in the image?{SHORT}"),
  "vizwiz": (16, 1, 8, lambda i: f"What is on the {THINGS[i]} here?{UNKNOWN}{SHORT}"),
}


class Torch:
  """Talks to the process of torch_loop.py."""

  def __init__(self, folder: Path, variant: str, layers: int):
    script = Path(__file__).with_name("torch_loop.py")
    command = [sys.executable, str(script), str(folder), variant, str(layers)]
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


def config_of(variant: str, size: str, tokenizer: Path) -> Any:
  from llava_sp_jax import config as config_lib

  return config_lib.from_dict(
    {
      "model": {
        "tower": TOWER,
        "language_model": SIZES[size],
        "projector": {"variant": variant, "token_width": 128},
        "dtype": "float32",
        "frozen_dtype": "float32",
        "remat": "none",
      },
      "data": {"tokenizer": str(tokenizer), "template": "v1", "threads": WORKERS},
    }
  )


def weights(config: Any, folder: Path, like: Any = None) -> Any:
  """Makes random parameters as a `Pretrained`, and writes them to `folder` in torch's format.

  Tower and decoder are those of `like` if given; only the projector is written then. Rows of the
  vocabulary that the tokenizer does not have are zeros, as in published models that are padded:
  torch does not choose them then, and the engine never does.
  """
  import numpy as np
  from flax.traverse_util import flatten_dict, unflatten_dict

  from llava_sp_jax.convert import export, formats, leaves
  from llava_sp_jax.convert.loaded import Loaded
  from llava_sp_jax.data.tokenizer import Tokenizer
  from llava_sp_jax.infer.pretrained import Pretrained
  from llava_sp_jax.models import build

  rng, tokenizer = np.random.default_rng(0), Tokenizer(config.data.tokenizer)
  flat = {}
  for path, leaf in flatten_dict(build.abstract(config.model), sep="/").items():
    same = flatten_dict(like.params, sep="/").get(path) if like else None
    wide = path.split("/")[-1] in ("scale",)
    values = rng.standard_normal(leaf.shape, np.float32) * (
      leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.02
    )
    flat[path] = values + wide if same is None or "projector" in path else same
    if path == "language_model/token_embed/embedding":
      flat[path][len(tokenizer) :] = 0
    if path == "language_model/lm_head/kernel":
      flat[path][:, len(tokenizer) :] = 0
  source = Loaded("memory", config, leaves.in_memory(flat), formats.PARTS, None)
  if like is None:
    export.export(source, "vision_tower", folder / "tower")
    export.export(source, "language_model", folder / "text")
  projector = {k.removeprefix("projector/"): v for k, v in flat.items() if "projector/" in k}
  np.savez(folder / f"{config.model.projector.variant}.npz", **projector)
  return Pretrained(config, unflatten_dict(flat, sep="/"), tokenizer)


def write_tokenizer(folder: Path) -> None:
  from llava_sp_jax.data import conversation
  from llava_sp_jax.data.tokenizer import train_bpe

  v1 = conversation.TEMPLATES["v1"]
  texts = [ask(i) for _, _, _, ask in WORKLOADS.values() for i in range(len(THINGS))]
  train_bpe([*texts * 3, *[f"{v1.system}{v1.before}{v1.after}"] * 40], folder, 1024)


def write_images(folder: Path, count: int) -> list[Path]:
  """Writes JPEG files of 640x480 smooth colors, as large as those of a benchmark."""
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
  """Both sides of one variant of the projector."""

  def __init__(self, variant: str, size: str, folder: Path, images: list[Path], like: Any = None):
    from llava_sp_jax.models import build

    self.images, self.variant = images, variant
    self.config = config_of(variant, size, folder / "tokenizer")
    self.model = weights(self.config, folder, like)
    self.torch = Torch(folder, variant, build.tower_layers(self.config.model))

  def requests(self, workload: Workload) -> list[Any]:
    from llava_sp_jax.infer.engine import Request

    images, each, _, ask = workload
    return [
      Request(ask(i % len(THINGS) if each == 1 else j), (self.images[i],))
      for i in range(images)
      for j in range(each)
    ]

  def engine(self, new: int, batch: int = 16) -> Any:
    from llava_sp_jax.infer.engine import Engine, Generation

    return Engine(self.model, batch, Generation(max_new_tokens=new))

  def torch_answers(self, requests: list[Any], new: int, workers: int) -> dict[str, Any]:
    """The other side asks the same ids."""
    from llava_sp_jax.data import conversation, reading

    template = conversation.TEMPLATES[self.config.data.template]
    stop, rows = self.model.tokenizer.stop_ids(template.end), []
    for request in requests:
      pieces = conversation.prompt(f"{conversation.IMAGE}\n{request.question}", template)
      runs = reading.tokenize(pieces, self.model.tokenizer)
      rows.append({"image": str(request.images[0]), "ids": [i for run in runs for i in run.ids]})
    found = self.torch.do(
      "answers", rows=rows, new=new, workers=workers, stop=list(stop), size=TOWER["image_size"]
    )
    found["ids"] = [tuple(i for i in ids if i not in stop) for ids in found["ids"]]
    return found
