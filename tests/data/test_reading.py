"""One reading: what training reads before a reply is what a prompt reads, to every tokenizer.

Every template, both layouts, six tokenizers, no, one and two images, one to four turns.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import conversation, reading, samples
from llava_sp_jax.data.conversation import IMAGE, TEMPLATES, Turns
from llava_sp_jax.data.example import IMAGE_ID, Run
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.tokenizer import SETTINGS_FILE, Tokenizer, TokenizerError, train_bpe
from tests.data.six_tokenizers import (
  BYTE_LEVEL,
  MAKERS,
  WORDS,
  write_byte_level,
  write_sentencepiece,
)

# The original trains the `###` family with another text than it prompts with.
READ_ALIKE = sorted(name for name, template in TEMPLATES.items() if not template.training)
# Its line break is a token of its own, where some tokenizers would join it to the reply's full stop.
ENDS_IN_TEXT = ("plain", "v0_plain")


def test_the_token_that_begins_a_text_is_what_a_tokenizer_puts_there(tmp_path: Path) -> None:
  """Whether its settings name that token or not."""
  write_byte_level(tmp_path / "named", *BYTE_LEVEL["llama_3"])
  shutil.copytree(tmp_path / "named", tmp_path / "bare")
  settings = tmp_path / "bare" / SETTINGS_FILE
  values = json.loads(settings.read_text())
  settings.write_text(json.dumps({**values, "bos_token": None}))
  named, bare = Tokenizer(tmp_path / "named"), Tokenizer(tmp_path / "bare")
  assert named.bos_id is not None
  assert bare.bos_id == named.bos_id
  assert bare.encode("is it red?") == named.encode("is it red?")


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Tokenizer:
  folder = tmp_path_factory.mktemp("reading") / request.param
  MAKERS[request.param](folder)
  return Tokenizer(folder)


def dialogue(rng: random.Random, turns: int, images: int, later: bool) -> Turns:
  """`later`: the last image stands in the last turn."""

  def words(count: int) -> str:
    return " ".join(["well", *rng.choices(WORDS, k=count)]).strip()

  pairs: Turns = [
    (words(5) + rng.choice("?.\u3002"), words(rng.choice((1, 4)))) for _ in range(turns)
  ]
  for number in range(images):
    at = turns - 1 if later and number == images - 1 else 0
    pairs[at] = (f"{IMAGE}\n{pairs[at][0]}", pairs[at][1])
  return pairs


def flat(runs: list[Run]) -> list[int]:
  return [i for run in runs for i in run.ids]


def before_replies(runs: list[Run]) -> list[list[int]]:
  """All ids that the first token of each reply sees."""
  found = []
  for number, run in enumerate(runs):
    if run.supervised[0]:
      seen = [r for r in runs[:number] if r.branch in (0, run.branch)]
      found.append(flat(seen))
  return found


def by_the_tokenizer(text: str, tokenizer: Tokenizer) -> list[int]:
  """The joined text, each stretch between images read by the tokenizer itself."""
  ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  inner = getattr(tokenizer._backend, "_inner", None)
  for number, stretch in enumerate(text.split(IMAGE)):
    ids += [IMAGE_ID] if number else []
    plain = inner and inner(stretch, add_special_tokens=False).input_ids
    ids += tokenizer.encode(stretch) if inner is None else plain
  return ids


def opened(turns: Turns, template: conversation.Template) -> list[conversation.TextPiece]:
  """A dialogue whose last question waits for its reply, as a prompt writes it."""
  asked: Turns = [(conversation._asked(question, template), reply) for question, reply in turns]
  return conversation.write([*asked[:-1], (asked[-1][0], None)], template)


@pytest.mark.parametrize("name", READ_ALIKE)
def test_training_reads_before_a_reply_what_a_prompt_reads(name: str, tokenizer: Tokenizer) -> None:
  rng, template = random.Random(name), TEMPLATES[name]
  for images in (0, 1, 2):
    for count in (1, 2, 3, 4):
      turns = dialogue(rng, count, images, later=bool(count % 2))
      runs = reading.dialogue(turns, template, "chain", tokenizer)
      found = before_replies(runs)
      assert len(found) == count
      for number, ids in enumerate(found):
        pieces = opened(turns[: number + 1], template)
        assert ids == flat(reading.tokenize(pieces, tokenizer))
        if not number or name not in ENDS_IN_TEXT:
          assert ids == by_the_tokenizer("".join(piece.text for piece in pieces), tokenizer)
      assert found[0] == flat(reading.question(turns[0][0], 0, template, tokenizer))
      if name not in reading.fitting(tokenizer):
        continue
      learned = [i for run in runs if run.supervised[0] for i in run.ids]
      said = "".join(f"{template.answer}{reply}{template.end}" for _, reply in turns)
      assert tokenizer.decode(learned).split() == tokenizer.decode(tokenizer.encode(said)).split()


@pytest.mark.parametrize("name", READ_ALIKE)
def test_a_branch_reads_what_a_prompt_reads(name: str, tokenizer: Tokenizer) -> None:
  rng, template = random.Random(name), TEMPLATES[name]
  for count in (1, 2, 3, 4):
    turns = dialogue(rng, count, 1, later=False)
    runs = reading.dialogue(turns, template, "branch", tokenizer)
    for (question, reply), ids in zip(turns, before_replies(runs), strict=True):
      asked = f"{IMAGE}\n{question.replace(IMAGE, '').strip()}"
      assert ids == flat(reading.question(asked, 1, template, tokenizer))
      alone = reading.dialogue([(asked, reply)], template, "chain", tokenizer)
      assert ids == before_replies(alone)[0]


@pytest.mark.parametrize("start", ["\n\nred", " red", "\n", "  red ", "\ttab", "'s", ")"])
def test_a_reply_never_changes_the_ids_of_its_prompt(start: str, tokenizer: Tokenizer) -> None:
  """Though a tokenizer would make one token of a prompt's last line break and a reply's first."""
  for name in READ_ALIKE:
    turns: Turns = [(f"{IMAGE}\nwhat is it?", start), ("and?", start)]
    for layout in ("chain", "branch"):
      runs = reading.dialogue(turns, TEMPLATES[name], layout, tokenizer)
      found = before_replies(runs)
      assert found[0] == flat(reading.question(turns[0][0], 0, TEMPLATES[name], tokenizer)), name
      whole = reading.dialogue(turns[:1], TEMPLATES[name], layout, tokenizer)
      assert flat(runs)[: len(flat(whole))] == flat(whole) or layout == "chain"


@pytest.mark.parametrize("reply", ["It is red.", "one\n", "x  ", "(yes)"])
def test_an_end_mark_is_found_behind_every_reply(reply: str, tokenizer: Tokenizer) -> None:
  """`.` and a line break are one token to many tokenizers, which `plain` would never stop at."""
  for name in set(reading.fitting(tokenizer)):
    template = TEMPLATES[name]
    runs = reading.dialogue([(IMAGE, reply)], template, "chain", tokenizer)
    mark = tokenizer.stop_ids(template.end)
    assert any(i in mark for i in runs[-1].ids), name


def test_a_likelihood_reads_a_continuation_as_a_reply(tokenizer: Tokenizer) -> None:
  for name in READ_ALIKE:
    template = TEMPLATES[name]
    asked = reading.question("is it red?", 1, template, tokenizer, reply=" yes it is")
    turns: Turns = [(f"{IMAGE}\nis it red?", "yes it is")]
    trained = reading.dialogue(turns, template, "chain", tokenizer)
    assert flat(trained)[: len(flat(asked))] == flat(asked), name
    assert asked[-1].supervised == (True,) * len(asked[-1].ids)


def test_a_system_text_of_its_own(tokenizer: Tokenizer) -> None:
  """A prompt has the ids that training has in front of the reply, and they hold the text."""
  for name in READ_ALIKE:
    template = TEMPLATES[name]
    if template.with_system is None:
      with pytest.raises(SampleError, match="no place for a system text, found 'Be"):
        reading.question("why?", 0, template, tokenizer, system="Be terse.")
      continue
    asked = flat(reading.question("why?", 0, template, tokenizer, system="Be terse."))
    trained = reading.dialogue([("why?", "so")], template, "chain", tokenizer, "Be terse.")
    assert flat(trained)[: len(asked)] == asked, name
    assert "Be terse." in tokenizer.decode(asked)
    assert asked != flat(reading.question("why?", 0, template, tokenizer))


def test_training_takes_this_way(tokenizer: Tokenizer) -> None:
  """`samples.SampleEncoder`, which the pipeline, validation and `check` call."""
  turns = dialogue(random.Random(0), 3, 1, later=False)
  messages = [
    {"from": who, "value": text}
    for turn in turns
    for who, text in zip(("human", "gpt"), turn, strict=True)
  ]
  for layout in conversation.TURNS:
    data = config_lib.DataConfig(template="v1", turns=layout)
    runs = samples.SampleEncoder(tokenizer, data).runs(
      {"conversations": messages}, samples.rng_of(0, 0, 0)
    )
    assert runs == reading.dialogue(turns, TEMPLATES["v1"], layout, tokenizer)


@pytest.mark.parametrize("folder", ["without_end"])
def test_templates_that_a_tokenizer_cannot_end(folder: str, tmp_path: Path) -> None:
  write_byte_level(tmp_path / folder, *BYTE_LEVEL["qwen2"])
  tokenizer = Tokenizer(tmp_path / folder)
  why = reading.end_of_replies(TEMPLATES["v1"], tokenizer)
  assert "'</s>'" in why
  assert "ordinary tokens" in why
  assert reading.fitting(tokenizer) == [
    "mpt",
    "chatml_direct",
    "mistral_direct",
    "smollm2",
    "plain",
    "v0_plain",
  ]
  for name in reading.fitting(tokenizer):
    assert not reading.end_of_replies(TEMPLATES[name], tokenizer)
  write_sentencepiece(tmp_path / "llama", legacy=False)
  llama = reading.fitting(Tokenizer(tmp_path / "llama"))
  assert {"v1", "llava_llama_2", "plain"} <= set(llama)
  assert "mpt" not in llama


def test_a_tokenizer_that_cannot_continue_a_text_says_so(tmp_path: Path) -> None:
  from transformers import AutoTokenizer

  write_sentencepiece(tmp_path / "slow", legacy=False)
  AutoTokenizer.from_pretrained(str(tmp_path / "slow")).save_pretrained(str(tmp_path / "fast"))
  fast = Tokenizer(tmp_path / "fast")
  with pytest.raises(TokenizerError, match="puts a blank in front of 'red'"):
    fast.spans("red", inside=True)
  with pytest.raises(SampleError, match="a reply shares a token with the text before it"):
    reading._cut("ared", [2], fast)


def test_an_image_inside_a_reply_moves_no_border(tokenizer: Tokenizer) -> None:
  turns: Turns = [(f"{IMAGE}\nwhat is it?", f"a{IMAGE}b")]
  for name in READ_ALIKE:
    ids = before_replies(reading.dialogue(turns, TEMPLATES[name], "chain", tokenizer))[0]
    assert ids == flat(reading.question(turns[0][0], 0, TEMPLATES[name], tokenizer)), name


def test_marks_are_special_tokens_that_text_can_name(tmp_path: Path) -> None:
  """Added special tokens that no setting names are; what stands for unknown text is not."""
  from tokenizers import AddedToken, models, pre_tokenizers
  from tokenizers import Tokenizer as Inner
  from transformers import PreTrainedTokenizerFast

  words = {"<unk>": 0, "</s>": 1, "a": 2}
  inner = Inner(models.WordLevel(words, unk_token="<unk>"))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  PreTrainedTokenizerFast(
    tokenizer_object=inner, unk_token="<unk>", eos_token="</s>"
  ).save_pretrained(str(tmp_path / "unknown"))
  assert "mpt" not in reading.fitting(Tokenizer(tmp_path / "unknown"))
  inner.add_special_tokens([AddedToken("<|im_end|>", special=True)])
  PreTrainedTokenizerFast(
    tokenizer_object=inner, unk_token="<unk>", eos_token="</s>"
  ).save_pretrained(str(tmp_path / "added"))
  assert "smollm2" in reading.fitting(Tokenizer(tmp_path / "added"))


def test_a_long_dialogue_is_read_in_time_that_grows_with_it(tmp_path: Path) -> None:
  """Characters that the tokenizer reads, for a template whose prompts end with a line break."""
  write_byte_level(tmp_path / "qwen2", *BYTE_LEVEL["qwen2"])
  tokenizer, read = Tokenizer(tmp_path / "qwen2"), [0]
  plain = tokenizer._backend.spans

  def counted(text: str, inside: bool) -> Any:
    read[0] += len(text)
    return plain(text, inside)

  tokenizer._backend.spans = counted  # type: ignore[method-assign]
  turns: Turns = [("what is it, and why?", "it is a red circle because it is")] * 40
  pieces = conversation.chain(turns, TEMPLATES["smollm2"])
  reading.tokenize(pieces, tokenizer)
  assert read[0] < 3 * sum(len(piece.text) for piece in pieces)


def test_a_dialogue_of_many_turns_is_read_at_once(tmp_path: Path) -> None:
  """The time goes with its length, not with its square."""
  train_bpe(["a b"], tmp_path, 260)
  tokenizer = Tokenizer(tmp_path)
  turns: Turns = [("a", "b")] * 5000
  started = time.process_time()
  runs = reading.dialogue(turns, TEMPLATES["v1"], "chain", tokenizer)
  assert time.process_time() - started < 5
  assert sum(map(any, (run.supervised for run in runs))) == 5000


def test_reading_anew_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setattr(reading, "AGAIN", 40)
  train_bpe(["a" * 16] * 10, tmp_path, 262)  # has aa, aaaa, ...
  template, tokenizer = conversation.Template("", "", "", "", ""), Tokenizer(tmp_path)
  turns: Turns = [("a", "a")]
  assert len(reading.dialogue(turns * 2, template, "chain", tokenizer)) == 4
  with pytest.raises(SampleError, match=r"^20 replies that share tokens with the text before them"):
    reading.dialogue(turns * 20, template, "chain", tokenizer)
