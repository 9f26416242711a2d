"""lmms-eval, unchanged, asks our server the questions of a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sp_jax.infer.requests import Request
from tests.clients import run
from tests.serve.answered import again
from tests.serve.conftest import Real

QUESTIONS = ("what is it?", "is it red?", "which shape is left of it?", "and now?")
# The wheel of 0.7.2 lacks files of its own tasks, so its command ends before it reads ours.
PROGRAM = """
import json, sys
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager

manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
found = evaluator.simple_evaluate(
  task_manager=manager, tasks=["local_pictures"], batch_size=1, **json.loads(sys.argv[2]))
samples = [
  {"id": each["doc_id"], "said": each["filtered_resps"], "tokens": each.get("token_counts")}
  for each in found["samples"]["local_pictures"]]
score = found["results"]["local_pictures"]["exact,none"]
json.dump({"samples": samples, "score": score}, open("found.json", "w"))
"""
TASK = """
task: local_pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 12, temperature: 0, until: ["\\n\\n"]}}
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0}}
"""
UTILS = """
from PIL import Image

def pictures(doc):
  return [Image.open(path).convert("RGB") for path in doc["pictures"]]

def question(doc, lmms_eval_specific_kwargs=None):
  return doc["question"]

def results(doc, found):
  return {"exact": float(found[0].strip() == doc["answer"])}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("model", "options"),
  [("openai", {}), ("openai", {"force_simple": True}), ("async_openai", {})],
  ids=["openai", "openai, simple", "async_openai"],
)
def test_lmms_eval(
  model: str, options: dict[str, object], real: Real, tiny_data: Path, tmp_path: Path
) -> None:
  """All answers are those of the engine, so the score is 1."""
  docs = []
  for i, question in enumerate(QUESTIONS):
    for paths in ([], [tiny_data / "images" / f"{i}.png"]):
      pictures = tuple(path.read_bytes() for path in paths)
      answer = again(real, Request(question, pictures)).text
      docs.append({"question": question, "pictures": [*map(str, paths)], "answer": answer})
  assert len({doc["answer"] for doc in docs}) > len(docs) // 2
  (tmp_path / "data.json").write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
  folder = tmp_path / "tasks"
  folder.mkdir()
  (folder / "local.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
  (folder / "utils.py").write_text(UTILS)
  given = {"model": model, "model_args": f"model=tiny,base_url={real.server.url}/v1,api_key=none"}
  run("lmms_eval", PROGRAM, folder, json.dumps(given | options), cwd=tmp_path)
  found = json.loads((tmp_path / "found.json").read_text())
  assert len(found["samples"]) == len(docs)
  for sample in found["samples"]:
    assert sample["said"] == [docs[sample["id"]]["answer"]]
  assert found["score"] == 1
