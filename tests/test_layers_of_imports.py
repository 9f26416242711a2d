"""No import runs back up the layers, and light parts of the package import nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = "llava_sp_jax"
# Without the files that exports have beside their weights: other programs run those.
FILES = sorted(p for p in (REPOSITORY / PACKAGE).rglob("*.py") if p.parent.name != "remote_code")

# The house, bottom up. A room is a folder or a file of the package; it imports rooms of lower floors,
# and none beside it.
FLOORS = (
  "errors",
  "stores",
  "storage",
  "children console files locks",
  "folders json_files environment hardware progress provenance",
  "jsonl overrides batch",
  "config",
  "limits recipes",
  "data models",
  "distributed",
  "convert",
  "checkpoints",
  "training infer",
  "plan tasks",
  "results",
  "eval",
  "serve",
  "tools",
  "cli",
  "__main__",
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}

# (who, what it does not import), within a room or two floors: regular expressions over module names.
EXCLUDING = (
  (r"models\.(?!build|flops)", r"config"),
  (r"models\.(?!build|flops|llava)", r"models\.(build|flops|llava)"),
  (r"convert\.(layout|tables|tensor|torch_|safetensors_|gguf_file)", r"config|models\.|data\."),
  (r"tasks\.", r"infer\.(?!generation|__init__)"),
)

# (who, third-party packages that it never imports, not even inside a function)
WITHOUT = (
  (r".*", ("torch", "tensorflow", "torchvision")),
  (r"data\.", ("jax", "flax", "optax", "orbax")),
  (r"serve\.", ("jax", "flax", "optax", "orbax", "pydantic", "requests")),
  (
    r"convert\.(layout|tables|keys|key_tables|tensor|torch_|safetensors_|gguf)",
    ("jax", "flax", "optax", "orbax"),
  ),
  (
    r"(batch|config|overrides|environment|recipes|cli|hardware|limits|storage|stores(\..*)?|locks|folders|jsonl|files|json_files|errors|console|progress)",
    ("jax", "flax", "numpy", "grain", "orbax"),
  ),
  (r"models\.", ("transformers", "PIL", "grain", "ml_collections", "orbax", "optax")),
)


def module_name(path: Path) -> str:
  """Name below the package: `models.vit`, `models.__init__`."""
  return ".".join(path.relative_to(REPOSITORY / PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
  """Full names of all that a file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def own_imports(path: Path) -> set[str]:
  """Our modules that a file imports, by their names below the package."""
  result = set()
  for name in imports(path):
    below = name.removeprefix(PACKAGE + ".")
    if below == name:
      continue
    for candidate in (below, below.rpartition(".")[0]):
      if candidate in MODULES or f"{candidate}.__init__" in MODULES:
        result.add(candidate if candidate in MODULES else f"{candidate}.__init__")
        break
    else:
      result.add("__init__")
  return result


def room(name: str) -> str:
  return name.split(".")[0]


def test_the_house_has_these_rooms() -> None:
  assert {room(name) for name in MODULES} - {"__init__"} == set(HEIGHT)


# The public names are imported when they are used: for the type checker alone they stand at the top.
@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_down(name: str) -> None:
  others = {other for other in own_imports(MODULES[name]) if other != "__init__"}
  wrong = {o for o in others if room(o) != room(name) and HEIGHT[room(o)] >= HEIGHT[room(name)]}
  assert not wrong, f"{name} imports from its own floor or above: {wrong}"


@pytest.mark.parametrize(("who", "what"), EXCLUDING)
def test_rooms_are_kept_apart(who: str, what: str) -> None:
  mine = [name for name in MODULES if re.match(who, name)]
  assert mine, f"no module matches {who!r}"
  assert any(re.match(what, name) for name in MODULES), f"no module matches {what!r}"
  wrong = {
    n: bad for n in mine if (bad := [o for o in own_imports(MODULES[n]) if re.match(what, o)])
  }
  assert not wrong


@pytest.mark.parametrize(("who", "packages"), WITHOUT)
def test_packages_that_a_room_does_without(who: str, packages: tuple[str, ...]) -> None:
  mine = [name for name in MODULES if re.match(who, name)]
  assert mine
  wrong = {
    n: bad for n in mine if (bad := {i.split(".")[0] for i in imports(MODULES[n])} & set(packages))
  }
  assert not wrong


def test_reading_imports_finds_them(tmp_path: Path) -> None:
  """The reader sees every form of import, also inside functions."""
  file = tmp_path / "x.py"
  file.write_text(
    "import torch.nn\nfrom llava_sp_jax import config as c, locks\n"
    "def f():\n  from llava_sp_jax.models.llama import Decoder\n  from llava_sp_jax import __version__\n"
  )
  assert own_imports(file) == {"config", "locks", "models.llama", "__init__"}
  assert "torch.nn" in imports(file)


def python(code: str) -> str:
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  "module",
  [
    "",
    ".config",
    ".cli",
    ".tools.train",
    ".tools.evaluate",
    ".tools.plan",
    ".plan.report",
    ".plan.search",
  ],
)
def test_light_modules_import_no_jax(module: str) -> None:
  heavy = "('jax', 'flax', 'numpy', 'transformers', 'grain')"
  loaded = python(f"import sys, {PACKAGE}{module}\nprint([m for m in {heavy} if m in sys.modules])")
  assert loaded.strip() == "[]"


def test_everything_imports_without_torch_and_tensorflow() -> None:
  without = {"serve"} if importlib.util.find_spec("msgspec") is None else set()
  names = [f"{PACKAGE}.{n}".removesuffix(".__init__") for n in MODULES if room(n) not in without]
  python(
    "import importlib, sys\n"
    "sys.modules['torch'] = sys.modules['tensorflow'] = None\n"
    f"for name in {names!r}:\n  importlib.import_module(name)\n"
  )
