"""The launcher for GKE: the manifest that it applies, and the image that it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from llava_sp_jax.training import STOPPED_EARLY
from tests.conftest import REPOSITORY
from tests.test_launchers import JOBSET, RECIPE, launch, program


def manifest(*options: str) -> dict[str, Any]:
  done = launch("launch_gke", *JOBSET, "--dry-run", *options)
  assert (done.returncode, done.stderr) == (0, "")
  first, _, rest = done.stdout.partition("\n")
  assert first == "$ kubectl apply -f - <<EOF"
  assert rest.endswith("\nEOF\n")
  text = rest.removesuffix("EOF\n")
  assert "@" not in text  # every name was filled in
  return yaml.safe_load(text)


def test_dry_run_of_a_jobset() -> None:
  """Hosts, slices and nodes; words reach the container as they were given."""
  words = ['--config.name=it\'s "mine" & \\', "a  b: c", "#no"]
  made = manifest("--slices", "2", "--grace", "60", "--", *words)
  assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = made["spec"]["replicatedJobs"]
  assert (made["metadata"]["name"], job["replicas"]) == ("llava", 2)
  spec = job["template"]["spec"]
  assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (8, 8, 0)
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x8",
  }
  assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 60)
  (container,) = pod["containers"]
  assert container["args"] == ["train", "--config", RECIPE, "--workdir", "/mnt/share/run", *words]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["volumeMounts"] == [{"name": "share", "mountPath": "/mnt/share"}]
  assert pod["volumes"] == [{"name": "share", "persistentVolumeClaim": {"claimName": "share"}}]


def test_a_jobset_goes_on_when_it_was_asked_to_stop() -> None:
  """Code 75 and a preempted node restart it without counting; other errors count."""
  made = manifest("--spot", "--restarts", "0", "--chips-per-host", "8")
  policy = made["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 0
  assert policy["rules"] == [
    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert spec["podFailurePolicy"]["rules"] == [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [STOPPED_EARLY]}},
  ]
  assert spec["parallelism"] == 4
  assert spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_a_jobset_is_applied(tmp_path: Path) -> None:
  program(tmp_path, "kubectl", f'echo "$@" > {tmp_path}/called; cat > {tmp_path}/applied\n')
  done = launch("launch_gke", *JOBSET, PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert (done.returncode, done.stderr) == (0, "")
  assert (tmp_path / "called").read_text() == "apply -f -\n"
  assert yaml.safe_load((tmp_path / "applied").read_text()) == manifest()
  assert "kubectl logs -f --prefix -l jobset.sigs.k8s.io/jobset-name=llava" in done.stdout
  assert "kubectl delete jobset llava" in done.stdout


def test_the_image_copies_what_is_there() -> None:
  """Files that are installed, and extras that exist; it starts llava-sp without a shell."""
  lines = (REPOSITORY / "scripts/container/Dockerfile").read_text().splitlines()
  copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
  assert {"setup.py", "pyproject.toml", "constraints.txt", "."} <= set(copied)
  assert all((REPOSITORY / name).exists() for name in copied)
  (extra,) = [line.partition("=")[2] for line in lines if line.startswith("ARG EXTRA")]
  (installed,) = [line for line in lines if " install " in line and "EXTRA" in line]
  worker = (REPOSITORY / "scripts/on_worker.sh").read_text()
  extras = installed.partition("[")[2].partition("]")[0].replace("$EXTRA", extra)
  assert f"'.[{extras}]'" in worker, "the same as on a TPU VM: runs and data may lie in a bucket"
  for name in extras.split(","):
    assert f'"{name}": [' in (REPOSITORY / "setup.py").read_text()
  assert lines[-1] == 'ENTRYPOINT ["llava-sp"]'


# A copy of the repository as a worker sees it, whose llava-sp is a shell script.
