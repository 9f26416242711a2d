"""Computes a LLaMA-family decoder: grouped-query attention, gated MLP, one scan over the layers.

Shape letters:  B rows . T tokens . D width . N heads . K key-value heads . H head width
                V vocabulary . S capacity of the cache

Families differ in sizes and switches: LLaMA, Mistral (sliding window), Qwen2 (biases).
Source: Hugging Face `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from llava_sp_jax.models import remat
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.attention import AttentionChoice, attend
from llava_sp_jax.models.cache import FLOAT, HeldKeys, HeldValues, KVCache, New
from llava_sp_jax.models.cached_attention import attend_cached
from llava_sp_jax.models.layers import RMSNorm, Rope, causal_mask, rotary, window_mask
from llava_sp_jax.models.lora import fused

BLOCK_AXES = ("batch", "length", None)  # logical axes of the activations between blocks


class Past(NamedTuple):
  """Holds which positions of a cache each new position sees; `near`, which are in its window."""

  seen: Bool[Array, "B T S"]
  near: Bool[Array, "B T S"] | None


class DecoderBlock(nn.Module):
  """Computes one layer, and returns its new keys and values, or None without a cache.

  `cache` has the layer's keys [B, K, H, S] and values [B, K, S, H], or is None. `windowed` says
  whether the layer is restricted to `near`; both are None without a sliding window.
  """

  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  attention_bias: bool
  norm_eps: float
  initializer_range: float
  dtype: DTypeLike
  dense: Any
  attention: AttentionChoice

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    cache: tuple[HeldKeys, HeldValues] | None,
    windowed: Bool[Array, ""] | None,
    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    mask: Bool[Array, "B T T"],
    segments: Int[Array, "B T"] | None,
    near: Bool[Array, "B T T"] | None,
    past: Past | None,
  ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B K H T"], Float[Array, "B K T H"]] | None]:
    dense = functools.partial(
      self.dense,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(self.initializer_range),
    )
    y = RMSNorm(self.norm_eps, name="attn_norm")(x)

    counts = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
    made = fused(
      [dense(n * self.head_dim, use_bias=self.attention_bias, name=p) for p, n in counts.items()], y
    )
    q, k, v = (h.reshape(*y.shape[:2], -1, self.head_dim) for h in made)
    if near is not None and windowed is not None:
      mask = mask & (near | ~windowed)
    new = None
    if cache is not None:  # which holds rotated keys
      q, k = rotary(q, *angles), rotary(k, *angles)
      new = (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
    if past is not None and cache is not None and new is not None:
      seen = past.seen
      if past.near is not None and windowed is not None:
        seen = seen & (past.near | ~windowed)
      out = attend_cached(self.attention, q, cache, seen, new, mask)
    else:
      out = attend(self.attention, q, k, v, mask, segments, angles if cache is None else None)
    out = dense(x.shape[-1], name="o_proj")(out.reshape(*x.shape[:2], -1))
    x = checkpoint_name(x + out, "middle")
    y = RMSNorm(self.norm_eps, name="mlp_norm")(x)
    gate, up = fused([dense(self.mlp_width, name=p) for p in ("gate_proj", "up_proj")], y)
    y = nn.silu(checkpoint_name(gate, "gate")) * checkpoint_name(up, "up")
    x = x + dense(x.shape[-1], name="down_proj")(y)
    return nn.with_logical_constraint(x, BLOCK_AXES), new


class Decoder(nn.Module):
  """Maps embeddings to hidden states; `embed` and `logits` are its input and output layers."""

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
  stacked: bool = True  # parameters of all layers as one; otherwise `layers_0`, `layers_1` ..
  dtype: DTypeLike = jnp.float32
  dense: Any = nn.Dense
  attention: AttentionChoice = AttentionChoice()
  cache_format: str = FLOAT  # a row of cache.FORMATS; for those who allocate one

  def setup(self) -> None:
    normal = nn.initializers.normal(self.initializer_range)
    self.token_embed = nn.Embed(
      self.vocab_size, self.width, dtype=self.dtype, embedding_init=normal
    )
    attention = dataclasses.replace(
      self.attention,
      window=self.sliding_window,
      mixed_layers=bool(self.sliding_window) and 0 < self.window_from_layer < self.layers,
    )
    sizes = (
      self.heads,
      self.kv_heads,
      self.head_dim,
      self.mlp_width,
      self.attention_bias,
      self.norm_eps,
      self.initializer_range,
      self.dtype,
      self.dense,
      attention,
    )
    if self.stacked:
      self.blocks = nn.scan(
        remat.wrap(DecoderBlock, self.remat),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, 0, *[nn.broadcast] * 5),
        length=self.layers,
        unroll=min(self.scan_unroll, self.layers),
      )(*sizes, name="layers")
    else:
      self.blocks = [DecoderBlock(*sizes, name=f"layers_{i}") for i in range(self.layers)]
    self.final_norm = RMSNorm(self.norm_eps)
    if not self.tie_embeddings:
      self.lm_head = nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=normal)

  def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the embeddings of token ids."""
    return self.token_embed(tokens)

  @nn.nowrap
  def head_paths(self) -> tuple[str, ...]:
    """Returns the paths of the parameters that `logits` reads, in the tree of the whole model."""
    leaf = "token_embed/embedding" if self.tie_embeddings else "lm_head/kernel"
    return (f"language_model/{leaf}",)

  def logits(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
    """Returns the float32 logits of hidden states, by the output layer or the tied embedding."""
    head = self.token_embed.attend if self.tie_embeddings else self.lm_head
    return head(hidden).astype(jnp.float32)

  def __call__(
    self,
    embeds: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: KVCache | None = None,
  ) -> tuple[Float[Array, "B T D"], New | None]:
    """Returns the hidden states, and with a cache the new keys and values, for `cache.append`.

    Args:
      embeds: embeddings of text and image tokens.
      positions: of each token in its sample, from 0; with a cache they continue from its length.
      segments: which positions see each other (`layers.BRANCHES`). 0 is padding, to which no
        position attends.
      cache: keys and values of earlier positions. Then each row is one sample, and its padding must
        follow its tokens. None for training.
    """
    index = jnp.broadcast_to(jnp.arange(embeds.shape[1]), segments.shape)
    mask = causal_mask(index, segments, index, segments)
    windowed, near, past, held = None, None, None, None
    if self.sliding_window:
      windowed = jnp.arange(self.layers) >= self.window_from_layer
      near = window_mask(positions, positions, self.sliding_window)
    if cache is not None:
      held = (cache.keys, cache.values)
      past = self._past(cache, positions) if cache.capacity else None
    angles = self.rope.angles(self.head_dim, positions, segments)
    x = nn.with_logical_constraint(embeds, BLOCK_AXES)
    shared = (angles, mask, None if past else segments, near, past)
    if self.stacked:
      x, new = self.blocks(x, held, windowed, *shared)
    else:
      made = []
      for i, block in enumerate(self.blocks):
        mine = None if held is None else (held[0][i], held[1][i])
        x, pair = block(x, mine, None if windowed is None else windowed[i], *shared)
        made.append(pair)
      new = None if cache is None else tuple(zip(*made, strict=True))
    return self.final_norm(x), None if cache is None else New(*new)

  def _past(self, cache: KVCache, positions: Int[Array, "B T"]) -> Past:
    kept = jnp.arange(cache.capacity)
    rows, count = positions.shape
    seen = jnp.broadcast_to(kept < cache.length[:, None, None], (rows, count, cache.capacity))
    if not self.sliding_window:
      return Past(seen, None)
    kept = jnp.broadcast_to(kept, (rows, cache.capacity))
    return Past(seen, window_mask(positions, kept, self.sliding_window))
