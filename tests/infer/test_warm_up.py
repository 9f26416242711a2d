"""What the engine computes: each image once, and after its warm-up nothing is compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained
from tests.infer.test_engine import GENERATION, ids


def test_each_image_is_encoded_once_and_nothing_is_compiled_twice(
  model: Pretrained, asked: list[Request], tiny_data: Path
) -> None:
  asked = asked[:9]  # about three images, and one about none
  engine = Engine(model, 4, GENERATION, layout=EngineLayout(suffix=64))  # one bucket of questions
  engine.warm_up(asked)
  engine.forget()
  counts = engine.counts
  before = dataclasses.replace(counts)
  list(engine.answer(asked))
  assert counts.compiles == before.compiles
  for name in ("distinct_images", "encoder_calls", "prefills", "prefix_hits"):
    setattr(counts, name, getattr(counts, name) - getattr(before, name))
  assert (counts.distinct_images, counts.encoder_calls, counts.encoder_ratio) == (3, 3, 1.0)
  assert counts.images_asked == sum(bool(r.images) for r in asked) == 8
  assert counts.prefills == 3 + 1  # the system text goes before all images
  assert counts.prefix_hits == 8 - 3
  assert counts.requests == counts.admitted == len(asked)
  before = dataclasses.replace(counts)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
  )
  again = [Request(r.question + " ", r.images, r.system) for r in reversed(asked)]
  list(engine.answer([*again, *asked]))
  assert counts.compiles == before.compiles
  assert compiled == []
  assert counts.encoder_calls == before.encoder_calls
  assert counts.prefills == before.prefills
  jax.jit(lambda x: x + 41)(np.ones(3)).block_until_ready()
  assert compiled, "the listener must hear of compilations"


@pytest.mark.guard
def test_warm_up_covers_prompts_that_meet_in_a_group(model: Pretrained, tiny_data: Path) -> None:
  """Prefixes of one size that are made of pieces of other sizes, before questions of other lengths."""
  layout = EngineLayout(capacity=1, suffix=4, groups=2)
  engine = Engine(model, 2, Generation(max_new_tokens=1), layout=layout)
  images = (tiny_data / "images" / "0.png",)

  def request(words: int, question: str) -> Request:
    return Request(question, images, system="a " * words)

  def sizes(words: int) -> list[int]:
    *before, _ = engine._prompts(request(words, "red?")).pieces
    return [engine._rows.prefixes.capacity(before[: i + 1]) for i in range(len(before))]

  short = next(
    n
    for n in range(8, 40)
    if len(sizes(n)) == 2 and sizes(n)[0] < sizes(n + 1)[0] and sizes(n)[1] == sizes(n + 1)[1]
  )
  long = "is it blue, or teal, or green?"
  asked = [request(short, "red?"), request(short, long), request(short + 1, "red?")]
  engine.warm_up(asked)
  engine.forget()
  before = engine.counts.compiles
  ids(engine.answer([asked[2], asked[1], *asked]))
  assert engine.counts.compiles == before
