"""llava-sp eval: scores a run on a benchmark by the text that it generates."""

from __future__ import annotations

import argparse


def parser() -> argparse.ArgumentParser:
  result = argparse.ArgumentParser(
    prog="llava-sp eval",
    description="Scores a run on a benchmark: predictions.jsonl, scores.json, and a table.",
    epilog="example: llava-sp eval --checkpoint runs/finetune --task easy_vqa --data data/easy_vqa",
  )
  result.add_argument("--checkpoint", required=True, help="run folder of llava-sp train")
  result.add_argument("--task", default="easy_vqa", help="benchmark (default: %(default)s)")
  result.add_argument("--data", required=True, help="folder of the benchmark's files")
  result.add_argument("--out", default="", help="result folder (default: CHECKPOINT/eval-TASK)")
  result.add_argument("--batch-size", type=int, default=64, help="questions at a time")
  result.add_argument("--max-new-tokens", type=int, default=8)
  result.add_argument("--limit", type=int, default=0, help="only the first N questions")
  return result


def main(argv: list[str]) -> None:
  options = parser().parse_args(argv)
  from llava_sp_jax.config import lookup
  from llava_sp_jax.eval import report, run
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine
  from llava_sp_jax.infer.generation import Generation

  task = lookup("--task", options.task, run.TASKS)(options.data)
  model = pretrained.from_run(options.checkpoint)
  engine = Engine(model, options.batch_size, Generation(max_new_tokens=options.max_new_tokens))
  out = options.out or f"{options.checkpoint}/eval-{options.task}"
  about = {
    "checkpoint": options.checkpoint, "step": model.step, "fingerprint": model.fingerprint,
    "generation": {"greedy": True, "max_new_tokens": options.max_new_tokens},
  }  # fmt: skip
  scores = run.run(task, engine, out, options.limit, about)
  print(report.score_table(scores))
  print(f"written: {out}/predictions.jsonl, {out}/scores.json")
