"""Predicts the hours of the paper's twelve benchmarks on a pod, and shows where they go.

Usage: python benchmarks/paper_evaluation.py FOLDER --tokenizer TOKENIZER
         [--run RESULTS] [--out docs/results/paper_evaluation]

FOLDER has the files of benchmarks/paper_files.py (or the real ones). On a pod each host has an engine
on its own chips and a share of the questions; here the engine's schedule for the first host's share
runs on shapes, and the sizes with most of the work are compiled for the chips. RESULTS is the folder
of `llava-sp eval` over the same files, of which the page has the counts. Needs libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import paper_folder

from llava_sp_jax import jsonl, provenance
from llava_sp_jax.eval import absent
from llava_sp_jax.plan import evaluation, topologies
from llava_sp_jax.plan.compile import compiler
from llava_sp_jax.tools import plan as plan_tool

RECIPE = "configs/finetune_lora.py:init="
POD, HOSTS = "v5e-16", 4  # hosts of one slice, each with the chips of CHIPS
CHIPS = "v5e-4"
PROGRAMS = {  # as the page names them
  "encode": "tower",
  "grow": "prefill of images",
  "admit": "prefill of questions",
  "decode": "decoding",
}


@dataclasses.dataclass(frozen=True)
class Way:
  """Describes how a host holds the model, and how many answers it decodes together."""

  name: str
  mesh: tuple[int, int, int]
  rows: int
  options: tuple[str, ...] = ()


WAYS = (
  Way("bfloat16, tensor 4", (1, 1, 4), 16),
  Way("int8 weights and cache, tensor 4", (1, 1, 4), 32, ("--weights", "int8", "--cache", "int8")),
)


def predicted(way: Way, folder: Path, tokenizer: str) -> dict[str, Any]:
  """Predicts all benchmarks in one way; hours are those of the pod, on the first host's share."""
  data, fsdp, tensor = way.mesh
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  mesh = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
  model = [f"--config.data.tokenizer={tokenizer}", "--topology", CHIPS, "--what", "eval"]
  _, config = plan_tool.read(["--config", RECIPE, *model, *mesh, *way.options])
  names = list(paper_folder.SIZES)
  lengths = {name: paper_folder.SIZES[name].answer for name in names}
  found = absent.counted(
    config, dict.fromkeys(names, str(folder)), way.mesh, way.rows, lengths, HOSTS
  )
  told = lambda line: print(line, flush=True)  # noqa: E731
  results, seconds = evaluation.predict(config, topologies.topology(CHIPS), found, told)
  return {
    "way": way.name,
    "rows": way.rows,
    "tasks": {
      name: {
        "questions": one.counted.questions,
        "failed": one.counted.failed,
        "images": one.counted.images,
        "tokens": one.counted.tokens,
        "hours": one.seconds / 3600,
        "share": {p: s / one.seconds for p, s in one.programs.items()},
      }
      for name, one in results.items()
    },
    "seconds": {" ".join(map(str, key)): value for key, value in seconds.items()},
  }


def ran(folder: Path) -> dict[str, Any]:
  """Returns the counts of an evaluation over all files: questions, failures, seconds, images."""
  counts = {}
  for name in paper_folder.SIZES:
    records, _ = jsonl.read(folder / name / "predictions.jsonl")
    sessions, _ = jsonl.read(folder / name / "sessions.jsonl")
    counts[name] = {
      "questions": len(records),
      "failed": sum(bool(r["error"]) for r in records),
      "seconds": sum(s["seconds"] for s in sessions),
      "scored": (folder / name / "scores.json").is_file(),
    }
  return counts


def page(record: dict[str, Any]) -> str:
  lines = [
    "# The paper's twelve benchmarks on a pod",
    "",
    f"LLaVA-SP 7B (cropping) on {record['pod']}: {record['hosts']} hosts, each with an engine on its",
    f"{record['chips']} chips and a share of the questions. **Predicted, not measured**: the engine's",
    "own schedule ran on shapes for the first host's share, its programs were compiled for the chips",
    f"({record['compiler']}), and `llava-sp plan` times them. Files are synthetic, in the benchmarks'",
    "formats, with their published numbers of questions and images (`benchmarks/paper_files.py`);",
    "the tokens of an answer are an assumption. Reading pictures on the host, which runs beside the",
    "chips, is not in the hours. Made by `python benchmarks/paper_evaluation.py`.",
  ]
  for one in record["ways"]:
    total = sum(task["hours"] for task in one["tasks"].values())
    lines += [
      "",
      f"## {one['way']}, {one['rows']} rows: {total:.2f} hours ({60 * total:.1f} minutes)",
      "",
      "| benchmark | questions | images | tokens of an answer | minutes | "
      + " | ".join(PROGRAMS.values())
      + " | pictures a second and host |",
      "|---|---|---|---|---|" + "---|" * len(PROGRAMS) + "---|",
    ]
    for name, task in one["tasks"].items():
      size = record["sizes"][name]
      share = " | ".join(f"{task['share'].get(program, 0):.0%}" for program in PROGRAMS)
      rate = task["images"] / (3600 * task["hours"])
      lines.append(
        f"| {name} | {size['questions']:,} | {size['images']:,} | {size['answer']} | "
        f"{60 * task['hours']:.2f} | {share} | {rate:.0f} |"
      )
  lines += ["", "![hours by benchmark and program](paper_evaluation.png)"]
  if record["ran"]:
    asked = sum(one["questions"] for one in record["ran"].values())
    failed = sum(one["failed"] for one in record["ran"].values())
    lines += [
      "",
      f"`llava-sp eval` answered all {asked:,} questions of the same files with a small model "
      f"(`--max-new-tokens 3`), {failed} without an answer, and scored them or wrote what a server "
      "scores.",
    ]
  return "\n".join(lines) + "\n"


def picture(record: dict[str, Any], path: Path) -> None:
  """Draws a bar of each benchmark, with a part for each program."""
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, len(record["ways"]), figsize=(11, 4), sharex=True, sharey=True)
  for axis, one in zip(axes, record["ways"], strict=True):
    names, left = list(one["tasks"]), [0.0] * len(one["tasks"])
    for program, label in PROGRAMS.items():
      hours = [t["hours"] * t["share"].get(program, 0) for t in one["tasks"].values()]
      axis.barh(names, hours, left=left, label=label)
      left = [a + b for a, b in zip(left, hours, strict=True)]
    axis.set_title(f"{one['way']}: {sum(left):.2f} h", fontsize=9)
    axis.set_xlabel(f"predicted hours on {record['pod']}")
    axis.invert_yaxis()
  axes[-1].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument(
    "--tokenizer", required=True, help="folder of a tokenizer of 32k to 64k tokens"
  )
  parser.add_argument("--run", type=Path, help="results of llava-sp eval over the same files")
  parser.add_argument("--out", type=Path, default=Path("docs/results/paper_evaluation"))
  options = parser.parse_args()
  record = {
    "pod": POD,
    "hosts": HOSTS,
    "chips": CHIPS,
    "compiler": compiler(topologies.topology(CHIPS)),
    "sizes": {name: vars(size) for name, size in paper_folder.SIZES.items()},
    "ways": [predicted(way, options.folder, options.tokenizer) for way in WAYS],
    "ran": ran(options.run) if options.run else {},
  }
  provenance.write(options.out, record)
  provenance.named(options.out, "md").write_text(page(record))
  picture(record, provenance.named(options.out, "png"))
  print(page(record))


if __name__ == "__main__":
  main()
