"""What contributors are given: one script behind the hooks and the workflow, guides that work, a site."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.tasks import catalog
from llava_sp_jax.tasks.task import Prediction
from tests.conftest import REPOSITORY
from tests.test_layers_of_imports import HEIGHT

DOCS = REPOSITORY / "docs"
SITE = ("sphinx", "myst_parser", "furo")


def settings(name: str) -> dict:
  return yaml.safe_load((REPOSITORY / name).read_text())


def test_the_workflow_runs_what_ci_runs() -> None:
  jobs = settings(".github/workflows/ci.yml")["jobs"].values()
  ran = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
  scripts = re.findall(
    r"^bash scripts/[\w.]+(?: --\w+)?", (REPOSITORY / ".ci/run").read_text(), re.M
  )
  assert len(scripts) == 3
  assert set(scripts) <= set(ran)


def test_no_test_replaces_a_clock_of_the_process() -> None:
  """The loop of a server in another thread would sleep by it, for hours. Code is given its clock."""
  replaced = re.compile(r"""patch\w*\.setattr\(\s*(?:[\w.]*\btime,|["'](?:[\w.]+\.)?time\.)""")
  assert replaced.search('monkeypatch.setattr(bucket.time, "monotonic", f)')
  assert replaced.search("monkeypatch.setattr('time.sleep', f)")
  files = sorted((REPOSITORY / "tests").rglob("*.py"))
  found = {
    str(f) for f in files if f.name != Path(__file__).name and replaced.search(f.read_text())
  }
  assert not found


def test_hooks_are_the_checks_of_the_suite() -> None:
  (repository,) = settings(".pre-commit-config.yaml")["repos"]
  assert repository["repo"] == "local", "the tools are those of the environment"
  checks = [hook["entry"].removeprefix("bash scripts/lint.sh ") for hook in repository["hooks"]]
  assert checks == ["format", "lint", "types", "imports"]
  assert "bash scripts/lint.sh\n" in (REPOSITORY / "scripts/test.sh").read_text()


def test_a_check_that_does_not_exist_ends_with_the_known_ones() -> None:
  done = subprocess.run(
    ["bash", "scripts/lint.sh", "spelling"],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=False,
    env={**os.environ, "VENV": str(Path(sys.executable).parents[1])},
  )
  assert done.returncode == 2
  assert "format, lint, types, imports" in done.stderr


def test_every_folder_of_the_package_has_its_folder_of_tests() -> None:
  rooms = {p.parent.name for p in (REPOSITORY / "llava_sp_jax").glob("*/__init__.py")}
  assert {p.parent.name for p in (REPOSITORY / "tests").glob("*/test_*.py")} >= rooms > {"models"}


PYTHON = """#!/bin/sh
case "$1 $2" in "-c "*) echo constraints.txt;; "-m pytest") echo "$@";; esac
"""


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
  """scripts/test.sh with a Python that says what it is given."""
  python = folder / "bin" / "python"
  python.parent.mkdir(exist_ok=True)
  python.write_text(PYTHON)
  python.chmod(0o755)
  return subprocess.run(
    ["bash", "scripts/test.sh", *arguments],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=False,
    env={**os.environ, "VENV": str(folder)},
  )


def test_rooms_are_what_pytest_is_given(tmp_path: Path) -> None:
  done = run_tests(tmp_path, "models", "data", "-k", "anyres")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1].endswith(" tests/models tests/data -k anyres")
  done = run_tests(tmp_path, "--guards", "plan")
  assert done.stdout.splitlines()[-1].endswith(" tests/plan -m guard and not slow")


def test_a_room_that_does_not_exist_ends_with_the_known_ones(tmp_path: Path) -> None:
  done = run_tests(tmp_path, "modles", "-x")
  assert (done.returncode, done.stdout) == (2, "")
  said, _, known = done.stderr.strip().partition("; known: ")
  assert said == "scripts/test.sh: no room 'modles'"
  assert set(known.split(", ")) == {
    path.parent.name for path in (REPOSITORY / "tests").glob("*/test_*.py")
  }


def test_every_room_is_drawn_and_has_its_reference() -> None:
  drawn = re.findall(r"^\| [\d, ]+ \| (.*?) \|", (DOCS / "architecture.md").read_text(), re.M)
  assert {name for cell in drawn for name in re.findall(r"`(\w+)`", cell)} == set(HEIGHT)
  pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
  documented = " ".join(re.findall(r"^```\{room\} (.*)", pages, re.M)).split()
  assert sorted(documented) == sorted(set(HEIGHT) - {"__main__"})


def test_every_variant_is_on_its_page() -> None:
  table, _ = (DOCS / "variants.md").read_text().split("\n## ", 1)
  cells = re.findall(r"^\| (`.*?) \|", table, re.M)
  assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(VARIANTS)
  assert len(VARIANTS) == 16, "README and CHANGELOG say sixteen"


def test_the_benchmark_of_the_guide_works(tmp_path: Path) -> None:
  (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "add-a-benchmark.md").read_text(), re.DOTALL)
  (tmp_path / "counting.py").write_text(code)
  rows = [{"question": "how many?", "image": f"{i}.png", "count": i} for i in range(3)]
  (tmp_path / "counting.json").write_text(json.dumps(rows))
  task = catalog.find("--task", f"{tmp_path}/counting.py:Counting")(tmp_path)
  items = task.items()
  texts = ("0", "about 3", "many")
  scores = task.score(items, {i.id: Prediction(i.id, t) for i, t in zip(items, texts, strict=True)})
  assert scores.headline == pytest.approx((1 + 1 / 3 + 0) / 3)
  assert scores.by_kind["all objects"]["items"] == 3
  assert len(task.data_hash()) == 16


def test_the_front_page_is_short_and_links_into_the_docs() -> None:
  """docs/index.md includes it, where only links that begin with docs/ are found."""
  readme = (REPOSITORY / "README.md").read_text()
  assert len(readme.splitlines()) <= 120
  (end,) = re.findall(r":end-before: (.*)", (DOCS / "index.md").read_text())
  front, _ = readme.split(end)
  targets = re.findall(r"\]\(([^)]+)\)", front)
  assert [t for t in targets if not t.startswith(("docs/", "https://"))] == []
  assert len(targets) > 20


def test_every_page_of_the_site_is_in_a_table_of_contents() -> None:
  """Sphinx names a page that is not, as it does code in a docstring that it cannot read."""
  pages = {page.with_suffix("") for page in DOCS.rglob("*.md")}
  named = {
    page.parent / name
    for page in DOCS.rglob("*.md")
    for table in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL)
    for name in re.findall(r"^[\w/-]+$", table, re.MULTILINE)
  }
  assert pages - named == {DOCS / "index"}


@pytest.mark.guard  # reads every module of the package
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
  """On a machine without devices: a module that asks for one when it is imported is a warning."""
  if missing := [name for name in SITE if importlib.util.find_spec(name) is None]:
    pytest.skip(f"without {', '.join(missing)}: pip install -e '.[docs]' -c constraints.txt")
  done = subprocess.run(
    [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path / "site"],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
    env={**os.environ, "JAX_PLATFORMS": "absent", "XLA_FLAGS": ""},
  )
  assert done.returncode == 0, done.stderr
  reference = (tmp_path / "site" / "api" / "index.html").read_text()
  assert 'id="llava_sp_jax.VisionLanguageModel.answer"' in reference
