"""A thousand random items among good ones: none is lost, and each bad one has a reason."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import check, pipeline
from llava_sp_jax.data.failure import REASON
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import ConfigMaker
from tests.data.test_decode import png
from tests.data.test_pipeline import TILE

EXAMPLES, ITEMS, GOOD = 50, 20, 3

TEXT = st.text(st.characters(), max_size=30)  # halves of surrogate pairs as well
NAMES = st.one_of(
  TEXT,
  st.sampled_from(
    [
      "0.png",
      "1.png",
      "broken.png",
      "thin.png",
      "pipe.png",
      "deep.png",
      "a" * 300,
      "/dev/zero",
      "..",
      ".",
      "",
      "x\0y",
      "data:image/png;base64,AAAA",
    ]
  ),
)
VALUES = st.recursive(
  st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, NAMES),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(
      st.one_of(
        TEXT, st.sampled_from(["from", "value", "role", "content", "type", "text", "image"])
      ),
      inner,
      max_size=3,
    ),
  ),
  max_leaves=6,
)
QUESTIONS = st.sampled_from(
  ["what?", "<image>\nwhat?", "a <image> b <image>", "<video>\nwhat?", "</s>", ""]
)
TURN = st.one_of(
  st.fixed_dictionaries(
    {
      "from": st.sampled_from(["human", "gpt", "system", "tool"]),
      "value": st.one_of(QUESTIONS, TEXT),
    }
  ),
  st.fixed_dictionaries(
    {
      "role": st.sampled_from(["user", "assistant", "system"]),
      "content": st.one_of(QUESTIONS, VALUES),
    }
  ),
)
KEYS = st.sampled_from(
  ["image", "images", "video", "audio", "img", "system", "id", "messages", "x"]
)


@st.composite
def changed(draw: st.DrawFn) -> Any:
  """A sound sample with one to three things put in, replaced or taken away."""
  ask, reply = {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}
  sample: dict[str, Any] = {"id": 1, "image": "0.png", "conversations": [ask, reply]}
  for _ in range(draw(st.integers(1, 3))):
    what = draw(st.integers(0, 3))
    if what == 0:
      sample[draw(KEYS)] = draw(st.one_of(VALUES, st.lists(NAMES, max_size=3), NAMES))
    elif what == 1:
      sample["conversations"] = draw(st.lists(TURN, max_size=4))
    elif what == 2:
      sample.pop(draw(st.sampled_from(sorted(sample))))
      sample.setdefault("id", 2)
    else:
      sample["image"] = draw(st.one_of(NAMES, st.lists(NAMES, max_size=3)))
  return sample


@pytest.fixture(scope="module")
def data(
  tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory
) -> config_lib.DataConfig:
  folder = tmp_path_factory.mktemp("random") / "images"
  made = tiny_config().data
  folder.mkdir()
  for name in ("0.png", "1.png"):
    (folder / name).write_bytes((Path(made.image_folder) / name).read_bytes())
  (folder / "broken.png").write_bytes(b"not a picture")
  (folder / "thin.png").write_bytes(png(65000, 1, rows=bytes(3 * 65000 + 1)))
  (folder / "deep.png").write_bytes(png(20, 20, 16, 0, bytes(41 * 20)))
  os.mkfifo(folder / "pipe.png")
  return dataclasses.replace(made, image_folder=str(folder), images_per_row=2)


@pytest.fixture(scope="module")
def tokenizer(data: config_lib.DataConfig) -> Tokenizer:
  return Tokenizer(data.tokenizer)


@settings(
  max_examples=EXAMPLES,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)
@given(items=st.lists(st.one_of(changed(), VALUES), min_size=ITEMS, max_size=ITEMS))
def test_none_is_lost(
  items: list[Any], data: config_lib.DataConfig, tokenizer: Tokenizer, tiny_data: Path
) -> None:
  good = json.loads((tiny_data / "train.json").read_text())[0]
  samples = copy.deepcopy(items)
  places = [i * (ITEMS // GOOD) for i in range(GOOD)]
  for place in places:
    samples.insert(place, good)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "samples.json"
    path.write_text(json.dumps(samples))
    mine = dataclasses.replace(data, path=str(path))
    told = Path(folder) / "quarantine.jsonl"
    batches = pipeline.make(mine, tokenizer, TILE, len(samples), 0, pipeline.Quarantine(told))
    held = [row[0] for row in next(batches)[pipeline.SAMPLES]]
    batches.close()
    lines = told.read_text().splitlines() if told.exists() else []
    checker = check.Checker(mine, tokenizer, TILE)
    passed = {
      i
      for i in range(len(samples))
      if not {p.kind for p in checker(i, decode=True).problems} - {"nothing to learn", "cut off"}
    }
  assert sorted(row.sample for row in held) == list(range(len(samples)))
  trained = {row.sample for row in held if row.trained}
  assert trained >= set(places)
  reasons = {json.loads(line)["index"]: json.loads(line)["error"] for line in lines}
  assert set(reasons) == set(range(len(samples))) - trained
  assert all(0 < len(reason) <= REASON and reason.isprintable() for reason in reasons.values())
  assert passed == trained
