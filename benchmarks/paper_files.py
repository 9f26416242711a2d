"""Writes synthetic files for the twelve benchmarks of the paper, in their formats and full sizes.

Usage: python benchmarks/paper_files.py FOLDER [--share 1]

Questions are random words; images are links to a few noisy JPEG files of 640x480. The numbers of
questions and images are those of the published test sets; the length of a question is about that of
the real ones. The folder is what `llava-sp eval --data FOLDER` takes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

from paper_folder import WORDS, Files

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SPLITS = ("random", "popular", "adversarial")  # of POPE


def vqav2(files: Files) -> None:
  count, images = files.size("vqav2")
  rows = [
    {
      "question_id": i,
      "image": f"COCO_test2015_{i % images:012d}.jpg",
      "text": f"{files.text('vqav2')}\n{SHORT}",
      "category": "default",
    }
    for i in range(count)
  ]
  rows.sort(key=lambda row: row["image"])
  for split in ("test2015", "test-dev2015"):
    files.lines(f"vqav2/llava_vqav2_mscoco_{split}.jsonl", rows)
  files.images("vqav2/test2015", sorted({row["image"] for row in rows}))


def gqa(files: Files) -> None:
  count, images = files.size("gqa")
  rows = [
    {
      "question_id": f"2{i:07d}",
      "image": f"n{i % images}.jpg",
      "text": f"{files.text('gqa')}\n{SHORT}",
    }
    for i in range(count)
  ]
  kinds = [("query", "attr", "red"), ("verify", "obj", "yes"), ("choose", "rel", "left")]
  truths = {}
  for i, row in enumerate(rows):
    structural, semantic, answer = kinds[i % 3]
    types = {"structural": structural, "semantic": semantic}
    truths[row["question_id"]] = {"answer": answer, "isBalanced": True, "types": types}
  files.lines("gqa/llava_gqa_testdev_balanced.jsonl", rows)
  files.whole("gqa/data/testdev_balanced_questions.json", truths)
  files.images("gqa/data/images", [f"n{i}.jpg" for i in range(images)])


def vizwiz(files: Files) -> None:
  count, _ = files.size("vizwiz")
  hint = "When the provided information is insufficient, respond with 'Unanswerable'."
  rows = [
    {
      "question_id": i,
      "image": f"VizWiz_test_{i:08d}.jpg",
      "text": f"{files.text('vizwiz')}\n{hint}\n{SHORT}",
    }
    for i in range(count)
  ]
  files.lines("vizwiz/llava_test.jsonl", rows)
  files.images("vizwiz/test", [row["image"] for row in rows])


def scienceqa(files: Files) -> None:
  count, images = files.size("scienceqa")
  problems, rows = {}, []
  for i in range(count):
    question, shown = files.text("scienceqa"), i < images
    problems[str(i)] = {
      "question": question,
      "choices": ["ice", "fire", "air"],
      "answer": i % 3,
      "hint": "",
      "subject": ("natural science", "social science", "language science")[i % 3],
      "image": "image.png" if shown else None,
    }
    said = f"Context: N/A\n{question}\n(A) ice (B) fire (C) air"
    turns = [
      {"from": "human", "value": f"<image>\n{said}" if shown else said},
      {"from": "gpt", "value": "The answer is A."},
    ]
    picture = {"image": f"{i}/image.png"} if shown else {}
    rows.append({"id": str(i), "conversations": turns, **picture})
  files.whole("scienceqa/llava_test_CQM-A.json", rows)
  files.whole("scienceqa/problems.json", problems)
  files.whole("scienceqa/pid_splits.json", {"train": [], "val": [], "test": list(problems)})
  files.images("scienceqa/images/test", [f"{i}/image.png" for i in range(images)])


def textvqa(files: Files) -> None:
  count, images = files.size("textvqa")
  data, rows = [], []
  for i in range(count):
    image, question = f"{i % images:016x}", f"{files.text('textvqa')[:-1]} {i}?"
    tokens = files.rng.choice(WORDS, 12).tolist()
    data.append(
      {"image_id": image, "question": question, "answers": ["nikon"] * 10, "ocr_tokens": tokens}
    )
    text = f"{question.capitalize()}\nReference OCR token: {', '.join(tokens)}\n{SHORT}"
    rows.append({"question_id": image, "image": f"{image}.jpg", "text": text})
  files.whole("textvqa/TextVQA_0.5.1_val.json", {"data": data})
  files.lines("textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)
  files.images("textvqa/train_images", sorted({row["image"] for row in rows}))


def pope(files: Files) -> None:
  count, images = files.size("pope")
  each, rows = max(1, count // 3), []
  for split in SPLITS:
    labels = []
    for i in range(each):
      image, text = f"COCO_val2014_{i % images:012d}.jpg", f"Is there a {WORDS[i % 30]} {i}?"
      label = "no" if i % 2 else "yes"
      labels.append({"question_id": i + 1, "image": image, "text": text, "label": label})
      asked = {"question_id": len(rows) + 1, "image": image, "text": f"{text}\n{SHORT}"}
      rows.append({**asked, "category": split})
    files.lines(f"pope/coco/coco_pope_{split}.json", labels)
  files.lines("pope/llava_pope_test.jsonl", rows)
  files.images("pope/val2014", sorted({row["image"] for row in rows}))


def mme(files: Files) -> None:
  count, _ = files.size("mme")
  release, rows, names = "MME/MME_Benchmark_release_version", [], []
  kinds = ("artwork", "celebrity", "landmark", "posters", "scene")
  for i in range(max(1, count // 2)):
    kind, name = kinds[i % len(kinds)], f"{i:05d}"
    asked = [(f"{files.text('mme')[:-1]} {turn}?", turn) for turn in ("Yes", "No")]
    file = files.root / release / kind / "questions_answers_YN" / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{q} Please answer yes or no.\t{a}\n" for q, a in asked))
    image = f"{kind}/images/{name}.jpg"
    names.append(image)
    rows += [
      {
        "question_id": f"{kind}/{name}.jpg",
        "image": image,
        "text": f"{q}\n{SHORT}",
        "category": kind,
      }
      for q, _ in asked
    ]
  files.lines("MME/llava_mme.jsonl", rows)
  files.images(release, names)


def mmbench(files: Files, name: str = "mmbench", split: str = "mmbench_dev_20230712") -> None:
  count, images = files.size(name)
  header = "index question hint A B C D answer category image source l2-category comment split"
  path = files.root / name / f"{split}.tsv"
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="") as file:
    writer = csv.writer(file, delimiter="\t")
    writer.writerow(header.split())
    for i in range(count):
      choices = files.rng.choice(WORDS, 4).tolist()
      image = files.encoded(i % images)
      about = ["ABCD"[i % 4], "scene", image, "made", "coarse", "", "dev"]
      writer.writerow([i, files.text(name), "", *choices, *about])


def mmbench_cn(files: Files) -> None:
  mmbench(files, "mmbench_cn", "mmbench_dev_cn_20231003")


def seed(files: Files) -> None:
  count, _ = files.size("seed")
  questions = [
    {
      "question_id": str(i),
      "question_type_id": 1 + i % 9,
      "data_type": "image",
      "answer": "ABCD"[i % 4],
    }
    for i in range(count)
  ]
  types = {f"Type {i}": i for i in range(1, 10)}
  files.whole("seed_bench/SEED-Bench.json", {"questions": questions, "question_type": types})
  rows = []
  for i in range(count):
    choices = "\n".join(
      f"{c}. {w}" for c, w in zip("ABCD", files.rng.choice(WORDS, 4), strict=True)
    )
    text = f"{files.text('seed')}\n{choices}\n{LETTER}"
    rows.append({"question_id": i, "image": f"SEED-Bench-image/{i}", "text": text})
  files.lines("seed_bench/llava-seed-bench.jsonl", rows)
  files.images("seed_bench/SEED-Bench-image", [str(i) for i in range(count)])


def llava_bench(files: Files) -> None:
  count, images = files.size("llava_bench")
  home, names = "llava-bench-in-the-wild", ("conv", "detail", "complex")
  files.lines(
    f"{home}/questions.jsonl",
    (
      {
        "question_id": i,
        "image": f"{i % images:03d}.jpg",
        "text": files.text("llava_bench"),
        "category": names[i % 3],
      }
      for i in range(count)
    ),
  )
  captions = ({"id": i, "image": f"{i:03d}.jpg", "caption": "A cat."} for i in range(images))
  files.lines(f"{home}/context.jsonl", captions)
  told = ({"question_id": i, "text": "A cat.", "answer_id": f"g{i}"} for i in range(count))
  files.lines(f"{home}/answers_gpt4.jsonl", told)
  files.images(f"{home}/images", [f"{i:03d}.jpg" for i in range(images)])


def mmvet(files: Files) -> None:
  count, images = files.size("mmvet")
  rows, told = [], {}
  for i in range(count):
    name, question = f"v1_{i}", files.text("mmvet")
    image = f"v1_{i % images}.png"
    rows.append({"question_id": i, "image": image, "text": question})
    told[name] = {
      "imagename": image,
      "question": question,
      "answer": "a cat",
      "capability": [("rec",), ("ocr", "math"), ("know",)][i % 3],
    }
  files.lines("mm-vet/llava-mm-vet.jsonl", rows)
  files.whole("mm-vet/mm-vet.json", told)
  files.images("mm-vet/images", [f"v1_{i}.png" for i in range(images)])


WRITERS: dict[str, Callable[[Files], None]] = {
  "vqav2": vqav2,
  "gqa": gqa,
  "vizwiz": vizwiz,
  "scienceqa": scienceqa,
  "textvqa": textvqa,
  "pope": pope,
  "mme": mme,
  "mmbench": mmbench,
  "mmbench_cn": mmbench_cn,
  "seed": seed,
  "llava_bench": llava_bench,
  "mmvet": mmvet,
}


def write(root: Path, share: float = 1.0) -> None:
  """Writes the files of all benchmarks; `share` of the questions and images of each."""
  files = Files(root, share)
  for name, writer in WRITERS.items():
    writer(files)
    print(f"{name}: {files.size(name)[0]:,} questions", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument(
    "--share", type=float, default=1.0, help="of questions and images (%(default)s)"
  )
  options = parser.parse_args()
  write(options.folder, options.share)


if __name__ == "__main__":
  main()
