"""Answers one question at a time with torch and transformers: the other side of eval_throughput.py.

Runs as its own process, so that the thread pools of jax and torch do not compete. Reads JSON lines
`{"do": name, ...}` from stdin and answers each with one. Works like the original's evaluation
scripts: a DataLoader reads images ahead, and every question encodes its image and prefills its
whole prompt. The projector is written from the paper (section 3) and computes what the package's
does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPVisionModel

IMAGE_ID = -200


class Projector:
  """The variants none, pooling and cropping in float32. [B, P, C] -> [B, S + P, D]."""

  def __init__(self, variant: str, arrays: dict[str, np.ndarray]):
    self.variant = variant
    self.w = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
    kernels = [k for k in self.w if k.startswith(("pool_", "crop_"))]
    self.kernels = []
    for name in sorted(kernels, key=lambda k: int(k.split("_")[1].split("/")[0])):
      kernel = self.w[name]
      side = round((kernel.shape[0] / self.w["fc1/kernel"].shape[0]) ** 0.5)
      shaped = kernel.reshape(side, side, -1, kernel.shape[1]).permute(3, 2, 0, 1)
      self.kernels.append((side, shaped.contiguous()))

  def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.w[f"{name}/kernel"].T, self.w.get(f"{name}/bias"))

  def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
    scale, bias = self.w[f"{name}/scale"], self.w[f"{name}/bias"]
    return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

  def __call__(self, patches: torch.Tensor) -> torch.Tensor:
    out = self.linear("fc2", F.gelu(self.linear("fc1", patches)))
    if self.variant == "none":
      return out
    side = round(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    tokens = []
    for size, kernel in self.kernels:
      at = side // 2 - size // 2
      cut = grid[:, :, at : at + size, at : at + size]
      view = F.adaptive_avg_pool2d(grid, size) if self.variant == "pooling" else cut
      tokens.append(F.conv2d(view, kernel)[:, :, 0, 0])
    x = torch.stack(tokens, 1)
    if self.variant == "cropping":
      x = torch.cat([x, self.detail(x, grid)], -1)
    return torch.cat([self.linear("out", F.gelu(x)), out], 1)

  def detail(self, tokens: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    name = next(k.split("/")[0] for k in self.w if k.startswith("detail_"))
    kernel = self.w[f"{name}/conv/kernel"].permute(3, 2, 0, 1).contiguous()
    found = F.conv2d(grid, kernel, stride=2).flatten(2).transpose(1, 2)
    q, k, v = (
      self.linear(f"{name}/{part}", self.norm(f"{name}/{part}_norm", x))
      for part, x in (("query", tokens), ("key", found), ("value", found))
    )
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Model:
  """Tower and decoder, opened by transformers from this package's exports, and the projector."""

  def __init__(self, folder: Path, variant: str, layers: int):
    """Uses `layers` layers of the tower, whatever its file says about the select layer."""
    self.tower = CLIPVisionModel.from_pretrained(folder / "tower", dtype=torch.float32).eval()
    self.text = AutoModelForCausalLM.from_pretrained(folder / "text", dtype=torch.float32).eval()
    with np.load(folder / f"{variant}.npz") as arrays:
      self.projector = Projector(variant, dict(arrays))
    self.layers = layers

  def encode(self, pixels: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] -> [B, N, D]
    hidden = self.tower(pixels, output_hidden_states=True).hidden_states[self.layers]
    return self.projector(hidden[:, 1:])

  def embeds(self, ids: list[int], image: torch.Tensor) -> torch.Tensor:  # [1, N, D] -> [1, T, D]
    at = ids.index(IMAGE_ID)
    table = self.text.get_input_embeddings()
    before, after = (table(torch.tensor([part])) for part in (ids[:at], ids[at + 1 :]))
    return torch.cat([before, image, after], 1)

  def generate(
    self, embeds: torch.Tensor, new: int, stop: list[int] | None = None
  ) -> list[list[int]]:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    return self.text.generate(
      inputs_embeds=embeds,
      attention_mask=mask,
      max_new_tokens=new,
      do_sample=False,
      eos_token_id=stop,
      pad_token_id=0,
    ).tolist()


class Questions(torch.utils.data.Dataset):
  """Yields ids and pixels of each question; CLIP's processor makes the pixels from the padded
  image.
  """

  def __init__(self, rows: list[dict[str, Any]], size: int):
    from transformers import CLIPImageProcessorPil

    self.rows = rows
    square = {"height": size, "width": size}
    self.processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> tuple[list[int], torch.Tensor]:
    image = Image.open(self.rows[i]["image"]).convert("RGB")
    color = tuple(int(m * 255) for m in self.processor.image_mean)
    square = Image.new("RGB", (max(image.size),) * 2, color)
    square.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
    pixels = self.processor(square, return_tensors="np")["pixel_values"]
    return self.rows[i]["ids"], torch.from_numpy(np.asarray(pixels))


def loader(rows: list[dict[str, Any]], size: int, workers: int) -> Any:
  data = Questions(rows, size)
  return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)


def answers(model: Model, task: dict[str, Any]) -> dict[str, Any]:
  """Runs the loop; returns seconds and ids for a list of {image, ids}."""
  started, found = time.perf_counter(), []
  for ids, pixels in loader(task["rows"], task["size"], task["workers"]):
    found.append(
      model.generate(model.embeds(ids, model.encode(pixels)), task["new"], task["stop"])[0]
    )
  return {"seconds": time.perf_counter() - started, "ids": found}


def decode(model: Model, task: dict[str, Any]) -> dict[str, Any]:
  """Returns the seconds of a greedy step of `batch` rows after `length` positions, without
  `generate`.
  """
  width = model.text.config.hidden_size
  embeds = torch.randn(task["batch"], task["length"], width) * 0.02
  found = model.text(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
  started = time.perf_counter()
  for _ in range(task["steps"]):
    token = found.logits.argmax(-1)
    past = found.past_key_values
    found = model.text(input_ids=token, past_key_values=past, use_cache=True)
  return {"seconds": (time.perf_counter() - started) / task["steps"]}


def prefill(model: Model, task: dict[str, Any]) -> dict[str, Any]:
  """Returns the seconds to the first token of `batch` prompts with `length` positions."""
  embeds = torch.randn(task["batch"], task["length"], model.text.config.hidden_size) * 0.02
  started = time.perf_counter()
  model.text(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits.argmax(-1)
  return {"seconds": time.perf_counter() - started}


DO: dict[str, Callable[[Model, dict[str, Any]], dict[str, Any]]] = {
  "answers": answers, "decode": decode, "prefill": prefill,
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=Path, help="tower/, text/ and ROW.npz")
  parser.add_argument("variant", help="of the projector: none, pooling or cropping")
  parser.add_argument("layers", type=int, help="of the tower that are used")
  options = parser.parse_args()
  torch.manual_seed(0)
  torch.set_grad_enabled(False)
  model = Model(options.folder, options.variant, options.layers)
  print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
  for line in sys.stdin:
    task = json.loads(line)
    print(json.dumps(DO[task["do"]](model, task)), flush=True)


if __name__ == "__main__":
  main()
