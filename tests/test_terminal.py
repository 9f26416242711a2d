"""Names out of files do not drive a terminal, tables keep their shape, and streams may be what they are."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sp_jax import cli, config, console
from llava_sp_jax.results import tables
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools import train as train_tool
from tests.conftest import REPOSITORY

HOSTILE = "a\x1b[2Jb\nc\u202ed\x9be\rf\ud800|[/red]"
SHOWN = "a\\x1b[2Jb; c\\u202ed\\x9be\\rf\\ud800|[/red]"


def test_a_name_becomes_one_line_that_nothing_obeys() -> None:
  assert console.one_line(HOSTILE) == SHOWN
  assert console.one_line("found:\n  one\n  two\n") == "found: one; two"
  assert console.one_line("plain, ünïcode 中文 \U0001f600") == "plain, ünïcode 中文 \U0001f600"
  assert console.safe("two\nlines\tstay\x07") == "two\nlines\tstay\\x07"
  for joined in (
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\U0001f468\u200d\U0001f469\ufe0f",
  ):
    assert console.safe(joined) == joined, "Persian and emoji are joined by what shows nothing"


@pytest.mark.parametrize(
  "error",
  [config.ConfigError(HOSTILE), FileNotFoundError(2, "No such file", HOSTILE), OSError(HOSTILE)],
)
def test_an_error_is_one_line_whatever_it_names(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
) -> None:
  def fail(argv: list[str]) -> None:
    raise error

  monkeypatch.setattr(train_tool, "main", fail)
  assert cli.main(["train"]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert SHOWN in line


def test_a_table_keeps_its_columns(capsys: pytest.CaptureFixture) -> None:
  text = tables.markdown(["kind", "n"], [[HOSTILE, "1"], ["b\\", "2"]])
  assert text.splitlines() == [
    "| kind | n |",
    "| --- | --- |",
    f"| {SHOWN.replace(chr(92), 2 * chr(92)).replace('|', chr(92) + '|')} | 1 |",
    "| b\\\\ | 2 |",
  ]
  tables.draw(HOSTILE, ["kind"], [["x"]])
  assert capsys.readouterr().out.startswith(f"{SHOWN}\n\n| kind |")


def test_a_table_on_a_terminal_takes_no_markup(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "120")
  tables.draw("[/red] title", ["kind"], [["[/red]\x1b[2J"]])
  printed = capsys.readouterr().out
  assert "[/red]\\x1b[2J" in printed
  assert "[/red] title" in printed
  assert "\x1b[2J" not in printed


def test_the_missing_package_is_named() -> None:
  with pytest.raises(ModuleNotFoundError) as caught:
    importlib.import_module("no_such_package_of_anybody")
  assert console.error_line(caught.value).startswith(
    "No module named 'no_such_package_of_anybody'; install"
  )
  assert console.error_line(ModuleNotFoundError("x", name="llava_sp_jax.gone")) == ""


def test_a_mistyped_option_is_told_with_the_one_that_was_meant(
  capsys: pytest.CaptureFixture,
) -> None:
  for argv in (["eval", "--limt", "5"], ["eval", "--limt=5", "--data", "x"]):
    with pytest.raises(SystemExit) as ended:
      cli.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
      "llava-sp eval: unknown --limt (did you mean --limit?); see llava-sp eval --help\n"
    )
  assert cli.main(["train", "--config=easy_vqa", "--wordkir=x"]) == 1
  assert "unknown --wordkir (did you mean --workdir?)" in capsys.readouterr().err
  assert arguments.unknown_options(["--zzz"], ["--limit"]) == "unknown --zzz"


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    (["eval", "--limit", "five"], "argument --limit: invalid int value: 'five'"),
    (["eval", "--limit"], "argument --limit: expected one argument"),
    (["generate"], "the following arguments are required: --checkpoint, --question"),
    (["generate", "--checkpoint=x", "--question=q", "--temperature=nan"],
     "--temperature: expected 0 (greedy) or more, found nan"),
    (["generate", "--checkpoint=x", "--question=q", "--temperature=inf"], "or more, found inf"),
    (["generate", "--checkpoint=x", "--question=q", f"--seed={1 << 63}"], "an integer of 64 bits, found"),
    (["generate", "--checkpoint=x", "--question=q", "--max-new-tokens=99999999999"], "from 1 to 10"),
    (["convert", "a"], "the following arguments are required: OUT"),
    (["inspect", "x", "\x1b[2J"], "unknown \\x1b[2J"),
  ],
)  # fmt: skip
def test_what_is_mistyped_is_one_line(
  capsys: pytest.CaptureFixture, argv: list[str], said: str
) -> None:
  with pytest.raises(SystemExit) as ended:
    cli.main(argv)
  assert ended.value.code == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  (line,) = printed.err.splitlines()
  assert line.startswith(f"llava-sp {argv[0]}: ")
  assert said in line


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("1 / 0\n", "ends with ZeroDivisionError: division by zero"),
    ("def get_config(:\n", "ends with SyntaxError"),
    ("def get_config(arg=''):\n  return 3\n", "returned 3, expected an ml_collections.ConfigDict"),
    ("raise SystemExit(0)\n", "ends with SystemExit: 0"),
    ("def get_config():\n  raise KeyError('x')\n", "ends with KeyError: 'x'"),
    ("import no_such_package_of_anybody\n", "ends with ModuleNotFoundError: No module named"),
    ("x = 1\n", "has no function get_config"),
  ],
)
def test_a_recipe_that_fails_is_one_line(
  tmp_path: Path, capsys: pytest.CaptureFixture, text: str, said: str
) -> None:
  (tmp_path / "recipe.py").write_text(text)
  argv = ["train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}"]
  assert cli.main(argv) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert f"--config: {str(tmp_path / 'recipe.py')!r}"[:20] in line or "--config: " in line
  assert said in line
  assert not (tmp_path / "run").exists()


SHELL: list[tuple[str, int, str, str]] = [
  # redirections, code, standard output, standard error
  (">&-", 0, "", ""),
  ("2>&- >&-", 0, "", ""),
  ("<&-", 0, "version", ""),
  ("> /dev/full", 1, "", "llava-sp: standard output: No space left on device\n"),
]


@pytest.mark.parametrize(("redirected", "code", "out", "err"), SHELL)
def test_streams_may_be_closed_or_full(redirected: str, code: int, out: str, err: str) -> None:
  done = subprocess.run(
    f"{sys.executable} -m llava_sp_jax --version {redirected}",
    shell=True,
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=False,
  )
  assert (done.returncode, done.stderr) == (code, err)
  assert bool(done.stdout) == bool(out)


def test_help_may_be_read_in_part_and_in_ascii() -> None:
  command = f"{sys.executable} -m llava_sp_jax"
  done = subprocess.run(
    ["bash", "-c", f"set -o pipefail; {command} eval --help | true; {command} eval --list | wc -l"],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=True,
    env={
      **os.environ,
      "PYTHONIOENCODING": "ascii",
      "COLUMNS": "20",
      "TERM": "dumb",
      "NO_COLOR": "1",
    },
  )
  assert done.stderr == ""
  assert int(done.stdout) > 20
