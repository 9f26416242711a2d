"""Batches: quarantine of bad samples, exact resumption, shards of hosts, draws of turns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import pipeline, samples, sources
from llava_sp_jax.data.anyres import Tile
from llava_sp_jax.data.failure import SourceError
from llava_sp_jax.data.image import Preprocess
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import ConfigMaker

IMAGE_SIZE = 24
TILE = Tile(IMAGE_SIZE, 6)
PREPROCESS = Preprocess(IMAGE_SIZE, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def tokenizer(tiny_config: ConfigMaker) -> Tokenizer:
  return Tokenizer(tiny_config().data.tokenizer)


def make(data: config_lib.DataConfig, tokenizer: Tokenizer, **options: Any) -> Any:
  values = {"batch_size": 4, "seed": 0} | options
  return pipeline.make(data, tokenizer, TILE, **values)


def take(iterator: Any, count: int) -> list[dict[str, Any]]:
  """Batches whose samples are marked in an array, as the ledger takes them."""
  batches = [next(iterator) for _ in range(count)]
  return [{**b, pipeline.SAMPLES: pipeline.marks(b[pipeline.SAMPLES])} for b in batches]


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_batch_has_static_shapes(tiny_config: ConfigMaker, tokenizer: Tokenizer) -> None:
  data = tiny_config().data
  for batch in take(make(data, tokenizer), 5):
    assert batch.pop(pipeline.SAMPLES).shape == (4, 1)
    assert batch.pop("images").shape == (4, 1, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert {v.shape for v in batch.values()} == {(4, data.row_length)}
    assert set(batch) == {"tokens", "targets", "weights", "positions", "segments", "slots"}


def test_seeking_resumes_exactly(tiny_config: ConfigMaker, tokenizer: Tokenizer) -> None:
  data = tiny_config(data={"turns_per_row": 2, "augment": "mirror_shift"}).data
  iterator = make(data, tokenizer)
  take(iterator, 4)
  wanted = take(iterator, 5)
  other = make(data, tokenizer)
  other.seek(4)
  assert_equal(take(other, 5), wanted)
  iterator.seek(4)  # also backwards
  assert_equal(take(iterator, 5), wanted)


def test_the_seed_decides_the_order(tiny_config: ConfigMaker, tokenizer: Tokenizer) -> None:
  data = tiny_config().data
  assert_equal(take(make(data, tokenizer), 3), take(make(data, tokenizer), 3))
  a, b = (take(make(data, tokenizer, seed=s), 3) for s in (0, 1))
  assert any(not np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[2], [0], [3], [1]]])
def test_any_hosts_make_the_rows_of_one(
  damaged: Path, tiny_config: ConfigMaker, tokenizer: Tokenizer, shares: list[list[int]]
) -> None:
  """Whoever makes which rows: together they are those of one host, also where samples are bad."""
  data = tiny_config(
    data={
      "path": str(damaged / "train.json"),
      "image_folder": str(damaged / "images"),
      "turns_per_row": 2,
      "augment": "mirror_shift",
    }
  ).data
  wanted = take(make(data, tokenizer), 7)
  hosts = [make(data, tokenizer, rows=rows) for rows in shares]
  for host in hosts[1:]:
    host.seek(2)
  for number in range(7):
    for rows, host in zip(shares, hosts, strict=True):
      if number >= 2 or host is hosts[0]:
        assert_equal(take(host, 1), [{k: v[rows] for k, v in wanted[number].items()}])


def test_an_epoch_reads_every_sample_once(
  damaged: Path, tiny_config: ConfigMaker, tokenizer: Tokenizer
) -> None:
  data = tiny_config(
    data={"path": str(damaged / "train.json"), "image_folder": str(damaged / "images")}
  ).data
  iterator = make(data, tokenizer)
  ids = np.concatenate([batch[pipeline.SAMPLES][:, 0] for batch in take(iterator, 19)])
  read = np.where(ids < 0, -2 - ids, ids).reshape(4, len(iterator.usable[""]))
  assert (np.sort(read, axis=1) == np.arange(19)).all()
  assert set(-2 - ids[ids < 0]) == set(range(12, 19))


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
  """The data set with seven bad samples among twelve good ones."""
  folder = tmp_path / "data"
  shutil.copytree(tiny_data, folder)
  samples = json.loads((folder / "train.json").read_text())
  (folder / "images" / "broken.png").write_bytes(b"not a picture")
  talk = samples[0]["conversations"]
  samples += [
    {"id": "broken", "image": "broken.png", "conversations": talk},
    {"id": "missing", "image": "gone.png", "conversations": talk},
    "not an item",
    {"id": "two", "image": ["0.png", "1.png"], "conversations": talk},
    {"id": "number", "image": [3], "conversations": talk},
    {"id": "texts", "image": "0.png", "conversations": ["hello", "you"]},
    {
      "id": "without",
      "image": "0.png",
      "conversations": [{"from": "human", "value": "no picture"}, {"from": "gpt", "value": "x"}],
    },
  ]
  (folder / "train.json").write_text(json.dumps(samples))
  return folder


def test_bad_samples_are_counted_once_and_written_down(
  damaged: Path, tiny_config: ConfigMaker, tokenizer: Tokenizer, tmp_path: Path
) -> None:
  data = tiny_config(
    data={"path": str(damaged / "train.json"), "image_folder": str(damaged / "images")}
  ).data
  quarantine = pipeline.Quarantine(tmp_path / "quarantine.jsonl")
  batches = take(make(data, tokenizer, quarantine=quarantine), 12)  # several epochs
  assert quarantine.count == 7
  lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
  errors = {line["id"]: line["error"] for line in lines}
  assert len(lines) == 7
  assert "cannot be decoded" in errors["broken"]
  assert "no such file" in errors["missing"]
  assert "expected a dictionary" in errors["not a dictionary"]
  assert errors["two"] == "2 images, but data.images_per_row is 1"
  assert "must be a file name or a list of them" in errors["number"]
  assert "turn 0: expected a text from one of human, user, " in errors["texts"]
  assert errors["without"] == "the text has 0 <image> but the sample has 1 images"
  assert {line["index"] for line in lines} == set(range(12, 19))
  for batch in batches:  # the row of a bad sample stays empty
    trained = (batch[pipeline.SAMPLES][:, 0] >= 0).tolist()
    assert (batch["weights"].sum(axis=1) > 0).tolist() == trained
    assert (batch["segments"].sum(axis=1) > 0).tolist() == trained


@pytest.mark.parametrize(
  ("before", "error", "message"),
  [
    (
      0,
      config_lib.ConfigError,
      "none of the first 12 samples can be used; the last: .*no such file",
    ),
    (2, SourceError, "none of the last 12 samples could be used, so the disk or the network"),
  ],
)
def test_a_disk_that_is_gone_does_not_cost_all_samples(
  tiny_data: Path,
  tiny_config: ConfigMaker,
  tokenizer: Tokenizer,
  tmp_path: Path,
  before: int,
  error: type[Exception],
  message: str,
) -> None:
  """They would count as read, and a run would train on empty rows to its end."""
  folder = Path(shutil.copytree(tiny_data, tmp_path / "data"))
  files = {"path": str(folder / "train.json"), "image_folder": str(folder / "images")}
  iterator = make(tiny_config(data=files).data, tokenizer)
  take(iterator, before)
  shutil.rmtree(folder / "images")
  with pytest.raises(error, match=message):
    take(iterator, 200)


def test_a_subset_of_turns_keeps_order_and_image() -> None:
  turns = [(f"{'<image>' if not i else ''}\nq{i}".strip(), f"a{i}") for i in range(6)]
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(40):
    drawn = samples.draw_turns(turns, 3, rng)
    assert len(drawn) == 3
    assert drawn[0][0].startswith("<image>\n")
    assert sum(q.count("<image>") for q, _ in drawn) == 1
    assert [a for _, a in drawn] == sorted(a for _, a in drawn)
    assert all(q.replace("<image>\n", "") == f"q{a[1:]}" for q, a in drawn)
    seen |= {a for _, a in drawn}
  assert seen == {f"a{i}" for i in range(6)}


@pytest.mark.parametrize("content", ["{}", "[]", "{", "3"])
def test_a_file_that_is_no_list_is_an_error(tmp_path: Path, content: str) -> None:
  path = tmp_path / "x.json"
  path.write_text(content)
  with pytest.raises(config_lib.ConfigError, match=r"^data.path: .*x.json is not "):
    sources.LlavaJson(str(path), "", PREPROCESS)


def test_missing_files_and_folders_are_named(tiny_data: Path, tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"data.path: no file"):
    sources.LlavaJson(str(tmp_path / "x.json"), "", PREPROCESS)
  with pytest.raises(FileNotFoundError, match=r"data.image_folder: no folder"):
    sources.LlavaJson(str(tiny_data / "train.json"), str(tmp_path / "no"), PREPROCESS)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"no tokenizer here; expected one of tokenizer.json"):
    Tokenizer(tmp_path)
