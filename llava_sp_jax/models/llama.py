"""LLaMA-family decoder: grouped-query attention, gated MLP, one scan over the layers.

Shape letters:  B rows . T tokens . D width . N heads . K key-value heads . H head width
                V vocabulary
Families differ in numbers and switches: LLaMA, Mistral (sliding window), Qwen2 (biases).
Source: Hugging Face `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_sp_jax.models import remat
from llava_sp_jax.models.attention import SAVED, Attention, attend
from llava_sp_jax.models.cache import KVCache, write
from llava_sp_jax.models.layers import RMSNorm, Rope, causal_mask, rotary, window_mask
from llava_sp_jax.models.lora import together

BLOCK_AXES = ("batch", "length", None)  # logical axes of the activations between blocks


class Block(nn.Module):
  """One layer; `cache` holds this layer's keys and values, or None when there is no cache.

  `windowed` says whether the layer sees only what `near` allows; both are None without a window.
  """

  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  attention_bias: bool
  norm_eps: float
  initializer_range: float
  dtype: jnp.dtype
  dense: Any
  attention: Attention

  @nn.compact
  def __call__(self, x, cache, windowed, angles, mask, segments, near, start):
    dense = functools.partial(
      self.dense,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(self.initializer_range),
    )
    y = RMSNorm(self.norm_eps, name="attn_norm")(x)

    counts = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
    made = together(
      [dense(n * self.head_dim, use_bias=self.attention_bias, name=p) for p, n in counts.items()], y
    )
    q, k, v = (h.reshape(*y.shape[:2], -1, self.head_dim) for h in made)
    q = checkpoint_name(rotary(q, *angles), "q")
    k = checkpoint_name(rotary(k, *angles), "k")
    v = checkpoint_name(v, "v")
    if cache is not None:
      cache = k, v = write(cache[0], k, start), write(cache[1], v, start)
    if near is not None:
      mask = mask & (near | ~windowed)
    out = checkpoint_name(attend(self.attention, q, k, v, mask, segments), SAVED)
    out = dense(x.shape[-1], name="o_proj")(out.reshape(*x.shape[:2], -1))
    x = checkpoint_name(x + out, "middle")
    y = RMSNorm(self.norm_eps, name="mlp_norm")(x)
    gate, up = together([dense(self.mlp_width, name=p) for p in ("gate_proj", "up_proj")], y)
    y = nn.silu(checkpoint_name(gate, "gate")) * checkpoint_name(up, "up")
    x = x + dense(x.shape[-1], name="down_proj")(y)
    return nn.with_logical_constraint(x, BLOCK_AXES), cache


class Decoder(nn.Module):
  """Embeddings in, hidden states out; `embed` and `logits` are its two ends."""

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  rope: Rope
  norm_eps: float
  tie_embeddings: bool
  attention_bias: bool = False
  sliding_window: int = 0
  window_from_layer: int = 0
  initializer_range: float = 0.02
  scan_unroll: int = 1
  remat: str = "none"  # a row of remat.POLICIES
  dtype: jnp.dtype = jnp.float32
  dense: Any = nn.Dense
  attention: Attention = Attention()

  def setup(self) -> None:
    normal = nn.initializers.normal(self.initializer_range)
    self.token_embed = nn.Embed(
      self.vocab_size, self.width, dtype=self.dtype, embedding_init=normal
    )
    attention = dataclasses.replace(
      self.attention, window=self.sliding_window,
      mixed_layers=bool(self.sliding_window) and 0 < self.window_from_layer < self.layers,
    )  # fmt: skip
    self.blocks = nn.scan(
      remat.wrap(Block, self.remat), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
      in_axes=(0, 0, *[nn.broadcast] * 5), length=self.layers,
      unroll=min(self.scan_unroll, self.layers),
    )(
      self.heads, self.kv_heads, self.head_dim, self.mlp_width, self.attention_bias, self.norm_eps,
      self.initializer_range, self.dtype, self.dense, attention, name="layers",
    )  # fmt: skip
    self.final_norm = RMSNorm(self.norm_eps)
    if not self.tie_embeddings:
      self.lm_head = nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=normal)

  def embed(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
    return self.token_embed(tokens)

  @nn.nowrap
  def head_paths(self) -> tuple[str, ...]:
    """Paths of the parameters that `logits` uses, in the tree of the whole model."""
    leaf = "token_embed/embedding" if self.tie_embeddings else "lm_head/kernel"
    return (f"language_model/{leaf}",)

  def logits(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V] float32
    head = self.token_embed.attend if self.tie_embeddings else self.lm_head
    return head(hidden).astype(jnp.float32)

  def __call__(
    self, embeds: jax.Array, positions: jax.Array, segments: jax.Array, cache: KVCache | None = None
  ) -> tuple[jax.Array, KVCache | None]:
    """[B, T, D], [B, T], [B, T] -> [B, T, D] and the cache with T more entries in each row.

    Entries with segment 0 are padding: nothing attends to them. With a cache, a row's padding must
    follow its tokens; its length then counts the tokens only.
    """
    index = jnp.broadcast_to(jnp.arange(embeds.shape[1]), segments.shape)
    layer_cache, start = None, None
    key_segments, key_index, key_positions = segments, index, positions
    if cache is not None:
      start = cache.length
      index = index + start[:, None]
      key_segments = write(cache.segments, segments, start)
      key_positions = write(cache.positions, positions, start)
      key_index = jnp.broadcast_to(jnp.arange(key_segments.shape[1]), key_segments.shape)
      layer_cache = (cache.keys, cache.values)
    mask = causal_mask(index, segments, key_index, key_segments)
    windowed, near = None, None
    if self.sliding_window:
      windowed = jnp.arange(self.layers) >= self.window_from_layer
      near = window_mask(positions, key_positions, self.sliding_window)
    angles = self.rope.angles(self.head_dim, positions, segments)
    x = nn.with_logical_constraint(embeds, BLOCK_AXES)
    x, layer_cache = self.blocks(
      x, layer_cache, windowed, angles, mask, segments if cache is None else None, near, start
    )
    if cache is not None and layer_cache is not None:
      length = cache.length + jnp.sum(segments > 0, axis=1)
      cache = KVCache(layer_cache[0], layer_cache[1], key_segments, key_positions, length)
    return self.final_norm(x), cache
