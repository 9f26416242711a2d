"""llava-sp eval: scores a checkpoint on benchmarks by the text that it generates."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from llava_sp_jax import console, storage
from llava_sp_jax.infer.generation import ALWAYS, Generation
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.arguments import DTYPE, DTYPES, MESH
from llava_sp_jax.tools.benchmark_options import names_of, out_of, tasks_of
from llava_sp_jax.tools.convert import source_options, to_options

if TYPE_CHECKING:
  from llava_sp_jax.results.scores import BenchmarkScores

DESCRIPTION = """\
Answers the questions of benchmarks and scores the answers. OUT gets predictions.jsonl (a line as
soon as an answer is there), scores.json, submission files where a server scores, and index.html.
The same command resumes a killed one; no question is asked twice."""

MOST = 1 << 16  # the largest batch size

EXAMPLES = """example:
  llava-sp eval --checkpoint runs/finetune --task easy_vqa --data data/easy_vqa
  llava-sp eval --checkpoint llava-sp-lora --base vicuna-7b-v1.5 --task pope,gqa --data playground/data/eval
  llava-sp eval --checkpoint A --task pope --data D --part 0/2 --out shared/pope     on one host
  llava-sp eval --checkpoint A --task pope --data D --part 1/2 --out shared/pope     on another
  llava-sp eval --merge --task pope --data D --out shared/pope                       when both are done
  llava-sp eval --list                                                benchmarks and their protocols
  llava-sp eval --checkpoint A --task vqa_json --data mine.jsonl --protocol contains
  llava-sp eval --checkpoint A --task benchmark.py:Mine --data FOLDER            a class of your own
"""


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp eval",
    description=DESCRIPTION,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = result.add_argument
  add("--checkpoint", default="", help="run of llava-sp train, or any format of llava-sp convert")
  source_options(result)
  add(
    "--task",
    action="append",
    help="benchmark, or FILE.py:Class of your own; several: a,b or again (default: easy_vqa)",
  )
  add(
    "--data",
    default=[],
    action="append",
    metavar="[TASK=]FOLDER",
    help="the benchmark's files, or the root of LLaVA's evaluation folders",
  )
  add("--list", action="store_true", help="lists the benchmarks with their protocols, and exits")
  add(
    "--out",
    default="",
    help="results (default: CHECKPOINT/eval-TASK); with several tasks: OUT/TASK",
  )
  add("--limit", type=int, default=0, metavar="N", help="only the first N questions (0: all)")
  add("--protocol", default="", help="the rule that prompts and scores, where a task has several")
  add("--option", action="append", default=[], metavar="KEY=VALUE", help="any other of the task's")
  add(
    "--compare",
    default="",
    help="results of another run on the same data: shows what flipped; "
    "with several tasks: COMPARE/TASK",
  )
  add(
    "--allow-missing",
    action="store_true",
    help="exit with code 0 although questions have no "
    "answer (an image that cannot be read); else with 1",
  )
  add("--retry", action="store_true", help="ask again what has no answer yet (images put back)")

  hosts = result.add_argument_group("several hosts")
  hosts.add_argument("--part", default="", metavar="I/N", help="only this share of the questions")
  hosts.add_argument("--merge", action="store_true", help="score what the parts in OUT answered")
  for flag, what in (("coordinator", "HOST:PORT"), ("processes", "N"), ("process", "I")):
    hosts.add_argument(f"--{flag}", default="", metavar=what)

  how = result.add_argument_group("generation (default: what the task's protocol asks for)")
  how.add_argument("--batch-size", type=int, default=16, help="questions at a time (%(default)s)")
  how.add_argument("--mesh", default="", help=MESH)
  how.add_argument("--dtype", default="", choices=DTYPES, help=DTYPE)
  arguments.format_options(how.add_argument)
  for field in dataclasses.fields(Generation):
    if field.name not in ALWAYS:
      continue
    flag = "--" + field.name.replace("_", "-")
    if field.name == "stop":
      how.add_argument(flag, action="append", default=None, help="an answer ends before this text")
    else:
      how.add_argument(flag, type=type(field.default), default=None)

  judge = result.add_argument_group("judge (LLaVA-Bench, MM-Vet; an OpenAI-compatible server)")
  judge.add_argument("--judge-url", default="", help="such as http://localhost:8000/v1")
  judge.add_argument("--judge-model", default="", help="as that server names it")
  judge.add_argument(
    "--judge-key-env",
    default="OPENAI_API_KEY",
    help="environment variable with its key; '' for none (default: %(default)s)",
  )
  return result


def main(argv: list[str]) -> int:
  """Evaluates a checkpoint; returns 1 if answers are missing without --allow-missing, else 0."""
  options = parser().parse_args(argv)
  if options.list:
    from llava_sp_jax.results import tables

    tables.draw("", *tables.listed())
    return 0
  from llava_sp_jax.distributed import processes
  from llava_sp_jax.distributed.watchdog import Watchdog

  _check_counts(options)

  flags = {name: text for name in processes.FLAGS if (text := getattr(options, name))}
  processes.start(flags)
  with Watchdog(0):
    tasks = tasks_of(names_of(options), options)
    found = _merge(tasks, options) if options.merge else _evaluate(tasks, options)
    # A process that exits aborts the others, whose questions may take hours longer.
    processes.barrier("answers are written", processes.WITHOUT_LIMIT)
  lines = [line for name, scores in found.items() if (line := _unanswered(name, scores))]
  for line in lines:
    console.say(f"llava-sp eval: {console.one_line(line)}", error=True)
  return 1 if lines and not options.allow_missing else 0


def _unanswered(name: str, scores: BenchmarkScores) -> str:
  """Returns a line about questions without an answer; "" if all have one."""
  if not scores.failures:
    return ""
  first = scores.failures[0]
  return (
    f"{name}: {len(scores.failures)} of {scores.asked} questions have no answer, first {first.id} "
    f"({first.error}); --retry asks them again, --allow-missing takes the scores as they are"
  )


def _check_counts(options: argparse.Namespace) -> None:
  """Raises: ConfigError that lists all options whose number is out of range."""
  from llava_sp_jax.config import ConfigError

  found = {"limit": (options.limit, 0, math.inf), "batch-size": (options.batch_size, 1, MOST)}
  if problems := [
    f"--{name}: expected a whole number from {least}{f' to {most}' if most < math.inf else ''}, "
    f"found {value}"
    for name, (value, least, most) in found.items()
    if not least <= value <= most
  ]:
    raise ConfigError("; ".join(problems))


def _compare(name: str, tasks: Collection[str], options: argparse.Namespace) -> str:
  several = options.compare and len(tasks) > 1
  return f"{options.compare}/{name}" if several else options.compare


def _merge(tasks: dict[str, Any], options: argparse.Namespace) -> dict[str, BenchmarkScores]:
  """Merges and scores the answers of all parts; returns the scores of each task."""
  from llava_sp_jax.config import ConfigError
  from llava_sp_jax.eval import run
  from llava_sp_jax.results import tables

  if not options.out and not options.checkpoint:
    raise ConfigError("--merge: give --out, the folder that the parts wrote to")
  found = {}
  for name, task in tasks.items():
    out = out_of(name, tasks, options)
    found[name] = run.finish(task, out, options.limit, _compare(name, tasks, options))
    tables.show(found[name])
    _written(out)
  _together(found, options)
  return found


def _evaluate(tasks: dict[str, Any], options: argparse.Namespace) -> dict[str, BenchmarkScores]:
  """Evaluates all tasks; returns the scores of each whose parts are all answered."""
  from llava_sp_jax.config import ConfigError
  from llava_sp_jax.distributed import mesh
  from llava_sp_jax.eval import identity, run
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine
  from llava_sp_jax.results import predictions, tables

  if not options.checkpoint:
    raise ConfigError("no --checkpoint; give the folder of a run or a converted model")
  part = predictions.parse_part(options.part) if options.part else None
  for name, task in tasks.items():  # raises before a model is loaded
    run.check(task, _compare(name, tasks, options))
    predictions.check_folder(storage.place(out_of(name, tasks, options)))
    run.questions(task)
  generations = {name: _generation(task, options) for name, task in tasks.items()}
  given = to_options(options, options.checkpoint)
  devices = mesh.local(options.mesh)
  loaded = pretrained.from_any(
    options.checkpoint,
    given,
    dtype=options.dtype,
    weights=options.weights,
    cache=options.cache,
  )
  model = identity.ModelIdentity.of(loaded, options.checkpoint)
  done: dict[str, BenchmarkScores] = {}
  engine: Engine | None = None  # shared by tasks of equal settings: each holds the parameters
  for name, task in sorted(tasks.items(), key=lambda pair: str(generations[pair[0]])):
    if engine is None or engine.generation != generations[name]:
      engine = None
      engine = Engine(loaded, options.batch_size, generations[name], devices)
    out = out_of(name, tasks, options)
    scores = run.run(
      task,
      engine,
      out,
      options.limit,
      model,
      part,
      options.retry,
      _compare(name, tasks, options),
    )
    if isinstance(scores, run.Unfinished):
      console.say(
        f"{out}: part {scores.part} is done; {scores.missing} questions are left to other "
        "parts. The last of them writes the scores, or llava-sp eval --merge"
      )
    else:
      done[name] = scores
      tables.show(scores)
      _written(out)
  _together({name: done[name] for name in tasks if name in done}, options)
  return done


def _together(done: Mapping[str, BenchmarkScores], options: argparse.Namespace) -> None:
  """Prints and writes a table of several tasks, in the order of --task."""
  from llava_sp_jax.results import predictions, tables

  if len(done) < 2:
    return
  head, rows = tables.together(list(done.values()))
  tables.draw("all tasks", head, rows)
  if options.out:
    path = storage.place(options.out) / "scores.md"
    predictions.replace(path, tables.markdown(head, rows) + "\n")
    console.say(f"written: {path}")


def _generation(task: Any, options: argparse.Namespace) -> Generation:
  """Returns the generation settings of a task, with the user's changes. Raises: ConfigError."""
  from llava_sp_jax.config import ConfigError

  given = {name: getattr(options, name) for name in ALWAYS}
  given = {k: tuple(v) if k == "stop" else v for k, v in given.items() if v is not None}
  try:
    result: Generation = dataclasses.replace(task.generation, **given)
    return result
  except ValueError as error:
    setting, found = str(error).split(":", 1)
    raise ConfigError(f"--{setting.replace('_', '-')}:{found}") from None


def _written(out: str) -> None:
  console.say(f"written: {out}/predictions.jsonl, {out}/scores.json, {out}/index.html")
