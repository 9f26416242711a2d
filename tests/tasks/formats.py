"""Tiny evaluation folders in the official formats, one writer a benchmark, and answers for them."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from llava_sp_jax.tasks.task import Item, Prediction

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def lines(path: Path, rows: Iterable[Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole(path: Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def picture(shade: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "PNG")
  return file.getvalue()


def answers(items: list[Item], text: str | Callable[[Item], str]) -> dict[str, Prediction]:
  """A prediction for each item."""
  told = text if callable(text) else lambda item: text
  return {item.id: Prediction(item.id, told(item)) for item in items}


def vqav2(root: Path) -> None:
  rows = [
    {"question_id": i, "image": f"{i}.jpg", "text": f"How many?\n{SHORT}", "category": "default"}
    for i in range(5)
  ]
  lines(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows)
  lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows[1:4])


def gqa(root: Path) -> None:
  kinds = [("query", "attr", "red"), ("verify", "obj", "yes"), ("choose", "rel", "left")]
  lines(
    root / "gqa/llava_gqa_testdev_balanced.jsonl",
    [
      {"question_id": f"20{i}", "image": "n1.jpg", "text": f"Which?\n{SHORT}"}
      for i in range(len(kinds))
    ],
  )
  truths = {
    f"20{i}": {"answer": answer, "isBalanced": True, "types": {"structural": s, "semantic": m}}
    for i, (s, m, answer) in enumerate(kinds)
  }
  whole(root / "gqa/data/testdev_balanced_questions.json", truths)


def vizwiz(root: Path) -> None:
  hint = "When the provided information is insufficient, respond with 'Unanswerable'."
  lines(
    root / "vizwiz/llava_test.jsonl",
    [
      {"question_id": i, "image": f"VizWiz_test_{i}.jpg", "text": f"{q}\n{hint}\n{SHORT}"}
      for i, q in enumerate(["what IS this?", "Is it Blue?"])
    ],
  )


def scienceqa(root: Path) -> None:
  problems, rows = {}, []
  for i in range(6):
    problems[str(i)] = {
      "question": f"Which {i}?",
      "choices": ["ice", "fire", "air"][: 2 + i % 2],
      "answer": i % 2,
      "hint": "It is cold." if i % 3 == 0 else "",
      "subject": ["natural science", "social"][i % 2],
      "image": "image.png" if i % 2 else None,
    }
    value = f"Context: N/A\nWhich {i}?\n(A) ice (B) fire"
    row = {
      "id": str(i),
      "conversations": [
        {"from": "human", "value": f"<image>\n{value}" if i % 2 else value},
        {"from": "gpt", "value": "The answer is A."},
      ],
    }
    rows.append({**row, "image": f"{i}/image.png"} if i % 2 else row)
  whole(root / "scienceqa/llava_test_CQM-A.json", rows)
  whole(root / "scienceqa/problems.json", problems)
  whole(root / "scienceqa/pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def textvqa(root: Path) -> None:
  said = ["What BRAND is it?", "What is the time?"]
  data = [
    {"image_id": "im0", "question": q, "answers": a, "ocr_tokens": ["NIKON", "D5"]}
    for q, a in zip(said, (["nikon"] * 8 + ["canon"] * 2, ["7:30"] * 3 + ["noon"] * 7), strict=True)
  ]
  whole(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
  tokens = "Reference OCR token: NIKON, D5"
  texts = [f"What BRAND is it?\n{tokens}\n{SHORT}", f"{tokens}\nWhat is the time?\n{SHORT}"]
  lines(
    root / "textvqa/llava_textvqa_val_v051_ocr.jsonl",
    [{"question_id": "im0", "image": "im0.jpg", "text": text} for text in texts],
  )


def pope(root: Path) -> None:
  questions, number = [], 0
  for split in ("random", "popular", "adversarial"):
    labels = []
    for i in range(4):
      number += 1
      image, text = f"COCO_{i}.jpg", f"Is there a cat {i} in the image?"
      labels.append(
        {"question_id": i + 1, "image": image, "text": text, "label": "no" if i % 2 else "yes"}
      )
      questions.append(
        {"question_id": number, "image": image, "text": f"{text}\n{SHORT}", "category": split}
      )
    lines(root / f"pope/coco/coco_pope_{split}.json", labels)
  lines(root / "pope/llava_pope_test.jsonl", questions)


def mme(root: Path) -> None:
  release, rows = root / "MME/MME_Benchmark_release_version", []
  forms = {
    "artwork": ("questions_answers_YN", "images/"),
    "count": (".", ""),
    "code_reasoning": (".", ""),
  }
  for category, (texts, images) in forms.items():
    for name in ("a", "b"):
      asked = [(f"Is {name} one?", "Yes", " "), (f"Is {name} two?", "No", "  ")]
      file = release / category / texts / f"{name}.txt"
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text("".join(f"{q}{gap}Please answer yes or no.\t{a}\n" for q, a, gap in asked))
      rows += [
        {
          "question_id": f"{category}/{name}.png",
          "image": f"{category}/{images}{name}.png",
          "text": f"{q}\n{SHORT}",
          "category": category,
        }
        for q, _, _ in asked
      ]
  lines(root / "MME/llava_mme.jsonl", rows)


def mmbench(root: Path, home: str = "mmbench", split: str = "mmbench_dev_20230712") -> None:
  (root / home).mkdir(parents=True, exist_ok=True)
  header = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
  ]
  image = base64.b64encode(picture(9)).decode()
  rows = [
    [3, 'what is "it"?', "a hint", "cat", "dog", "cow", "", "B", "animals", image],
    [5, "which\tone?", "nan", "red", "blue", "None", "", "A", "colours", image],
    [9, "how\nmany?", "", "1", "2", "3", "4", "D", "counts", "3"],
  ]
  with (root / home / f"{split}.tsv").open("w", newline="") as file:
    writer = csv.writer(file, delimiter="\t")
    writer.writerows([header, *([*row, "s", "l2", "c", "dev"] for row in rows)])


def mmbench_cn(root: Path) -> None:
  mmbench(root, "mmbench_cn", "mmbench_dev_cn_20231003")


def seed(root: Path) -> None:
  questions = [
    {
      "question_id": str(i),
      "question_type_id": 1 + i % 2,
      "data_type": "image",
      "answer": "AB"[i % 2],
    }
    for i in range(4)
  ]
  questions.append(
    {"question_id": "v9", "question_type_id": 10, "data_type": "video", "answer": "C"}
  )
  types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
  whole(root / "seed_bench/SEED-Bench.json", {"questions": questions, "question_type": types})
  lines(
    root / "seed_bench/llava-seed-bench.jsonl",
    [
      {
        "question_id": int(q["question_id"]) if q["data_type"] == "image" else q["question_id"],
        "image": f"SEED-Bench-image/{q['question_id']}",
        "text": f"Which?\nA. x\nB. y\n{LETTER}",
      }
      for q in questions
    ],
  )


def llava_bench(root: Path) -> None:
  home = root / "llava-bench-in-the-wild"
  names = ["conv", "detail", "complex", "conv"]
  lines(
    home / "questions.jsonl",
    [
      {"question_id": i, "image": f"00{i % 2}.jpg", "text": f"What {i}?", "category": name}
      for i, name in enumerate(names)
    ],
  )
  captions: list[Any] = [["A cat.", "On a mat."], "A dog."]
  lines(
    home / "context.jsonl",
    [{"id": i, "image": f"00{i}.jpg", "caption": c} for i, c in enumerate(captions)],
  )
  lines(
    home / "answers_gpt4.jsonl",
    [{"question_id": i, "text": f"truth {i}", "answer_id": f"g{i}"} for i in range(len(names))],
  )


def mmvet(root: Path) -> None:
  rows = [
    ("What is x?", "-1<AND>-5", ["math", "ocr"]),
    ("Who?", "Ann<OR>Anne", ["rec"]),
    ("Where?", "here", ["rec"]),
  ]
  lines(
    root / "mm-vet/llava-mm-vet.jsonl",
    [{"question_id": i, "image": f"v1_{i}.png", "text": q} for i, (q, _, _) in enumerate(rows)],
  )
  whole(
    root / "mm-vet/mm-vet.json",
    {
      f"v1_{i}": {"imagename": f"v1_{i}.png", "question": q, "answer": a, "capability": c}
      for i, (q, a, c) in enumerate(rows)
    },
  )


WRITERS: dict[str, Callable[[Path], None]] = {
  writer.__name__: writer
  for writer in (
    vqav2,
    gqa,
    vizwiz,
    scienceqa,
    textvqa,
    pope,
    mme,
    mmbench,
    mmbench_cn,
    seed,
    llava_bench,
    mmvet,
  )
}


def right(item: Item) -> str:
  """An answer that is right under every protocol (or any text where a server decides)."""
  truth = item.truth
  return "x" if truth is None else truth[0] if isinstance(truth, list) else str(truth).lower()


def right_letter(item: Item) -> str:
  return str(item.truth)


RIGHT: dict[str, Callable[[Item], str]] = dict.fromkeys(WRITERS, right)
RIGHT |= dict.fromkeys(("scienceqa", "seed", "mmbench", "mmbench_cn"), right_letter)
RIGHT["textvqa"] = lambda item: max(item.truth, key=item.truth.count)


def damage(path: Path, old: str, new: str) -> None:
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))
