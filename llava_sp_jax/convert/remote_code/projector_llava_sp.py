"""Computes image tokens from patch features: spatial tokens, then one for each patch.

Shape letters:  B tiles . G grid side . s view side . C tower width . K token width . S spatial tokens
                P positions of a strided convolution . D decoder width . N tokens of a tile
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_llava_sp import LlavaSPConfig

NORM_EPS = 1e-5
DEPTH, HEADS, DROPOUT = 4, 8, 0.1  # of the extractor "transformer": layers of each side, heads


def crop(grid: Tensor, size: int) -> Tensor:
  """Returns the central square of patches. [B, C, G, G] -> [B, C, size, size]."""
  start = grid.shape[2] // 2 - size // 2
  return grid[:, :, start : start + size, start : start + size]


def pool(grid: Tensor, size: int) -> Tensor:
  """Averages the grid to a smaller one. [B, C, G, G] -> [B, C, size, size]."""
  return grid if size == grid.shape[2] else functional.adaptive_avg_pool2d(grid, size)


def nothing(grid: Tensor, size: int) -> Tensor:
  """Returns the grid as it is, for a token that does not depend on it."""
  return grid


VIEWS: dict[str, Callable[[Tensor, int], Tensor]] = {
  "crop": crop,
  "pool": pool,
  "register": nothing,
}


class Kernel(nn.Module):
  """Applies a kernel that covers its whole view: one product. [B, C, s, s] -> [B, K]."""

  def __init__(self, channels: int, width: int, size: int):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(width, channels, size, size))

  def forward(self, view: Tensor) -> Tensor:
    return functional.linear(view.flatten(1), self.weight.flatten(1))


class Register(nn.Module):
  """Returns a learned token that does not depend on the view. -> [B, K]."""

  def __init__(self, channels: int, width: int, size: int):
    super().__init__()
    self.token = nn.Parameter(torch.empty(width))

  def forward(self, view: Tensor) -> Tensor:
    return self.token.expand(len(view), -1)


class Attention(nn.Module):
  """Computes multi-head attention without biases; one matrix makes queries, keys and values."""

  def __init__(self, width: int):
    super().__init__()
    self.in_proj = nn.Parameter(torch.empty(3 * width, width))
    self.o_proj = nn.Linear(width, width, bias=False)

  def forward(self, x: Tensor, memory: Tensor) -> Tensor:
    query, key, value = self.in_proj.chunk(3)

    def heads(states: Tensor, kernel: Tensor) -> Tensor:  # [B, T, D] -> [B, heads, T, D / heads]
      made = functional.linear(states, kernel)
      return made.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q, k, v = heads(x, query), heads(memory, key), heads(memory, value)
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    weights = functional.dropout(scores.softmax(-1).to(v.dtype), DROPOUT, self.training)
    return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
  """Computes a pre-norm layer; one with `cross` also attends to a memory."""

  def __init__(self, width: int, cross: bool):
    super().__init__()
    self.self_norm = nn.LayerNorm(width, NORM_EPS, bias=False)
    self.self_attn = Attention(width)
    if cross:
      self.cross_norm = nn.LayerNorm(width, NORM_EPS, bias=False)
      self.cross_attn = Attention(width)
    self.mlp_norm = nn.LayerNorm(width, NORM_EPS, bias=False)
    self.fc1 = nn.Linear(width, width, bias=False)
    self.fc2 = nn.Linear(width, width, bias=False)
    self.dropout = nn.Dropout(DROPOUT)

  def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
    y = self.self_norm(x)
    x = x + self.dropout(self.self_attn(y, y))
    if memory is not None:
      x = x + self.dropout(self.cross_attn(self.cross_norm(x), memory))
    y = self.dropout(functional.relu(self.fc1(self.mlp_norm(x))))
    return x + self.dropout(self.fc2(y))


class Stack(nn.Module):
  """Computes layers and a norm at the end."""

  def __init__(self, width: int, cross: bool):
    super().__init__()
    self.layers = nn.ModuleList([Layer(width, cross) for _ in range(DEPTH)])
    self.norm = nn.LayerNorm(width, NORM_EPS, bias=False)

  def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
    for layer in self.layers:
      x = layer(x, memory)
    return self.norm(x)


class Transformer(nn.Module):
  """Lets a learned query read a view through an encoder and a decoder. [B, C, s, s] -> [B, C]."""

  def __init__(self, channels: int, width: int, size: int):
    super().__init__()
    self.query = nn.Parameter(torch.empty(1, 1, channels))
    self.encoder, self.decoder = Stack(channels, cross=False), Stack(channels, cross=True)

  def vectors(self, view: Tensor) -> Tensor:
    """Returns what the encoder reads: one vector for each position. -> [B, s * s, C]."""
    return view.flatten(2).transpose(1, 2)

  def forward(self, view: Tensor) -> Tensor:
    memory = self.encoder(self.vectors(view))
    return self.decoder(self.query.expand(len(view), -1, -1), memory)[:, 0]


class TransformerChannelsFirst(Transformer):
  """Reads a view as the original reads a pool: reshaped with its channels first."""

  def vectors(self, view: Tensor) -> Tensor:
    return view.reshape(len(view), -1, view.shape[1])


EXTRACTORS: dict[str, Callable[[int, int, int], nn.Module]] = {
  "conv": Kernel,
  "register": Register,
  "transformer": Transformer,
  "transformer_channels_first": TransformerChannelsFirst,
}
MERGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
  "concat": lambda details: details,
  "sum": lambda details: [torch.stack(details).sum(0)],
}


class Detail(nn.Module):
  """Lets spatial tokens attend to a strided convolution of the grid, with a single head."""

  def __init__(self, channels: int, width: int, size: int, stride: int, parts: tuple[str, ...]):
    super().__init__()
    self.conv = nn.Conv2d(channels, width, size, stride=stride, bias=False)
    for part in parts:
      self.add_module(f"{part}_norm", nn.LayerNorm(width, NORM_EPS))
      self.add_module(part, nn.Linear(width, width))

  def convolve(self, grid: Tensor) -> Tensor:
    """Returns the convolution at its positions. [B, C, G, G] -> [B, P, K]."""
    return self.conv(grid).flatten(2).transpose(1, 2)

  def values(self, detail: Tensor) -> Tensor:
    """Returns what attention averages. [B, P, K] -> [B, P, K]."""
    return self._through("value", detail)

  def _through(self, part: str, states: Tensor) -> Tensor:
    return self.get_submodule(part)(self.get_submodule(f"{part}_norm")(states))

  def forward(
    self, tokens: Tensor, grid: Tensor, values: Callable[[Tensor], Tensor]
  ) -> Tensor:  # [B, S, K], [B, C, G, G] -> [B, S, K]
    detail = self.convolve(grid)
    q, k, v = self._through("query", tokens), self._through("key", detail), values(detail)
    scores = (q @ k.transpose(1, 2)).float() / math.sqrt(q.shape[-1])
    return scores.softmax(-1).to(v.dtype) @ v


class LlavaSPProjector(nn.Module):
  """Computes image tokens: spatial tokens, then one for each patch. [B, G*G, C] -> [B, N, D].

  Which spatial tokens there are is said by the group `projector` of the config.
  """

  def __init__(self, config: LlavaSPConfig):
    super().__init__()
    row, channels = config.projector, config.vision_config.hidden_size
    self.row, width, out = row, row["token_width"], config.text_config.hidden_size
    self.fc1, self.fc2 = nn.Linear(channels, out), nn.Linear(out, out)
    if config.image_newline:
      self.image_newline = nn.Parameter(torch.empty(out))
    self.names = [(view, i, size) for view in row["views"] for i, size in enumerate(row["scales"])]
    for view, i, size in self.names:
      self.add_module(f"{view}_{i}", EXTRACTORS[row["extractor"]](channels, width, size))
    for kernel, size in zip(row["detail_kernels"], row["detail_sizes"], strict=True):
      value = ("value",) if kernel in row["detail_values"] else ()
      parts = () if row["detail_as_tokens"] else ("query", "key", *value)
      detail = Detail(channels, width, size, row["detail_stride"], parts)
      self.add_module(f"detail_{kernel}", detail)
    if config.num_spatial_tokens:
      wide = channels if row["extractor"].startswith("transformer") else width
      kernels = 0 if row["detail_as_tokens"] else len(row["detail_kernels"])
      parts_of_token = kernels if row["detail_merge"] == "concat" else min(kernels, 1)
      self.out = nn.Linear(wide + parts_of_token * width, out, bias=row["out_bias"])

  def forward(self, features: Tensor) -> Tensor:
    patches = self.fc2(functional.gelu(self.fc1(features)))
    if not hasattr(self, "out"):
      return patches
    side = math.isqrt(features.shape[1])
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    tokens = self.out(functional.gelu(self._spatial(grid.contiguous())))
    return torch.cat([tokens, patches], dim=1)

  def _spatial(self, grid: Tensor) -> Tensor:
    """Computes spatial tokens with their details, before the output layer. -> [B, S, ..]."""
    row = self.row
    details = [getattr(self, f"detail_{kernel}") for kernel in row["detail_kernels"]]
    if row["detail_as_tokens"]:
      return torch.cat([detail.convolve(grid) for detail in details], dim=1)
    tokens = torch.stack(
      [getattr(self, f"{view}_{i}")(VIEWS[view](grid, size)) for view, i, size in self.names], dim=1
    )
    if not details:
      return tokens
    seen = VIEWS[row["views"][0]](grid, row["detail_field"])
    owners = [getattr(self, f"detail_{owner}").values for owner in row["detail_values"]]
    found = [detail(tokens, seen, values) for detail, values in zip(details, owners, strict=True)]
    return torch.cat([tokens, *MERGES[row["detail_merge"]](found)], dim=-1)
