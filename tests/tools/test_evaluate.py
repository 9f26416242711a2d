"""`llava-sp eval` and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax.eval import identity
from llava_sp_jax.eval import run as run_lib
from llava_sp_jax.infer import engine as infer_engine
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tools import benchmark_options, evaluate


def run(*arguments: str) -> int:
  return cli.main(["eval", *arguments])


def test_it_prints_a_table_and_says_where_all_is(
  run_folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """Twice with other lengths of answers, and the second against the first; then merged again."""
  first, second = tmp_path / "first", tmp_path / "second"
  common = [f"--checkpoint={run_folder}", f"--data=easy_vqa={tiny_data}", "--limit=4"]
  assert run(*common, f"--out={first}", "--max-new-tokens=2") == 0
  printed = capsys.readouterr().out
  assert "| questions | answered | asked | accuracy |" in printed
  assert "| all | 4 | 4 | " in printed
  assert "Over 4 of 4 questions, the first of 12" in printed
  assert f"written: {first}/predictions.jsonl, {first}/scores.json, {first}/index.html" in printed
  scores = json.loads((first / "scores.json").read_text())
  assert scores["generation"]["max_new_tokens"] == 2
  assert scores["checkpoint"] == str(run_folder)
  more = [
    "--mesh=2,1,1",
    "--dtype=bfloat16",
    "--max-new-tokens=5",
    "--stop=x",
    "--stop=zz",
    f"--compare={first}",
  ]
  assert run(*common, f"--out={second}", *more) == 0
  scores = json.loads((second / "scores.json").read_text())
  assert scores["generation"]["stop"] == ["x", "zz"]
  assert scores["model"]["dtype"] == "bfloat16"
  assert scores["compared"]["both"] == 4
  assert "generation.max_new_tokens: 5 here, 2 there" in (second / "index.html").read_text()
  capsys.readouterr()
  assert run(f"--data={tiny_data}", "--limit=4", "--merge", f"--out={second}") == 0
  assert "| all | 4 | 4 | " in capsys.readouterr().out
  assert json.loads((second / "scores.json").read_text())["headline"] == scores["headline"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "no --checkpoint; give the folder of a run"),
    (["--checkpoint=x", "--option=split=test"], "--task easy_vqa: no option split; it has none"),
    (["--checkpoint=x", "--option=split"], "--option: expected KEY=VALUE, found 'split'"),
    (["--checkpoint=x", "--task=mmbench", "--option=circular=maybe"],
     "--option circular: expected true or false, found 'maybe'"),
    (["--checkpoint=x", "--task=mmvet", "--option=judge=x"],
     "--task mmvet: no option judge; it has protocol; a judge is given with --judge-url"),
    (["--checkpoint=x", "--part=2/2"], "part 2/2: parts are counted from 0/N to N-1/N"),
    (["--checkpoint=x", "--compare=gone"], "gone: no settings.json; give the --out of llava-sp eval"),
    (["--checkpoint=x", "--part=half"], "--part: expected I/N such as 0/2, found 'half'"),
    (["--checkpoint=x", "--max-new-tokens=0"], "--max-new-tokens: expected from 1 to 1048576, found 0"),
    (["--checkpoint=x", "--limit=-5", "--batch-size=-1"],
     "--limit: expected a whole number from 0, found -5; --batch-size: expected a whole number "
     "from 1 to 65536, found -1"),
    (["--merge", "--out=x", "--limit=-5"], "--limit: expected a whole number from 0, found -5"),
    (["--checkpoint=x", "--batch-size=99999999"], "from 1 to 65536, found 99999999"),
    (["--checkpoint=x", "--task=,"], "--task: expected a benchmark, found ','; see --list"),
    (["--checkpoint=x", "--part=0/99999999999"], "--part: expected I/N such as 0/2, found '0/99"),
    (["--checkpoint=x", "--out=/dev/null"], "/dev/null: /dev/null is no folder; name another one with"),
    (["--checkpoint=x", "--num-beams=0"], "--num-beams: expected from 1 to 1048576, found 0"),
    (["--checkpoint=x", "--temperature=1", "--num-beams=2"], "--num-beams: expected 1 where"),
    (["--checkpoint=x", "--task=gqa", "--judge-url=http://localhost"], "gqa"),
    (["--merge"], "--merge: give --out"),
    (["--merge", "--out=gone"], "gone: no settings.json; give the --out of llava-sp eval"),
    (["--checkpoint=x", "--coordinator=here"], "no --processes; no --process; --coordinator: expected HOST"),
    (["--checkpoint=x", "--mesh=2"], "--mesh: expected sizes of data, fsdp, tensor such as 1,1,4"),
    (["--checkpoint=gone"], "gone: not a run folder"),
  ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
  tiny_data: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  arguments: list[str],
  message: str,
) -> None:
  monkeypatch.chdir(tmp_path)
  assert run(f"--data={tiny_data}", *arguments) == 1
  found = capsys.readouterr()
  assert found.out == ""
  assert message in found.err
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "command",
  [["eval", "--data=x"], ["generate", "--question=q"], ["merge"], ["inspect"], ["convert"]],
)
def test_what_a_run_says_itself_is_not_said_again(
  run_folder: Path,
  tiny_data: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  command: list[str],
) -> None:
  """It would have no effect, whatever it says."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "x").symlink_to(tiny_data)
  name, *rest = command
  out = [str(tmp_path / "out")] if name in ("merge", "convert") else []
  place = [str(run_folder), *out] if name in ("merge", "inspect", "convert") else []
  place = place or [f"--checkpoint={run_folder}"]
  assert cli.main([name, *rest, *place, "--template=foo", "--variant=bar"]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert f"{run_folder}: says itself what --variant and --template would say" in line


def test_a_run_can_be_converted(
  run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """And what was taken is told."""
  assert cli.main(["convert", str(run_folder), str(tmp_path / "out")]) == 0
  assert f"{tmp_path / 'out'}: a folder of ours, variant pooling" in capsys.readouterr().out


def test_tasks_that_generate_alike_share_one_engine(
  root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As many engines as ways to generate, one after the other, whatever the order of the tasks."""
  engines: list[Any] = []
  used: dict[str, int] = {}

  class Counted:
    def __init__(self, loaded: Any, batch_size: int, generation: Generation, devices: Any):
      self.generation = generation
      engines.append(self)

  def answer(task: Any, engine: Any, *_: Any) -> run_lib.Unfinished:
    assert engine is engines[-1], "an engine of before is still in use"
    assert engine.generation == task.generation
    used[task.name] = len(engines)
    return run_lib.Unfinished("0/2", answered=1, missing=1)

  monkeypatch.setattr(infer_engine, "Engine", Counted)
  monkeypatch.setattr(pretrained, "from_any", lambda *_, **__: None)
  monkeypatch.setattr(identity.ModelIdentity, "of", lambda *_: None)
  monkeypatch.setattr(run_lib, "run", answer)
  names = ("pope", "llava_bench", "gqa", "mmvet", "mme")
  assert run("--checkpoint=x", f"--data={root}", f"--task={','.join(names)}") == 0
  ways = [{"pope", "gqa", "mme"}, {"llava_bench", "mmvet"}]
  assert sorted(used) == sorted(names)
  assert len(engines) == len({e.generation for e in engines}) == len(ways)
  assert all(len({used[name] for name in way}) == 1 for way in ways)


def test_a_judge_has_a_name_and_a_key(
  tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.delenv("NO_SUCH_KEY", raising=False)
  options = [f"--data={tiny_data}", "--checkpoint=x", "--task=mmvet", "--judge-url=http://x/v1"]
  assert run(*options) == 1
  assert "--judge-url without --judge-model" in capsys.readouterr().err
  assert run(*options, "--judge-model=y", "--judge-key-env=NO_SUCH_KEY") == 1
  assert "set the variable NO_SUCH_KEY" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "wanted"), [("false", False), ("true", True), ("False", False)])
def test_an_option_has_the_type_of_its_default(text: str, wanted: bool) -> None:
  given = {"circular": text, "split": "0", "protocol": "lmms"}
  found = benchmark_options._options("mmbench", TASKS["mmbench"], given)
  assert found == {"circular": wanted, "split": "0", "protocol": "lmms"}


def test_where_data_and_results_of_several_tasks_are() -> None:
  names = ["pope", "gqa"]
  assert benchmark_options.data_of("gqa", names, ["root", "pope=elsewhere"]) == "root"
  assert benchmark_options.data_of("pope", names, ["root", "pope=elsewhere"]) == "elsewhere"
  assert benchmark_options.data_of("pope", ["pope"], ["a=b/c"]) == "a=b/c"
  options = evaluate.parser().parse_args(
    ["--data=d", "--checkpoint=c", "--task=a,b", "--task=c", "--compare=x"]
  )
  assert options.task == ["a,b", "c"]
  assert benchmark_options.out_of("pope", names, options) == "c/eval-pope"
  assert evaluate._compare("pope", names, options) == "x/pope"
  options.out = "o"
  assert benchmark_options.out_of("pope", names, options) == "o/pope"
  assert benchmark_options.out_of("pope", ["pope"], options) == "o"


def test_help_names_every_setting_of_generation(capsys: pytest.CaptureFixture) -> None:
  with pytest.raises(SystemExit):
    run("--help")
  printed = capsys.readouterr().out
  for name in (
    "max-new-tokens",
    "temperature",
    "top-k",
    "top-p",
    "num-beams",
    "stop",
    "seed",
    "judge-url",
    "part",
    "merge",
    "compare",
    "protocol",
    "limit",
  ):
    assert f"--{name}" in printed
