"""What commands set before JAX starts: a cache that a second start reads, and no noise."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llava_sp_jax import cli, environment
from llava_sp_jax.distributed import processes
from tests.conftest import REPOSITORY

# Compiles a program that takes well under a second, and counts what the cache had and had not.
PROGRAM = """
import collections
from llava_sp_jax import environment
environment.prepare({arguments!r})
import jax
import jax.numpy as jnp
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(8)).block_until_ready()
print(counts["cache_hits"], counts["cache_misses"])
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
  """Runs code as a user would who has set nothing but `variables`."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TRANSFORMERS"))}
  return subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=False,
    env=kept | {"JAX_PLATFORMS": "cpu"} | variables,
  )


def compiled(home: Path, *arguments: str, **variables: str) -> tuple[int, int, str]:
  """(programs read, programs compiled, standard error) with a cache home of one's own."""
  done = python(PROGRAM.format(arguments=arguments), XDG_CACHE_HOME=str(home), **variables)
  assert done.returncode == 0, done.stderr
  hits, misses = map(int, done.stdout.split())
  return hits, misses, done.stderr


def test_starts_are_measured_with_the_flag_of_the_scripts() -> None:
  from benchmarks import second_start

  script = (REPOSITORY / "scripts" / "environment.sh").read_text()
  assert f'XLA_FLAGS="${{XLA_FLAGS-{second_start.FLAGS["without YNNPACK"]}}}"' in script


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
  hits, misses, printed = compiled(tmp_path)
  assert (hits, printed) == (0, "")
  assert misses > 0
  assert compiled(tmp_path) == (misses, 0, "")
  (folder,) = (tmp_path / "llava-sp-jax").iterdir()
  assert folder == environment.cache_folder({"XDG_CACHE_HOME": str(tmp_path)})
  assert len(list(folder.glob("*-cache"))) == misses


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path) -> None:
  (tmp_path / "llava-sp-jax").write_text("a file where the folder should be")
  hits, misses, printed = compiled(tmp_path)
  assert (hits, misses) == (0, 0)  # the cache is off, the program has run
  (line,) = printed.splitlines()
  assert f"not kept in {tmp_path}/llava-sp-jax" in line
  assert "Not a directory; set JAX_COMPILATION_CACHE_DIR" in line


def test_no_cache_neither_reads_nor_writes(tmp_path: Path) -> None:
  named = tmp_path / "named"
  assert compiled(tmp_path, "--no-cache", JAX_COMPILATION_CACHE_DIR=str(named)) == (0, 0, "")
  assert list(tmp_path.iterdir()) == []


def test_what_the_user_has_set_stays() -> None:
  given = {
    "JAX_COMPILATION_CACHE_DIR": "gs://bucket/programs",
    "TPU_WORKER_HOSTNAMES": "a,b",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "2",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "",
  }
  after = dict(given)
  environment.prepare([], after)
  assert {name: after[name] for name in given} == given


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_takes_no_cache(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
  seen: list[list[str]] = []
  module = importlib.import_module(f"llava_sp_jax.{cli.COMMANDS[command][0]}")
  monkeypatch.setattr(module, "main", seen.append)
  monkeypatch.setenv(environment.ENABLED, "true")
  assert cli.main([command, "--a=b", "--no-cache", "c"]) == 0
  assert seen == [["--a=b", "c"]]
  assert os.environ[environment.ENABLED] == "false"


def test_relative_cache_homes_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("HOME", "/home/me")
  assert environment.cache_folder({"XDG_CACHE_HOME": "here"}).is_relative_to("/home/me/.cache")


def test_entries_that_nobody_reads_are_removed(tmp_path: Path) -> None:
  for name in ("read", "unread"):
    (tmp_path / "cpu").mkdir(exist_ok=True)
    (tmp_path / "cpu" / name).write_text(name)
  now = 1e9
  old = now - (environment.KEEP_DAYS + 1) * 24 * 3600
  os.utime(tmp_path / "cpu" / "unread", (old, old))
  os.utime(tmp_path / "cpu" / "read", (now, old))
  environment.remove_unused(tmp_path, now)
  assert [file.name for file in (tmp_path / "cpu").iterdir()] == ["read"]


def test_where_a_tpu_is_seen(tmp_path: Path) -> None:
  """By its PCI vendor, or by device files alone; other devices are none."""
  vendor = tmp_path / "pci" / "sys/bus/pci/devices/0000:00:04.0/vendor"
  vendor.parent.mkdir(parents=True)
  vendor.write_text("0x1234\n")
  assert not environment.has_tpu(tmp_path / "pci")
  vendor.write_text("0x1ae0\n")
  assert environment.has_tpu(tmp_path / "pci")
  (tmp_path / "files" / "dev").mkdir(parents=True)
  assert not environment.has_tpu(tmp_path / "files")
  (tmp_path / "files" / "dev" / "accel0").touch()
  assert environment.has_tpu(tmp_path / "files")


@pytest.mark.parametrize("tpu", [True, False])
def test_libtpu_is_told_nothing_where_a_tpu_is(tpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(environment, "has_tpu", lambda: tpu)
  after: dict[str, str] = {"JAX_COMPILATION_CACHE_DIR": ""}
  environment.prepare([], after)
  assert [name in after for name in environment.QUIET_WITHOUT_TPU] == [not tpu, not tpu]


def test_transformers_does_not_say_that_torch_is_absent() -> None:
  """It does without us, or this test could not fail."""
  code = "import sys; sys.modules['torch'] = None\n{}\nimport transformers"
  assert "PyTorch was not found" in python(code.format("")).stderr
  ours = "from llava_sp_jax import environment; environment.prepare(['--no-cache'])"
  assert python(code.format(ours)).stderr == ""


@pytest.mark.parametrize(
  ("own", "shared", "folder", "enabled"),
  [
    (True, "run", "run/compiled", True),
    (True, "", None, False),  # nothing that all of them see
    (False, "run", None, True),  # the user's
  ],
)
def test_several_processes_keep_programs_where_all_see_them(
  own: bool, shared: str, folder: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  default = str(environment.cache_folder()) if own else "/the/user's"
  changed = {"jax_compilation_cache_dir": default, "jax_enable_compilation_cache": True}
  monkeypatch.setattr(jax.distributed, "is_initialized", iter([False, True]).__next__)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
  monkeypatch.setenv(environment.FOLDER, default)
  monkeypatch.setattr(jax.config, "update", changed.__setitem__)
  flags = {"coordinator": "localhost:1", "processes": "2", "process": "0"}
  processes.start(flags, shared=shared)
  assert changed["jax_compilation_cache_dir"] == (folder or default)
  assert changed["jax_enable_compilation_cache"] is enabled


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
  """A command goes on: the folder cannot be made, which is said once."""

  def nowhere(self: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(Path, "expanduser", nowhere)
  assert environment.cache_folder({}).is_relative_to("/nonexistent")
