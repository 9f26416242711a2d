"""llava-sp report: writes a page with figures about the runs of both stages and their scores."""

from __future__ import annotations

from llava_sp_jax import console
from llava_sp_jax.tools import arguments


def main(argv: list[str]) -> None:
  """Writes a report and prints its page."""
  parser = arguments.Parser(
    prog="llava-sp report",
    description="Writes report.md, loss.png, accuracy.png and answers.png.",
    epilog="example: llava-sp report --runs runs/pretrain runs/finetune "
    "--scores runs/finetune/eval-easy_vqa --out runs/report",
  )
  parser.add_argument("--runs", nargs="+", required=True, help="run folders, in order")
  parser.add_argument("--scores", required=True, help="result folder of llava-sp eval")
  parser.add_argument("--out", required=True)
  options = parser.parse_args(argv)
  from llava_sp_jax.results import report

  console.say(report.write(options.runs, options.scores, options.out))
