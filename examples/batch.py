"""Answers many questions in batches: python examples/batch.py CHECKPOINT QUESTIONS.jsonl

A line is {"question": TEXT, "images": [FILE, ...]}. A question that fails does not stop the others.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import llava_sp_jax as llava


def main(argv: Sequence[str]) -> None:
  checkpoint, file = argv
  rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
  requests = [llava.Request(row["question"], tuple(row.get("images", ()))) for row in rows]
  model = llava.load(checkpoint, batch_size=8)
  greedy = llava.Generation(max_new_tokens=16)
  for request, answer in zip(requests, model.answers(requests, greedy), strict=True):
    print(json.dumps({"question": request.question, "answer": answer.text, "error": answer.error}))


if __name__ == "__main__":
  main(sys.argv[1:])
