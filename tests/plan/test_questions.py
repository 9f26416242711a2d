"""What an engine would run for questions, and what is predicted from it."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.infer.engine import Engine, Generation
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.plan import answers, evaluation, questions
from tests.conftest import ConfigMaker
from tests.infer import tiny

NEW = 5


class Watched(Engine):
  """An engine that counts the programs it runs."""

  def _make_programs(self, strategy: Any, mesh: Any) -> Programs:
    calls = self.calls = collections.Counter[Any]()

    class Counted(Programs):
      def _run(self, key: Any, *arguments: Any, **options: Any) -> Any:
        calls[key] += 1
        return super()._run(key, *arguments, **options)

    model = self.pretrained
    return Counted(model.config, model.params, strategy, mesh, self.counts)


def counted(config: config_lib.Config, asked: Any, batch: int) -> questions.Counted:
  """With shapes in place of arrays, which annotations do not allow."""
  mesh = mesh_lib.create(config_lib.MeshConfig(), devices=jax.devices()[:1])
  tokenizer = Tokenizer(config.data.tokenizer)
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    engine = questions.CountedEngine(
      config, tokenizer, mesh, batch, Generation(max_new_tokens=NEW + 1), lambda number: NEW
    )
    return engine.counted(asked)
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.guard
def test_the_engine_runs_what_is_counted(tiny_config: ConfigMaker, tiny_data: Path) -> None:
  """Questions about shared and about own images, answers of a known length, rows that are refilled."""
  config = tiny_config("finetune")
  asked = tiny.questions(tiny_data)
  found = counted(config, asked, 4)
  settings = Generation(max_new_tokens=NEW, ignore_eos=True)
  engine = Watched(tiny.random_model(config), 4, settings)
  assert {len(a.ids) for a in engine.answer(asked)} == {NEW}
  theirs = {k: n for k, n in engine.calls.items() if k[0] in answers.ENTRIES}
  theirs = {k: n for k, n in theirs.items() if k[0] != "decode"}
  mine = {k: n for k, n in found.runs.items() if k[0] != "decode"}
  assert _sizes(mine) == _sizes(theirs)
  steps = sum(n for k, n in found.runs.items() if k[0] == "decode")
  assert steps == engine.counts.decode_steps
  assert found.images == engine.counts.distinct_images
  assert (found.tokens, found.failed) == (NEW * len(asked), 0)


def _sizes(runs: Any) -> Any:
  """Without the capacity of rows, which depends on the most tokens of an answer."""
  return {(k[:2] + k[3:] if k[0] == "admit" else k): n for k, n in runs.items()}


def test_sizes_with_most_of_the_work_are_compiled() -> None:
  runs = {("grow", 64, 1, n, 0, 1): 1 for n in range(1, 12)} | {("encode", 1): 7}
  wide = {("grow", 64, 1, 4000, 0, 1): 1}
  work = {"grow": lambda k: k[3], "encode": lambda k: k[1]}
  chosen = evaluation.chosen([runs, wide], lambda k: float(work[str(k[0])](k)))
  assert chosen[0] == ("grow", 64, 1, 4000, 0, 1)
  assert ("encode", 1) in chosen
  assert len(chosen) == 2, "the others have less than a twentieth of the work"


def test_other_sizes_take_as_long_as_their_work() -> None:
  known = {("grow", 64, 1, 100, 0, 1): 2.0, ("grow", 64, 1, 10, 0, 1): 0.5, ("encode", 1): 9.0}
  work = lambda key: float(key[3]) if key[0] == "grow" else 1.0  # noqa: E731
  assert evaluation._seconds(("grow", 64, 1, 80, 0, 1), known, work) == pytest.approx(1.6)
  assert evaluation._seconds(("grow", 64, 1, 20, 0, 1), known, work) == pytest.approx(1.0)
  assert evaluation._seconds(("encode", 1), known, work) == 9.0
