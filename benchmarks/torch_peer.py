"""Measures a LoRA step of transformers' Llava with PEFT; accelerator.py starts it and reads its line.

Reads the request (`Request`) as JSON from stdin, and prints one JSON object. Imports no jax, whose
process would hold the memory of the device. Weights are random, in bfloat16.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import peft
import torch
import transformers

MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ROWS = (1, 2, 4, 8, 16, 24, 32, 48)
TIMES = 3  # steps that are timed, after one that is not
RATE = 2e-4


@dataclasses.dataclass(frozen=True)
class Request:
  """Describes the work: `model` has the sizes of `config.ModelConfig`, for each size by name.

  `size` is one of them, or "auto": the first if the device has more than `room` bytes, else the second.
  `seconds` is the time for all of it.
  """

  model: dict[str, dict[str, Any]]
  size: str
  room: int
  rank: int
  row_length: int
  images: int
  seconds: float


def built(sizes: dict[str, Any], request: Request, device: str) -> Any:
  """Builds the model, with adapters on all products of its decoder and a trained projector."""
  text, tower = sizes["language_model"], sizes["tower"]
  config = transformers.LlavaConfig(
    text_config=transformers.LlamaConfig(
      vocab_size=text["vocab_size"],
      hidden_size=text["width"],
      intermediate_size=text["mlp_width"],
      num_hidden_layers=text["layers"],
      num_attention_heads=text["heads"],
      num_key_value_heads=text["kv_heads"],
      head_dim=text["head_dim"],
      max_position_embeddings=max(4096, request.row_length),
    ),
    vision_config=transformers.CLIPVisionConfig(
      hidden_size=tower["width"],
      intermediate_size=tower["mlp_width"],
      num_hidden_layers=tower["layers"],
      num_attention_heads=tower["heads"],
      image_size=tower["image_size"],
      patch_size=tower["patch_size"],
    ),
    image_token_id=text["vocab_size"] - 1,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
  )
  torch.set_default_dtype(torch.bfloat16)
  with torch.device(device):
    model = transformers.LlavaForConditionalGeneration(config)
  adapters = peft.LoraConfig(
    r=request.rank,
    lora_alpha=2 * request.rank,
    lora_dropout=0.05,
    target_modules=MODULES,
    modules_to_save=["multi_modal_projector"],
  )
  model.gradient_checkpointing_enable({"use_reentrant": False})
  model.enable_input_require_grads()
  return peft.get_peft_model(model, adapters).train()


def batch_of(sizes: dict[str, Any], request: Request, rows: int, device: str) -> dict[str, Any]:
  """Makes full rows: the patches of all images, and text, which is learned."""
  text, tower = sizes["language_model"], sizes["tower"]
  patches = request.images * (tower["image_size"] // tower["patch_size"]) ** 2
  tokens = torch.randint(1, text["vocab_size"] - 1, (rows, request.row_length), device=device)
  tokens[:, :patches] = text["vocab_size"] - 1
  labels = tokens.clone()
  labels[:, :patches] = -100
  shape = (rows * request.images, 3, tower["image_size"], tower["image_size"])
  pixels = torch.rand(shape, device=device, dtype=torch.bfloat16)
  return {"input_ids": tokens, "labels": labels, "pixel_values": pixels}


def measured(request: Request) -> dict[str, Any]:
  """Measures steps of more and more rows, and returns the one with the most tokens a second."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  until = time.monotonic() + request.seconds
  size = request.size
  if size == "auto":
    room = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    size = list(request.model)[room <= request.room]
  sizes = request.model[size]
  model = built(sizes, request, device)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=RATE, fused=device == "cuda")
  best: dict[str, Any] = {}
  for rows in ROWS:
    if best and time.monotonic() > until:
      break
    try:
      seconds, loss = timed(model, optimizer, batch_of(sizes, request, rows, device), device)
    except torch.cuda.OutOfMemoryError:
      break
    rate = rows * request.row_length / seconds
    if rate > best.get("tokens_per_s", 0):
      best = {"rows": rows, "seconds": seconds, "tokens_per_s": rate, "loss": loss}
  peak = torch.cuda.max_memory_allocated() / (1 << 30) if device == "cuda" else None
  versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
  about = {"size": size, "row_length": request.row_length, "images": request.images}
  attention = model.get_base_model().config.text_config._attn_implementation
  return {**about, **best, "attention": attention, "peak_gib": peak, **versions}


def timed(model: Any, optimizer: Any, batch: dict[str, Any], device: str) -> tuple[float, float]:
  """Returns the seconds of the fastest of TIMES steps, and the loss."""
  found, loss = [], float("nan")
  for _ in range(1 + TIMES):
    wait(device)
    started = time.perf_counter()
    result = model(**batch)
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait(device)
    found.append(time.perf_counter() - started)
    loss = float(result.loss)
  return min(found[1:]), loss


def wait(device: str) -> None:
  if device == "cuda":
    torch.cuda.synchronize()


if __name__ == "__main__":
  print(json.dumps(measured(Request(**json.load(sys.stdin)))))
