"""What a trained model answers is what its training would have it say: one truth, end to end.

A tiny model is trained by the demo's recipe through the command line. For over 200 questions the
engine's greedy answer is then given to training as the reply: in the forward pass of training, each
of its tokens must be the most likely one, by the lead that the engine reports, up to the end mark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, conversation, pipeline, reading
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.infer.requests import Answer
from llava_sp_jax.models import build
from tests.conftest import COLORS, REPOSITORY, VOCAB_SIZE

SMALL = {
  "model.tower.image_size": 24,
  "model.tower.patch_size": 4,
  "model.tower.width": 32,
  "model.tower.layers": 2,
  "model.tower.mlp_width": 64,
  "model.language_model.vocab_size": VOCAB_SIZE,
  "model.language_model.width": 32,
  "model.language_model.heads": 4,
  "model.language_model.kv_heads": 2,
  "model.language_model.head_dim": 8,
  "model.language_model.mlp_width": 64,
  "model.projector.token_width": 16,
  "train.batch_size": 8,
  "train.log_every": 20,
}
STAGES = {
  "pretrain": {"train.steps": 20, "data.row_length": 80},
  "finetune": {"train.steps": 80, "data.row_length": 200},
}
NEW_TOKENS = 12
# A reply is compared from the third decimal on: folded adapters and cached keys round otherwise.
LEAD = 5e-3


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Both stages of the demo's recipe, at tiny sizes."""
  folder = tmp_path_factory.mktemp("one_reading")
  for stage, changes in STAGES.items():
    init = f",init={folder}/pretrain" if stage == "finetune" else ""
    recipe = f"{REPOSITORY}/configs/easy_vqa.py:stage={stage},data={tiny_data}{init}"
    values = [f"--config.{key}={value}" for key, value in {**SMALL, **changes}.items()]
    assert cli.main(["train", f"--config={recipe}", f"--workdir={folder}/{stage}", *values]) == 0
  return folder / "finetune"


@pytest.fixture(scope="module")
def asked(tiny_data: Path) -> list[Request]:
  questions = [
    f"{start} {color}?"
    for color in COLORS
    for start in ("is it", "what colour is it,", "sure that it is not")
  ]
  images = [tiny_data / "images" / f"{i}.png" for i in range(9)]
  return [Request(question, (image,)) for image in images for question in questions]


@pytest.fixture(scope="module")
def engine(run: Path) -> Engine:
  return Engine(pretrained.from_run(run), 16, Generation(max_new_tokens=NEW_TOKENS))


@pytest.fixture(scope="module")
def answers(engine: Engine, asked: list[Request]) -> list[Answer]:
  return list(engine.answer(asked))


def batches(
  run: Path, replies: list[tuple[Request, str]], layout: str, folder: Path
) -> Iterator[dict[str, Any]]:
  """The batches of training for a data set of these dialogues; every reply is in one of them."""
  samples = [
    {
      "id": str(i),
      "image": request.images[0].name,  # type: ignore[union-attr]
      "conversations": [
        {"from": "human", "value": f"<image>\n{request.question}"},
        {"from": "gpt", "value": reply},
      ],
    }
    for i, (request, reply) in enumerate(replies)
  ]
  (folder / "replies.json").write_text(json.dumps(samples))
  model = pretrained.from_run(run, merge=False)
  values = config_lib.to_dict(model.config)["data"]
  data = config_lib.from_dict(
    {
      **values,
      "path": str(folder / "replies.json"),
      "turns": layout,
      "augment": "none",
      "turns_per_row": 0,
      "threads": 1,
    },
    config_lib.DataConfig,
  )
  iterator = pipeline.make(
    data, model.tokenizer, anyres.Tile(*build.tile_shape(model.config.model)), 8, seed=0
  )
  for _ in range(-(-len(replies) // 8)):
    yield next(iterator)


def leads(run: Path, replies: list[tuple[Request, str]], layout: str, folder: Path) -> Any:
  """{sample: (ids of the reply by the tokenizer of training, smallest lead of any over the others)}.

  From the forward pass of training, with adapters unfolded, layers stacked and the reply given.
  """
  model = pretrained.from_run(run, merge=False)
  module = build.model(model.config.model)

  @jax.jit
  def logits(params: Any, batch: Any) -> Any:
    names = ("tokens", "positions", "segments", "images", "slots")
    hidden = module.apply({"params": params}, *(batch[name] for name in names))
    return module.apply({"params": params}, hidden, method="logits")

  found = {}
  for batch in batches(run, replies, layout, folder):
    held = batch.pop(pipeline.SAMPLES)
    rows = np.asarray(logits(model.params, batch))
    for number, (place,) in enumerate(held):
      at = np.flatnonzero(batch["weights"][number])
      targets = batch["targets"][number, at]
      chosen = rows[number, at, targets]
      others = rows[number, at]
      others[np.arange(len(at)), targets] = -np.inf
      found[place.sample] = tuple(targets.tolist()), float((chosen - others.max(-1)).min())
  return found


def compared(
  run: Path, asked: list[Request], given: list[Answer], layout: str, folder: Path
) -> tuple[int, list[str]]:
  """(answers that could be compared, what differs)."""
  stops = pretrained.from_run(run).tokenizer.stop_ids(conversation.TEMPLATES["v1"].end)
  replies = [(r, a.text) for r, a in zip(asked, given, strict=True)]
  trained = leads(run, replies, layout, folder)
  count, differences = 0, []
  for number, answer in enumerate(given):
    ids, lead = trained[number]
    if ids[:-1] != answer.ids or ids[-1] not in stops:  # its text is other tokens, or has no end
      continue
    count += 1
    if lead < -LEAD or abs(lead - answer.margin) > LEAD:
      differences.append(
        f"{asked[number].question} -> {answer.text!r}: the engine leads by "
        f"{answer.margin:.4f}, training by {lead:.4f}"
      )
  return count, differences


@pytest.mark.parametrize("layout", conversation.TURNS)
def test_answers_are_what_training_would_say(
  layout: str, run: Path, asked: list[Request], answers: list[Answer], tmp_path: Path
) -> None:
  count, differences = compared(run, asked, answers, layout, tmp_path)
  assert count >= 200
  assert not differences, f"{len(differences)} of {count}, such as {differences[0]}"


def test_what_greedy_decoding_writes_is_greedy(
  run: Path, asked: list[Request], answers: list[Answer]
) -> None:
  """By its likelihood as well; nothing else is more likely from its first token on."""
  score, seen = Likelihood(pretrained.from_run(run)), 0
  for request, answer in list(zip(asked, answers, strict=True))[::20]:
    runs, _ = score._read(request, answer.text)
    read = [
      i for one in runs for i, learned in zip(one.ids, one.supervised, strict=True) if learned
    ]
    if tuple(read) != answer.ids or not read:
      continue  # text that the tokenizer would write otherwise
    seen += 1
    total, greedy = next(score([(request, answer.text)]))
    assert greedy, answer.text
    other, is_greedy = next(score([(request, f"zebra {answer.text}")]))
    assert not is_greedy
    assert other < total
  assert seen >= 8


def test_another_reading_of_the_prompt_is_noticed(
  run: Path,
  engine: Engine,
  asked: list[Request],
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Each piece of a prompt read as a text of its own, as it once was."""

  def piece_by_piece(
    text: str, images: int, template: Any, tokenizer: Any, *_: Any, **__: Any
  ) -> Any:
    first, *others = conversation.prompt(text, template, images)
    runs = reading.tokenize([first], tokenizer)
    for piece in others:
      more = reading.tokenize([piece], tokenizer)
      runs += more[1:] if tokenizer.bos_id is not None else more
    return runs

  monkeypatch.setattr(reading, "question", piece_by_piece)
  engine.forget()
  given = list(engine.answer(asked[::4]))
  assert not any(answer.error for answer in given)
  engine.forget()
  count, differences = compared(run, asked[::4], given, "chain", tmp_path)
  assert len(differences) > count / 2
