"""Generation of every protocol against docs/benchmarks.md; figures over missing and unreadable answers."""

from __future__ import annotations

import itertools
import math
import random
import re

import numpy as np
import pytest

from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.results import interval
from llava_sp_jax.tasks import scoring
from llava_sp_jax.tasks.catalog import BENCHMARKS, TASKS
from llava_sp_jax.tasks.pope import measures, measures_lmms
from llava_sp_jax.tasks.task import Item, Prediction, mean_by_kind
from tests.conftest import REPOSITORY
from tests.tasks.formats import RIGHT, answers, right

PAGE = (REPOSITORY / "docs" / "benchmarks.md").read_text()
STOP = ("ASSISTANT:",)
# (benchmark, protocol): tokens, stop strings; all is greedy, one beam.
ASKS: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {
  ("vqav2", "llava"): (128, ()), ("vqav2", "lmms"): (16, ()),
  ("gqa", "llava"): (128, ()), ("gqa", "lmms"): (16, ()),
  ("vizwiz", "llava"): (128, ()), ("vizwiz", "lmms"): (128, STOP),
  ("scienceqa", "llava"): (1024, ()), ("scienceqa", "lmms"): (16, ()),
  ("textvqa", "llava"): (128, ()), ("textvqa", "llava_no_ocr"): (128, ()),
  ("textvqa", "lmms"): (128, STOP), ("textvqa", "lmms_ocr"): (128, STOP),
  ("pope", "llava"): (128, ()), ("pope", "lmms"): (128, ()),
  ("mme", "llava"): (128, ()), ("mme", "lmms"): (16, ()),
  ("mmbench", "llava"): (1024, ()), ("mmbench", "lmms"): (1024, STOP),
  ("mmbench_cn", "llava"): (1024, ()), ("mmbench_cn", "lmms"): (256, ()),
  ("seed", "llava"): (128, ()), ("seed", "lmms"): (128, STOP),
  ("llava_bench", "llava"): (1024, ()),
  ("mmvet", "llava"): (1024, ()), ("mmvet", "lmms"): (1024, ()),
}  # fmt: skip


def test_every_protocol_asks_for_the_tokens_of_the_table() -> None:
  found = {
    (task.name, name): rules.generation
    for task in BENCHMARKS
    for name, rules in task.protocols.items()
  }
  assert found == {
    key: Generation(max_new_tokens=tokens, stop=stop) for key, (tokens, stop) in ASKS.items()
  }


def cells(heading: str) -> dict[str, list[str]]:
  """Rows of the table below a heading, by the names in their first cell."""
  part = PAGE.split(heading, 1)[1].split("\n## ", 1)[0]
  rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `")]
  return {
    name: [cell.strip() for cell in row] for row in rows for name in re.findall(r"`(\w+)`", row[0])
  }


def test_the_page_says_the_same() -> None:
  for name, row in cells("## What each reads, asks and scores").items():
    assert int(row[3]) == ASKS[name, "llava"][0], name
  other = cells("## `--protocol lmms`")
  assert other.keys() == {name for name, _ in ASKS}
  for name in ("vqav2", "gqa", "scienceqa", "mme"):
    assert "16 tokens" in other[name][1]
  for name in ("vizwiz", "textvqa"):
    assert 'stops at "ASSISTANT:"' in other[name][1]
  assert "256 tokens" in other["mmbench_cn"][1]
  kept = re.search(r"Where lmms-eval's files limit no tokens \(([^)]*)\), (\d+) are kept", PAGE)
  assert kept
  assert [name.lower() for name in kept[1].split(", ")] == ["vizwiz", "textvqa", "seed"]
  assert {ASKS[name, "lmms"][0] for name in ("vizwiz", "textvqa", "seed")} == {int(kept[2])}


# ---- unreadable and missing answers -----------------------------------------------------------------


def test_pope_of_lmms_counts_an_unreadable_answer_wrong(root: object) -> None:
  """In the accuracy; recall and F1 leave it out. A truth of yes, then one of no."""
  task = TASKS["pope"](root, protocol="lmms")
  items = task.items()
  count = len(items)
  for truth in ("yes", "no"):
    odd = next(i for i in items if i.truth == truth)
    given = {**answers(items, RIGHT["pope"]), odd.id: Prediction(odd.id, "maybe")}
    row = task.score(items, given).by_kind["all"]
    assert row["accuracy"] == (count - 1) / count
    assert (row["precision"], row["recall"], row["f1"]) == (1.0, 1.0, 1.0)
    assert (row["items"], row["yes_ratio"]) == (count, 0.5)


def test_pope_by_hand() -> None:
  """3 right yes, 1 wrong yes, 2 right no, 2 wrong no, and an answer that is neither."""
  pairs = [*[("yes", "yes")] * 3, ("yes", "no"), *[("no", "no")] * 2, *[("no", "yes")] * 2]
  llava, lmms = measures(pairs), measures_lmms([*pairs, ("other", "yes"), ("other", "no")])
  assert llava == {
    "TP": 3,
    "FP": 1,
    "TN": 2,
    "FN": 2,
    "accuracy": 5 / 8,
    "precision": 3 / 4,
    "recall": 3 / 5,
    "f1": pytest.approx(2 / 3),
    "yes_ratio": 4 / 8,
  }
  assert lmms == {
    "accuracy": 5 / 10,
    "precision": 3 / 4,
    "recall": 3 / 5,
    "f1": pytest.approx(2 / 3),
    "yes_ratio": 6 / 10,
  }


@pytest.mark.parametrize("protocol", ["llava", "lmms"])
def test_half_a_pair_of_mme_is_not_right(root: object, protocol: str) -> None:
  task = TASKS["mme"](root, protocol=protocol)
  items = task.items()
  given = answers(items, right)
  del given[items[0].id]
  scores = task.score(items, given)
  assert scores.by_kind["all"]["accuracy"] == 1.0
  assert scores.by_kind["all"]["accuracy_plus"] == 5 / 6  # of six images
  row = scores.by_kind[items[0].kind]
  assert (row["accuracy_plus"], row["score"], row["items"], row["asked"]) == (0.5, 150.0, 3, 4)


def test_means_by_kind_by_hand() -> None:
  items = [Item(str(i), "q", (), "a" if i < 3 else "b", i % 2) for i in range(5)]
  told = {
    "0": Prediction("0", "1"),
    "1": Prediction("1", "1"),
    "3": Prediction("3", "1"),
    "4": Prediction("4", "", "no such file"),
  }
  verdict = lambda item, text: {"score": float(text) * (1 + item.truth) / 4}  # noqa: E731
  assert mean_by_kind(items, told, verdict) == {
    "all": {"accuracy": pytest.approx(1.25 / 3), "items": 3, "asked": 5},
    "a": {"accuracy": 0.375, "items": 2, "asked": 3},
    "b": {"accuracy": 0.5, "items": 1, "asked": 2},
  }
  counted = mean_by_kind(items, told, verdict, "x", missing=0.0)
  assert counted["all"] == {"x": pytest.approx(1.25 / 5), "items": 5, "asked": 5}
  assert mean_by_kind(items, {}, verdict)["b"] == {"accuracy": 0.0, "items": 0, "asked": 2}


def test_vqa_accuracy_leaves_each_human_out_once() -> None:
  for same in range(11):
    humans = ["red"] * same + ["blue"] * (10 - same)
    nine = [
      min(1, sum(h == "red" for h in chosen) / 3) for chosen in itertools.combinations(humans, 9)
    ]
    assert scoring.vqa_accuracy("Red", humans) == pytest.approx(sum(nine) / 10)


# ---- how sure a mean is -----------------------------------------------------------------------------


def test_the_interval_is_that_of_resampled_images() -> None:
  """An interval of percentiles of the mean over images drawn with replacement, drawn here anew."""
  rng = random.Random(0)
  groups = [f"im{i}" for i in range(40) for _ in range(1 + i % 20)]  # of one to twenty answers
  level = {f"im{i}": (1 + i % 20) / 22 for i in range(40)}  # the more, the better
  scores = [float(rng.random() < level[name]) for name in groups]
  found = interval.bootstrap(scores, groups)
  assert found
  names, means = sorted(set(groups)), []
  for _ in range(3000):
    drawn = [rng.choice(names) for _ in names]
    rows = [s for name in drawn for s, g in zip(scores, groups, strict=True) if g == name]
    means.append(sum(rows) / len(rows))
  low, high = np.quantile(means, [0.025, 0.975])
  width = high - low
  assert found.mean == pytest.approx(sum(scores) / len(scores))
  assert abs(found.low - low) < 0.12 * width
  assert abs(found.high - high) < 0.12 * width
  assert math.isclose(found.level, 0.95)
