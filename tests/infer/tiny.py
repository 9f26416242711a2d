"""A random tiny model with decided answers, and slow and obvious generation as an oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.engine import Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.infer.requests import key_of
from llava_sp_jax.models import build

ROOM = 288  # positions of the oracle's rows


def random_model(config: config_lib.Config, seed: int = 1) -> Pretrained:
  """Weights far from their small beginnings, so that answers differ; some end early."""
  params = jax.jit(lambda r: build.initialize(config.model, r))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [
    0.2 * np.asarray(jax.random.normal(k, x.shape)) for k, x in zip(keys, leaves, strict=True)
  ]
  params = jax.tree.unflatten(tree, [np.asarray(x) + n for x, n in zip(leaves, noise, strict=True)])
  tokenizer = Tokenizer(config.data.tokenizer)
  assert tokenizer.eos_id is not None
  params["language_model"]["lm_head"]["kernel"][:, tokenizer.eos_id] *= 2.5
  return Pretrained(config, params, tokenizer)


class Oracle:
  """Runs the whole sequence anew for every token, with the stacked model that training uses."""

  def __init__(self, model: Pretrained):
    self.model = model
    self.module = build.model(model.config.model)
    self.prompts = Prompts(
      model.config, model.tokenizer, PictureCache.of(model.config), share=False
    )
    self.run = jax.jit(self._run)

  def _run(self, params: Any, tokens: Any, slots: Any, tiles: Any, length: Any) -> Any:
    index = jnp.arange(ROOM)[None]
    segments = jnp.where(index < length, 1 << 12, 0)
    variables = {"params": params}
    hidden: Any = self.module.apply(variables, tokens, index, segments, tiles, slots)
    return self.module.apply(variables, hidden[0, length - 1], method="logits")

  def logits(self, request: Request, ids: tuple[int, ...]) -> np.ndarray:
    """Of the token that follows the prompt and `ids`. -> [V]."""
    ((tokens, slots), tiles) = self._prompt(request)
    used = len(tokens) + len(ids)
    fill = ROOM - used
    whole = np.concatenate([tokens, ids, np.zeros(fill, np.int32)]).astype(np.int32)
    slots = np.concatenate([slots, np.full(ROOM - len(slots), -1, np.int32)])
    return np.asarray(self.run(self.model.params, whole[None], slots[None], tiles[None], used))

  @functools.lru_cache(maxsize=64)  # noqa: B019
  def _prompt(self, request: Request) -> Any:
    (piece,) = self.prompts(request).pieces
    files = {key_of(x): x for x in request.images}
    stacks = {key: self.prompts.pictures.tiles(key, x) for key, x in files.items()}
    side = self.model.config.model.tower.image_size
    tiles = [stacks[key][i] for key, i in piece.tiles] or [np.zeros((side, side, 3), np.float32)]
    return (piece.tokens, piece.slots), np.stack(tiles)

  def greedy(self, request: Request, new: int) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    while len(ids) < new:
      token = int(self.logits(request, ids).argmax())
      if token in self.prompts.stop_ids:
        break
      ids = (*ids, token)
    return ids

  def margin(self, request: Request, ids: tuple[int, ...], new: int) -> float:
    """The smallest lead of an answer's tokens over the next best, that of its end included."""
    leads = []
    for length in range(min(len(ids) + 1, new)):
      best, second = np.sort(self.logits(request, ids[:length]))[:-3:-1]
      leads.append(float(best - second))
    return min(leads)

  def beams(self, request: Request, new: int, count: int) -> list[tuple[float, tuple[int, ...]]]:
    """(score, ids) of the results, best first, by beam search over Python lists: transformers' rule, see `infer.beam`."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    results: list[tuple[float, tuple[int, ...]]] = []
    for step in range(1, new + 1):
      found = []
      for score, ids in running:
        logits = self.logits(request, ids).astype(np.float64)
        shares = logits - logits.max()
        shares -= np.log(np.exp(shares).sum())
        found += [(score + s, (*ids, token)) for token, s in enumerate(shares)]
      found = sorted(found, reverse=True)[: (1 + len(self.prompts.stop_ids)) * count]
      for score, ids in found[:count]:
        if ids[-1] in self.prompts.stop_ids:
          results.append((score / step, ids[:-1]))
        elif step == new:
          results.append((score / step, ids))
      results = sorted(results, reverse=True)[:count]
      running = [f for f in found if f[1][-1] not in self.prompts.stop_ids][:count]
      if len(results) == count and results[-1][0] >= running[0][0] / step:
        break
    return results


def questions(folder: Path) -> list[Request]:
  """Questions of several lengths about six images, about two at once, and about none."""
  texts = (
    "what is it?",
    "is it blue, teal or green?",
    "red?",
    "what colour is it, and is it the same colour as the sky over the sea is?",
  )
  image = [folder / "images" / f"{i}.png" for i in range(6)]
  asked = [Request(text, (image[i],)) for i in range(6) for text in texts[: 2 + i % 3]]
  asked.insert(5, Request("what is it?"))
  asked.insert(9, Request("are they the same?", (image[0], image[3])))
  asked.insert(12, Request("is <image> like <image>?", (image[3], image[0])))
  asked.append(Request("what is it?", (image[0],), system="Answer briefly."))
  return asked
