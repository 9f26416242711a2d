"""Writes the easy-VQA data set (PyPI `easy-vqa`) in LLaVA's own format, with a small tokenizer.

Usage: python scripts/prepare_easy_vqa.py --out data/easy_vqa

Writes into --out: images/{train,test}/*.png, captions.json (stage 1), train.json (stage 2),
test.json (the questions of the test split), tokenizer/ (byte-level BPE trained on these texts).
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
from pathlib import Path

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
FACTS = {"shape": 4, "color": 2}  # statements in a caption; shapes are harder to learn
MADE_BY = "made_by.txt"  # the hash of the SOURCES that wrote the folder; written last
SOURCES = ("scripts/prepare_easy_vqa.py", "llava_sp_jax/data/tokenizer.py",
           "llava_sp_jax/data/conversation.py")  # fmt: skip
SHAPES = ("circle", "rectangle", "triangle")


def caption(pairs: list[tuple[str, str]]) -> str:
  """Writes a caption from the answers about an image: 'not blue yes. a red circle. color red'.

  Holds what is known of its one shape, and some abbreviated questions with their answers. The order
  is random, so that the model learns an answer from the image and not from the words before it.
  """
  known = {answer for _, answer in pairs} - {"yes", "no"}
  facts: dict[str, list[str]] = {"shape": [], "color": []}
  for question, answer in pairs:
    words = question.replace("?", "").split()
    named = [w for w in words if w in COLORS + SHAPES]
    negated = "not" in words or "no" in words
    if answer not in ("yes", "no"):  # 'what color is the circle?' says that it is a circle
      known.update(named)
      about = "shape" if answer in SHAPES else "color"
      facts[about].append(f"{about} {answer}")
    else:
      about = "shape" if named[0] in SHAPES else "color"
      facts[about].append(f"{'not ' * negated}{named[0]} {answer}")
      if (answer == "yes") != negated:
        known.update(named)
  color = [w for w in COLORS if w in known]
  shape = [w for w in SHAPES if w in known]
  told = [" ".join(["a", *color, *(shape or ["shape"])])]
  draw = random.Random(str(pairs))
  for about, most in FACTS.items():
    told += draw.sample(facts[about], min(most, len(facts[about])))
  draw.shuffle(told)
  return ". ".join(told)


def conversation(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
  turns = []
  for i, (question, answer) in enumerate(pairs):
    turns.append({"from": "human", "value": "<image>\n" * (i == 0) + question})
    turns.append({"from": "gpt", "value": answer})
  return turns


def by_image(questions: tuple) -> dict[int, list[tuple[str, str]]]:
  grouped = collections.defaultdict(list)
  for question, answer, image in zip(*questions, strict=True):
    grouped[image].append((question, answer))
  return dict(sorted(grouped.items()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="data/easy_vqa")
  out = Path(parser.parse_args().out)
  from llava_sp_jax import provenance

  made_by, version = out / MADE_BY, provenance.digest(provenance.fingerprints(SOURCES))
  if made_by.is_file() and made_by.read_text().strip() == version:
    print(f"{out}: already prepared")
    return
  import easy_vqa

  from llava_sp_jax.data.conversation import TEMPLATES
  from llava_sp_jax.data.tokenizer import train_bpe

  splits = {
    "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
    "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
  }
  for split, (_, paths) in splits.items():
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths.values():
      shutil.copy(path, folder)
  train = by_image(splits["train"][0])
  captions = [
    {
      "id": f"caption-{i}",
      "image": f"train/{i}.png",
      "conversations": [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": caption(pairs)},
      ],
    }
    for i, pairs in train.items()
  ]
  dialogues = [
    {"id": f"train-{i}", "image": f"train/{i}.png", "conversations": conversation(pairs)}
    for i, pairs in train.items()
  ]
  test = [
    {"id": f"test-{n}", "image": f"test/{i}.png", "question": q, "answer": a}
    for n, (q, a, i) in enumerate(zip(*splits["test"][0], strict=True))
  ]
  for name, rows in (("captions", captions), ("train", dialogues), ("test", test)):
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
  v1 = TEMPLATES["v1"]
  texts = [s["conversations"][1]["value"] for s in captions]
  texts += [f"{v1.system}{v1.before}{v1.after}"] * 1000
  texts += [f"\n{q}{v1.after} {a}" for pairs in train.values() for q, a in pairs]
  train_bpe(texts, out / "tokenizer", vocab_size=512)
  made_by.write_text(f"{version}\n")
  print(f"{out}: {len(captions)} captions, {len(dialogues)} dialogues, {len(test)} test questions")


if __name__ == "__main__":
  main()
