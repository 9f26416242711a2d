"""Launchers: the commands of --dry-run, and what they do with a pod that comes, goes and fails.

Cloud and cluster are played by small programs on PATH that write down how they are called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))
LAUNCHERS = (
  "launch_tpu_vm",
  "launch_queued_resource",
  "launch_slurm",
  "launch_gke",
  "launch_xpk",
)
CLOUD = ("launch_tpu_vm", "launch_queued_resource")
RECIPE = "configs/finetune_lora.py:size=7b"
POD = (
  f"--name pod --zone here-1a --type v5litepod-16 --version image-1 --config {RECIPE} "
  "--workdir /mnt/share/run"
).split()
JOB = f"--nodes 2 --gpus-per-node 4 --time 8:00:00 --config {RECIPE} --workdir runs/x".split()
JOBSET = (
  "--name llava --image here/llava:1 --accelerator tpu-v5-lite-podslice --topology 4x8 --claim share "
  f"--config {RECIPE} --workdir /mnt/share/run"
).split()
WORKLOAD = (
  f"--name llava --cluster here --type v5litepod-16 --image here/llava:1 --config {RECIPE} "
  "--workdir gs://bucket/run"
).split()
OPTIONS = {
  "launch_tpu_vm": POD,
  "launch_queued_resource": POD,
  "launch_slurm": JOB,
  "launch_gke": JOBSET,
  "launch_xpk": WORKLOAD,
}


def shellcheck(*arguments: str, text: str | None = None) -> str:
  path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  program = shutil.which("shellcheck", path=path)
  assert program, "no shellcheck: pip install -e '.[test]' -c constraints.txt brings it"
  done = subprocess.run(
    [program, *arguments], capture_output=True, text=True, cwd=REPOSITORY, input=text, check=False
  )
  return done.stdout + done.stderr


def launch(name: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ["bash", str(REPOSITORY / "scripts" / f"{name}.sh"), *options],
    capture_output=True,
    text=True,
    cwd="/",
    env={**os.environ, "POLL_SECONDS": "0", **environment},
    check=False,
  )


def test_every_script_passes_shellcheck() -> None:
  assert len(SCRIPTS) > 6
  assert shellcheck(*(f"scripts/{path.name}" for path in SCRIPTS)) == ""


def test_shellcheck_finds_what_is_wrong() -> None:
  assert "SC2086" in shellcheck("-", text='#!/bin/bash\nx="a b"\nls $x\n')


@pytest.mark.parametrize("path", SCRIPTS, ids=[p.stem for p in SCRIPTS])
def test_launchers_are_short_and_name_nobody_s_project(path: Path) -> None:
  text = path.read_text()
  if path.stem in LAUNCHERS or "launchers" in text:
    assert len(text.splitlines()) < 60
  for word in ("us-central", "europe-west", "--project=my", "--account="):
    assert word not in text.replace("--account=A", "")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_explains_every_option(name: str) -> None:
  done = launch(name, "--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert f"bash scripts/{name}.sh --" in done.stdout
  assert "#" not in done.stdout
  for option in OPTIONS[name][::2]:
    assert option in done.stdout


ERRORS = [
  *[(name, options, message) for name in LAUNCHERS for options, message in (
    ([*OPTIONS[name], "--colour", "red"], "unknown option --colour"),
    ([*OPTIONS[name], "--config"], "--config needs a value"),
    ([*OPTIONS[name], "--config", "gone.py:size=7b"], "--config: no file gone.py"),
  )],
  *[(name, ["--name", "pod", "--config", RECIPE], "missing --zone --type --version --workdir")
    for name in CLOUD],
  *[(name, [*POD, "--workdir", "runs/x"], "--workdir: runs/x is neither a full path")
    for name in CLOUD],
  ("launch_slurm", ["--nodes", "2"], "missing --gpus-per-node --time --config --workdir"),
  ("launch_gke", ["--name", "x"], "missing --image --accelerator --topology --claim --config"),
  *[("launch_gke", [*JOBSET, *options], message) for options, message in (
    (["--name", "My_run"], "--name: expected a-z, 0-9 and -, found My_run"),
    (["--topology", "16"], "--topology: expected 4x4 or 2x2x4, found 16"),
    (["--chips-per-host", "5"], "--chips-per-host: 5 does not divide 32 chips"),
    (["--slices", "0"], "chips, slices, grace, restarts: expected numbers, found 4 0 120 3"),
    (["--workdir", "runs/x"], "--workdir: runs/x is not in /mnt/share, where the claim is"),
  )],
  ("launch_xpk", ["--name", "x"], "missing --cluster --type --image --config --workdir"),
  *[("launch_xpk", [*WORKLOAD, *options], message) for options, message in (
    (["--name", "My_run"], "--name: expected a-z, 0-9 and -, found My_run"),
    (["--grace", "no"], "slices, grace, restarts: expected numbers, found 1 no 50"),
    (["--workdir", "runs/x"], "--workdir: runs/x is neither a full path (of a storage) nor gs://"),
  )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), ERRORS)
def test_one_clear_error(name: str, options: list[str], message: str) -> None:
  done = launch(name, "--dry-run", *options)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"{name}.sh: {message}")
  assert line.endswith("; see --help")


ON_WORKER = (
  "tar xzf llava-sp-jax.tgz && bash llava-sp-jax/scripts/on_worker.sh --setup {setup} -- "
  f"--config {RECIPE} --workdir /mnt/share/run"
)
COPY = "$ git archive --format=tar.gz --prefix=llava-sp-jax/ -o {tmp}/llava-sp-jax-pod.tgz HEAD"
TRAIN = [
  "$ gcloud compute tpus tpu-vm scp {tmp}/llava-sp-jax-pod.tgz pod:llava-sp-jax.tgz --zone=here-1a"
  " --worker=all",
  "$ gcloud compute tpus tpu-vm ssh pod --zone=here-1a --worker=all '--command="
  + ON_WORKER.format(setup=r"'\'''\''")
  + "'",
]
COMMANDS = {
  "launch_tpu_vm": [
    COPY,
    "$ gcloud compute tpus tpu-vm describe pod --zone=here-1a '--format=value(state)'",
    "$ gcloud compute tpus tpu-vm create pod --zone=here-1a --accelerator-type=v5litepod-16"
    " --version=image-1 --spot --project=mine",
    *TRAIN,
  ],
  "launch_queued_resource": [
    COPY,
    "$ gcloud compute tpus queued-resources describe pod --zone=here-1a"
    " '--format=value(state.state)'",
    "$ gcloud compute tpus queued-resources create pod --node-id=pod --zone=here-1a"
    " --accelerator-type=v5litepod-16 --runtime-version=image-1 --spot --project=mine",
    *TRAIN,
  ],
}


@pytest.mark.parametrize("name", CLOUD)
def test_dry_run_on_a_pod(name: str, tmp_path: Path) -> None:
  flags = ["--create-flag", "--spot", "--create-flag", "--project=mine"]
  done = launch(name, *POD, *flags, "--dry-run", TMPDIR=str(tmp_path), PATH="/usr/bin:/bin")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.splitlines() == [line.format(tmp=tmp_path) for line in COMMANDS[name]]
  assert not list(tmp_path.iterdir())  # nothing was run


def test_words_reach_the_worker_as_they_were_given(tmp_path: Path) -> None:
  """Through two shells: the one here and the one on the worker."""
  words = ['--config.name=it\'s "mine"', "$HOME", "a  b"]
  done = launch("launch_tpu_vm", *POD, "--setup", "echo 'x'; y", "--dry-run", "--", *words)
  line = done.stdout.splitlines()[-1].removeprefix("$ ")
  show = 'gcloud() { for w; do :; done; printf "%s" "${w#--command=}"; }\n'
  remote = subprocess.check_output(["bash", "-c", show + line], text=True)
  inner = "tar() { :; }\nbash() { printf '%s\\n' \"$@\"; }\n"
  seen = subprocess.check_output(["bash", "-c", inner + remote], text=True).splitlines()
  assert seen == [
    "llava-sp-jax/scripts/on_worker.sh",
    "--setup",
    "echo 'x'; y",
    "--",
    "--config",
    RECIPE,
    "--workdir",
    "/mnt/share/run",
    *words,
  ]


def program(folder: Path, name: str, body: str) -> None:
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{body}")
  path.chmod(0o755)


# `script` holds a line for each call of describe and ssh: what it prints, or the code it ends with.
GCLOUD = """
cd "$(dirname "$0")"
echo "$4" >> calls
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$4" in
  describe) text=$(next states); [ "$text" != ABSENT ] || { echo "NOT_FOUND: no" >&2; exit 1; }
            [ "$text" != BROKEN ] || { echo "no network" >&2; exit 1; }; echo "$text" ;;
  ssh) exit "$(next codes)" ;;
esac
"""
STORIES = {  # states that describe gives, codes that ssh gives, what is called, code at the end
  "new": ("ABSENT READY", "0", "describe create describe scp ssh", 0),
  "reused": ("READY", "0", "describe scp ssh", 0),
  "waited for": ("CREATING CREATING READY", "0", "describe describe describe scp ssh", 0),
  "preempted": ("READY PREEMPTED PREEMPTED ABSENT READY", "255 0",
                "describe scp ssh describe describe delete describe create describe scp ssh", 0),
  "found preempted": ("TERMINATED ABSENT READY", "0",
                      "describe delete describe create describe scp ssh", 0),
  "asked to stop": ("READY READY READY", "75 0", "describe scp ssh describe describe scp ssh", 0),
  "connection lost": ("READY READY READY", "255 0", "describe scp ssh describe describe scp ssh",
                      0),
  "fails on a healthy pod": ("READY READY", "1", "describe scp ssh describe", 1),
  "never reached": ("READY " * 10, "255 " * 5,
                    " ".join(["describe scp ssh describe"] * 5), 2),
  "cannot be asked": ("BROKEN " * 5, "", " ".join(["describe"] * 5), 2),
  "given up": ("FAILED", "", "describe", 2),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("name", CLOUD)
def test_a_pod_that_comes_and_goes(name: str, story: str, tmp_path: Path) -> None:
  states, codes, calls, code = STORIES[story]
  ready = {"launch_queued_resource": ("PREEMPTED", "SUSPENDED")}.get(name, ("", ""))
  if name == "launch_queued_resource":
    states = states.replace("READY", "ACTIVE").replace(*ready).replace("CREATING", "PROVISIONING")
  (tmp_path / "states").write_text("".join(f"{s}\n" for s in states.split()))
  (tmp_path / "codes").write_text("".join(f"{s}\n" for s in codes.split()))
  program(tmp_path, "gcloud", GCLOUD)
  program(tmp_path, "git", "exit 0\n")
  done = launch(name, *POD, TMPDIR=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert (tmp_path / "calls").read_text().split() == calls.split()
  assert done.returncode == code, done.stderr
  assert bool(done.stderr) == (code != 0)


JOB_SCRIPT = f"""#!/usr/bin/env bash
module load cuda
srun --kill-on-bad-exit=1 --gpu-bind=none .venv/bin/llava-sp train --config {RECIPE} \
--workdir runs/x --config.train.keep=3
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi  # saved before the end
exit "$code"
"""


def test_dry_run_of_a_job() -> None:
  done = launch(
    "launch_slurm",
    *JOB,
    "--sbatch-flag",
    "--partition=gpu",
    "--setup",
    "module load cuda",
    "--dry-run",
    "--",
    "--config.train.keep=3",
  )
  assert (done.returncode, done.stderr) == (0, "")
  first, _, script = done.stdout.partition(" <<EOF\n")
  assert first == (
    "$ sbatch --job-name=llava-sp --nodes=2 --gpus-per-node=4 --ntasks-per-node=4"
    " --cpus-per-task=8 --time=8:00:00 --signal=TERM@300 --requeue --open-mode=append"
    " --output=runs/x/slurm-%j.log --partition=gpu"
  )
  assert script == JOB_SCRIPT + "EOF\n"
  assert shellcheck("-", text=JOB_SCRIPT) == ""


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (1, False)])
def test_a_job_goes_on_when_it_was_asked_to_stop(code: int, again: bool, tmp_path: Path) -> None:
  program(tmp_path, "srun", f"exit {code}\n")
  program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued\n')
  environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
  script = JOB_SCRIPT.replace("module load cuda", ":")
  done = subprocess.run(["bash"], input=script, text=True, env=environment, check=False)
  assert done.returncode == code
  assert (tmp_path / "requeued").is_file() == again
  if again:
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
