"""The package as it is installed: versions that fit together, a wheel that has the recipes in it."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llava_sp_jax
from llava_sp_jax import recipes
from llava_sp_jax.config import ConfigError
from tests.conftest import REPOSITORY

CONSTRAINTS = {"3.11": "constraints.txt", "3.12": "constraints-py312.txt"}
EXTRAS = ("", "test", "gguf", "report", "xlsx", "serve", "docs", "tpu", "cuda")
NAMES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
  """What setup.py hands to setuptools."""
  given: dict[str, Any] = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", lambda **values: given.update(values))
    patch.chdir(REPOSITORY)
    runpy.run_path("setup.py")
  return given


def pins(python: str) -> dict[str, str]:
  lines = (REPOSITORY / CONSTRAINTS[python]).read_text().splitlines()
  found = dict(line.split("==") for line in lines if not line.startswith("#"))
  return {canonicalize_name(name): version for name, version in found.items()}


def required(settings: dict[str, Any], python: str) -> Iterator[Requirement]:
  """All that an installation with EXTRAS asks for under a Python."""
  groups = {"": settings["install_requires"], **settings["extras_require"]}
  for requirement in map(Requirement, [text for extra in EXTRAS for text in groups[extra]]):
    if not requirement.marker or requirement.marker.evaluate({"python_version": python}):
      yield requirement


@pytest.mark.parametrize("python", CONSTRAINTS)
def test_constraints_are_what_setup_allows(settings: dict[str, Any], python: str) -> None:
  pinned, asked = pins(python), list(required(settings, python))
  for requirement in asked:
    version = pinned.get(canonicalize_name(requirement.name))
    if version:
      assert requirement.specifier.contains(version), f"{requirement} against {version}"
  names = {canonicalize_name(requirement.name) for requirement in asked}
  assert names - set(pinned) <= {"rich", "setuptools"}  # any version will do
  assert {"jax", "jaxlib", "flax", "numpy", "optax"} <= set(pinned)


def test_both_stacks_are_allowed_for_their_python_alone(settings: dict[str, Any]) -> None:
  """jax and flax of the one Python do not satisfy what the other asks for."""
  for python, other in (("3.11", "3.12"), ("3.12", "3.11")):
    asked = {
      r.name: r for r in required(settings, python) if r.name in ("jax", "flax") and r.specifier
    }
    assert set(asked) == {"jax", "flax"}
    for name, requirement in asked.items():
      assert not requirement.specifier.contains(pins(other)[name])


def test_the_environment_takes_the_constraints_of_its_python() -> None:
  code = f"source scripts/environment.sh && constraints_of {sys.executable}"
  done = subprocess.run(
    ["bash", "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
  )
  expected = "3.11" if sys.version_info < (3, 12) else "3.12"
  assert done.stdout == f"{CONSTRAINTS[expected]}\n"


@pytest.mark.parametrize("text", ["easy_vqa", "configs/easy_vqa.py", "easy_vqa.py"])
def test_a_recipe_is_found_by_name_outside_a_clone(
  text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(tmp_path)
  assert recipes.find(text) == REPOSITORY / "configs" / "easy_vqa.py"
  Path("easy_vqa").touch()  # a file wins
  assert recipes.find("easy_vqa") == Path("easy_vqa")


def test_an_unknown_recipe_lists_the_known_ones() -> None:
  assert list(recipes.known()) == NAMES
  with pytest.raises(ConfigError, match=f"no file 'mine', and no recipe .*: {', '.join(NAMES)}$"):
    recipes.find("mine")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The wheel of a copy: a build leaves a folder that later builds read."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in ("llava_sp_jax", "configs"):
    shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(REPOSITORY / name, folder)
  subprocess.run(
    [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')"],
    cwd=folder,
    check=True,
    capture_output=True,
  )
  (file,) = folder.glob("*.whl")
  return file


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
  with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    about: Message = Parser().parsestr(archive.read(name).decode())
    commands = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
  assert about["Name"] == "llava-sp-jax"
  assert about["Version"] == llava_sp_jax.__version__
  assert about["Requires-Python"] == ">=3.11"
  assert about["License-Expression"] == "Apache-2.0"
  assert about["Project-URL"].startswith("Paper, https://")
  assert commands.split() == [
    "[console_scripts]",
    "llava-sp",
    "=",
    "llava_sp_jax.cli:main",
    "[lmms_eval.models]",
    "llava_sp_jax",
    "=",
    "llava_sp_jax.eval.lmms:manifest",
  ]
  asked = [Requirement(text) for text in about.get_all("Requires-Dist") or []]
  assert {"jax", "flax", "sphinx", "pytest"} <= {requirement.name for requirement in asked}
  assert "Programming Language :: Python :: 3.13" in (about.get_all("Classifier") or [])
  assert about["Description-Content-Type"] == "text/markdown"
  assert str(about.get_payload()).strip() == (REPOSITORY / "README.md").read_text().strip()


def test_the_wheel_says_that_it_is_typed(wheel: Path) -> None:
  with zipfile.ZipFile(wheel) as archive:
    assert "llava_sp_jax/py.typed" in archive.namelist()


def test_the_wheel_has_the_page_of_the_server(wheel: Path) -> None:
  folder = "llava_sp_jax/serve/page"
  with zipfile.ZipFile(wheel) as archive:
    packed = {name for name in archive.namelist() if name.startswith(f"{folder}/")}
  assert packed == {f"{folder}/{file.name}" for file in (REPOSITORY / folder).iterdir()}


def test_the_wheel_s_command_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
  """From the installed package alone: a recipe by name, up to the data that are missing."""
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "site")
  assert not [p for p in (tmp_path / "site").iterdir() if not p.name.startswith("llava_sp_jax")]
  (tmp_path / "work").mkdir()
  done = subprocess.run(
    [sys.executable, "-m", "llava_sp_jax", "check", "--config=easy_vqa:stage=finetune"],
    capture_output=True,
    text=True,
    cwd=tmp_path / "work",
    check=False,
    env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
  )
  assert done.returncode == 1
  assert done.stderr.startswith("llava-sp check: data/easy_vqa/tokenizer: no tokenizer here")
  known = subprocess.run(
    [
      sys.executable,
      "-c",
      "from llava_sp_jax import recipes; print(*recipes.known(), recipes.__file__, sep='\\n')",
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path / "work",
    check=True,
    env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
  ).stdout.split()
  assert known == [*NAMES, str(tmp_path / "site" / "llava_sp_jax" / "recipes.py")]
