"""The engine: equal to the slow oracle, whatever is batched, shared, or laid out how."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.engine import Answer, Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained
from tests.infer.tiny import Oracle, random_model

NEW = 6
GENERATION = Generation(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def oracle(model: Pretrained) -> Oracle:
  return Oracle(model)


@pytest.fixture(scope="module")
def wanted(oracle: Oracle, asked: list[Request]) -> list[tuple[int, ...]]:
  return [oracle.greedy(request, NEW) for request in asked]


@pytest.fixture(scope="module")
def engine(model: Pretrained) -> Engine:
  return Engine(model, 4, GENERATION)


def ids(answers: Any) -> list[tuple[int, ...]]:
  found = list(answers)
  assert not [a.error for a in found if a.error]
  return [a.ids for a in found]


def test_answers_are_those_of_the_uncached_model(
  engine: Engine, asked: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  """Rows that end early are refilled, prefixes are shared, several images or none: same tokens."""
  assert len({len(w) for w in wanted}) > 1, "some answers must end before the others"
  assert len(set(wanted)) > 6
  assert ids(engine.answer(asked)) == wanted


def test_margins_are_the_smallest_lead_of_an_answer(
  engine: Engine, oracle: Oracle, asked: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  """Over all its tokens and its end, where it ends before the limit."""
  answers = list(engine.answer(asked))
  margins = [oracle.margin(r, found, NEW) for r, found in zip(asked, wanted, strict=True)]
  np.testing.assert_allclose([a.margin for a in answers], margins, atol=2e-4)
  assert any(len(found) < NEW for found in wanted), "the lead of an end is among them"


def test_another_state_of_the_model_answers_by_itself_alone(
  engine: Engine,
  model: Pretrained,
  oracle: Oracle,
  asked: list[Request],
  wanted: list[tuple[int, ...]],
) -> None:
  """As between the steps of training: neither images nor prefixes of before are taken for it."""
  some, other = asked[:5], random_model(model.config, seed=2)
  assert ids(engine.answer(some)) == wanted[:5]
  compiled = engine.counts.compiles
  twin = Oracle(other)
  twin.run = oracle.run
  theirs = [twin.greedy(request, NEW) for request in some]
  assert theirs != wanted[:5]
  engine.load(other)
  assert ids(engine.answer(some)) == theirs
  engine.load(model)
  assert ids(engine.answer(some)) == wanted[:5]
  assert engine.counts.compiles == compiled


def test_a_prompt_may_fill_all_positions_of_the_model(
  engine: Engine, asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
  length = engine._prompts(asked[0]).length
  monkeypatch.setattr(engine._rows, "_layout", EngineLayout(positions=length + NEW))
  assert not next(engine.answer(asked[:1])).error
  monkeypatch.setattr(engine._rows, "_layout", EngineLayout(positions=length + NEW - 1))
  error = next(engine.answer(asked[:1])).error
  assert error.startswith(
    f"the prompt has {length} positions, which with {NEW} new tokens are more than the limit of"
  )


def test_a_decode_step_copies_nothing_of_the_cache(engine: Engine, asked: list[Request]) -> None:
  """The compiler copies a buffer that it cannot see to be read before it is written."""
  list(engine.answer(asked[:1]))
  programs = engine._programs
  for (name, *sizes), compiled in programs._table.items():
    if name != "decode":
      continue
    cache = programs.state(*sizes).cache
    shapes = "|".join({",".join(map(str, x.shape)) for x in (cache.keys[0], cache.values[0])})
    text = compiled.as_text()
    assert re.search(rf"f32\[({shapes})\]", text), "the cache is there by these shapes"
    assert not re.findall(rf"= f32\[(?:{shapes})\]\S* copy\(", text)


LAYOUTS = {
  "one at a time": (1, EngineLayout()),
  "nothing shared": (4, EngineLayout(share=False)),
  "growing sizes": (4, EngineLayout(prefix=2, suffix=4, capacity=8, growing=True)),
  "other buckets, no memory": (
    3,
    EngineLayout(prefix=48, suffix=24, capacity=96, prefix_bytes=1, feature_bytes=1, window=3),
  ),
}


TIERS = {
  "one at a time": [pytest.mark.slow],
  "nothing shared": [pytest.mark.slow],
  "growing sizes": [pytest.mark.guard],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=TIERS.get(n, [])) for n in LAYOUTS])
def test_no_answer_depends_on_the_layout(
  name: str, model: Pretrained, asked: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  batch, layout = LAYOUTS[name]
  assert ids(Engine(model, batch, GENERATION, layout=layout).answer(asked)) == wanted


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param((4, 1, 1), marks=pytest.mark.slow),
    pytest.param((2, 2, 2), marks=pytest.mark.slow),
    pytest.param((1, 4, 2), marks=pytest.mark.guard),
  ],
)
def test_no_answer_depends_on_the_mesh(
  sizes: tuple[int, ...], model: Pretrained, asked: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  data, fsdp, tensor = sizes
  config = config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  mesh = mesh_lib.create(config, devices=jax.devices()[: data * fsdp * tensor])
  engine = Engine(model, 8, GENERATION, mesh=mesh)  # more than one row for each part of the mesh
  assert ids(engine.answer(asked)) == wanted
  kernel = engine._programs._params["language_model"]["layers_0"]["q_proj"]["kernel"]
  assert len(kernel.addressable_shards[0].data) * fsdp == kernel.shape[0]
  kept = [x for value, _ in engine._rows.prefixes._kept._values.values() for x in value]
  assert kept
  assert {x.size // x.addressable_shards[0].data.size for x in kept} == {data * fsdp * tensor}


@pytest.mark.guard
def test_beams_stay_on_the_devices_of_their_row(model: Pretrained, asked: list[Request]) -> None:
  settings = dataclasses.replace(GENERATION, num_beams=2)
  mesh = mesh_lib.create(config_lib.MeshConfig(data=2), devices=jax.devices()[:2])
  few = asked[:3]
  divided = ids(Engine(model, 4, settings, mesh=mesh).answer(few))
  assert divided == ids(Engine(model, 4, settings).answer(few))


def test_answers_come_as_they_are_ready(
  engine: Engine, asked: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  taken: list[int] = []

  def lazily() -> Any:
    for i, request in enumerate(asked * 3):
      taken.append(i)
      yield request

  small = dataclasses.replace(engine._layout, window=5)
  engine._layout, before = small, engine._layout
  stream = engine.as_ready(lazily())
  first = next(stream)
  assert len(taken) < len(asked) * 2
  rest = list(stream)
  engine._layout = before
  found = dict([first, *rest])
  assert [found[i].ids for i in range(len(found))] == wanted * 3
  order = [i for i, _ in [first, *rest]]
  assert order != sorted(order)


def test_two_runs_of_one_engine_never_share_its_rows(
  engine: Engine, asked: list[Request], wanted: list[tuple[int, ...]]
) -> None:
  first = engine.answer(asked)
  assert next(first).ids == wanted[0]
  for other in (engine.answer(asked), engine.stream(asked[1])):
    with pytest.raises(RuntimeError, match="is answering already: end or close that iterator"):
      next(other)
  with pytest.raises(RuntimeError, match="is answering already"):
    engine.warm_up(asked[:1])
  assert ids(first) == wanted[1:]
  left = engine.answer(asked)
  next(left)
  left.close()
  assert ids(engine.answer(asked[:3])) == wanted[:3]


def test_bad_requests_have_errors_and_hurt_nobody(
  engine: Engine, asked: list[Request], wanted: list[tuple[int, ...]], tmp_path: Path
) -> None:
  (tmp_path / "broken.png").write_bytes(b"no picture")
  bad = [
    (Request("what?", (tmp_path / "absent.png",)), "absent.png: no such file"),
    (Request("what?", (tmp_path / "broken.png",)), "broken.png: cannot be decoded"),
    (Request("what?", (tmp_path / "broken.png",)), "broken.png: cannot be decoded"),
    (Request("what?", (b"nothing",)), "of 7 bytes: cannot be decoded"),
    (Request("<image> or <image>?", asked[0].images), "the text has 2 <image> but"),
    (Request("word " * 5000), "more than the limit of 4096"),
    (Request("what?", (3,)), "or a PIL image, found int"),  # type: ignore[arg-type]
  ]
  errors = engine.counts.errors
  mixed = list(itertools.chain.from_iterable(zip([r for r, _ in bad], asked, strict=False)))
  answers = list(engine.answer([*mixed, *asked]))
  for (_, message), answer in zip(bad, answers[0 : 2 * len(bad) : 2], strict=True):
    assert message in answer.error
    assert (answer.text, answer.ids) == ("", ())
  assert [a.ids for a in answers[1 : 2 * len(bad) : 2]] == wanted[: len(bad)]
  assert [a.ids for a in answers[2 * len(bad) :]] == wanted
  assert engine.counts.errors == errors + len(bad)


VANISHED: dict[str, tuple[Callable[[Path], Any], str]] = {
  "deleted": (Path.unlink, "0.png: no such file"),
  "a folder": (lambda path: (path.unlink(), path.mkdir()), "0.png: not a regular file"),
  "torn": (lambda path: path.write_bytes(path.read_bytes()[:60]), "0.png: cannot be decoded"),
}


@pytest.mark.parametrize("kind", VANISHED)
def test_an_image_that_vanishes_costs_its_own_questions(
  engine: Engine,
  asked: list[Request],
  wanted: list[tuple[int, ...]],
  tmp_path: Path,
  kind: str,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Between its first reading and another, when its pixels, features and prefixes were dropped."""
  vanish, message = VANISHED[kind]
  (source,) = asked[0].images
  path = tmp_path / "0.png"
  shutil.copy(str(source), path)
  monkeypatch.setattr(
    engine, "_layout", dataclasses.replace(engine._layout, feature_bytes=1, prefix_bytes=1)
  )
  engine.forget()
  gone, others = Request(asked[0].question, (path,)), asked[2:4]
  assert ids(engine.answer([gone, *others])) == [wanted[0], *wanted[2:4]]
  vanish(path)
  errors = engine.counts.errors
  answers = list(engine.answer([others[0], gone, gone, others[1]]))
  assert [a.ids for a in answers] == [wanted[2], (), (), wanted[3]]
  assert [message in a.error for a in answers] == [False, True, True, False]
  assert engine.counts.errors == errors + 2
  engine.warm_up([gone, others[0]])
  assert ids(engine.answer(others)) == wanted[2:4]
  monkeypatch.undo()
  engine.forget()


def test_an_image_may_be_a_path_bytes_or_a_picture(engine: Engine, asked: list[Request]) -> None:
  (path,) = asked[0].images
  assert isinstance(path, Path)
  with Image.open(path) as picture:
    forms = (path, str(path), path.read_bytes(), picture.convert("RGB"))
  answers = [next(engine.answer([Request("what is it?", (form,))])) for form in forms]
  assert len({a.ids for a in answers}) == 1


def test_streaming_says_the_same_text(engine: Engine, asked: list[Request]) -> None:
  whole = [a.text for a in engine.answer(asked[:4])]
  parts = [list(engine.stream(r)) for r in asked[:4]]
  assert ["".join(p) for p in parts] == whole
  assert max(map(len, parts)) > 1
  with pytest.raises(ValueError, match="no such file"):
    list(engine.stream(Request("what?", ("absent.png",))))


def test_a_stop_string_ends_an_answer_where_it_begins(
  model: Pretrained, engine: Engine, asked: list[Request]
) -> None:
  free: list[Answer] = list(engine.answer(asked))
  # Half a character is another text once its other half is there, so it cannot be a stop string.
  long = max((a for a in free if "\ufffd" not in a.text), key=lambda a: len(a.text))
  stop = long.text[len(long.text) // 2 :].strip()[:3]  # answers are shown without outer blanks
  assert stop.strip()
  stopped = Engine(model, 4, dataclasses.replace(GENERATION, stop=(stop, "never said")))
  found = list(stopped.answer(asked))
  for before, after in zip(free, found, strict=True):
    assert after.text == before.text.split(stop)[0].strip()
    assert after.ids == before.ids[: len(after.ids)]
  cut = found[free.index(long)]
  assert cut.text != long.text
  assert "".join(stopped.stream(asked[free.index(long)])) == cut.text


def test_beam_search_is_that_of_the_oracle(
  model: Pretrained, oracle: Oracle, asked: list[Request]
) -> None:
  count = 3
  some = asked[:4]
  engine = Engine(model, 2, dataclasses.replace(GENERATION, num_beams=count))
  results = [oracle.beams(r, NEW, count) for r in some]
  wanted = [result[0][1] for result in results]
  answers = list(engine.answer(some))
  assert [a.ids for a in answers] == wanted
  leads = [result[0][0] - result[1][0] for result in results]
  np.testing.assert_allclose([a.margin for a in answers], leads, atol=2e-4)
  assert wanted != [oracle.greedy(r, NEW) for r in some]


def test_samples_depend_on_the_request_and_the_seed_only(
  model: Pretrained, asked: list[Request]
) -> None:
  def drawing(batch: int, seed: int) -> Engine:
    generation = Generation(max_new_tokens=NEW, temperature=1.5, top_k=20, top_p=0.95, seed=seed)
    return Engine(model, batch, generation, layout=EngineLayout(share=False))

  alone, together = drawing(1, 0), drawing(4, 0)
  one = ids(alone.answer(asked[:4]))
  assert ids(together.answer(asked[:4])) == one
  assert ids(drawing(4, 1).answer(asked[:4])) != one
  some = (3, 1)  # as a run that was killed, or a part of one, asks them
  left = [dataclasses.replace(asked[i], number=i) for i in some]
  assert ids(together.answer(left)) == [one[i] for i in some]
  assert ids(together.answer([asked[i] for i in some])) != [one[i] for i in some]


def test_a_picture_that_cannot_be_read_is_not_kept(model: Pretrained) -> None:
  """Its error is, which is raised each time, and holds no frame that would hold the picture."""
  pictures = PictureCache.of(model.config)
  for _ in range(2):
    with pytest.raises(SampleError):
      pictures.plan("x", b"no picture")
  kept = pictures._plans["x"]
  assert isinstance(kept, SampleError)
  assert kept.__traceback__ is None
