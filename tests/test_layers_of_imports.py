"""No import runs back up the layers, and light parts of the package import nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sp_jax.data import example
from llava_sp_jax.models import layers
from tests.conftest import REPOSITORY

PACKAGE = "llava_sp_jax"
FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))

# Regular expressions over module names, bottom up, first match wins. A module may import modules of
# lower layers and of its own, except across the parts of a layer that EXCLUDING keeps apart.
LAYERS = (
  ("version", r"__init__"),
  ("files", r"locks|folders|jsonl|errors|console"),
  (
    "ground",
    r"config|environment|devices|provenance|files|json_files|models\.(__init__|layers|attention|remat|vit|spatial|projector|lora|quantize|cache)|data\.(?!pipeline).*"
    r"|convert\.(__init__|layout|tables|keys|key_tables|keys_page|tensor|torch_\w+|safetensors_file|gguf\w*)"
    r"|sharding|mesh|processes|checkpoint|limits"
    r"|infer\.(__init__|generation|sampling|counts|lru)|train\.__init__|tools\.__init__|recipes"
    r"|eval\.(__init__|task|own|predictions|scoring|files|judge|web|benchmark|choices|sheet|tasks\..*)",
  ),
  ("assembled", r"models\.(llama|llava|build|flops)|data\.pipeline"),
  (
    "loading",
    r"convert\.(settings|settings_out|processors|adapters|weights|leaves|formats|catalog|places|detect|stream|save|save_hf|load|quantised)",
  ),
  ("running", r"train\..*|infer\..*"),
  ("planning", r"plan\..*"),
  ("evaluating", r"eval\..*"),
  ("tools", r"tools\..*"),
  ("cli", r"cli|__main__"),
)

# (who, what it does not import): regular expressions over module names.
EXCLUDING = (
  (r"train\.", r"infer\."),
  (r"infer\.", r"train\."),
  (r"data\.", r"(models|train|infer|eval|convert)\.|sharding|mesh|checkpoint"),
  (r"models\.(?!build|flops)", r"config|data\.|sharding|mesh|checkpoint|convert\."),
  (
    r"convert\.(layout|tables|tensor|torch_|safetensors_|gguf)",
    r"config|environment|devices|provenance|models\.|data\.|sharding|mesh|checkpoint|train\.",
  ),
  (r"(sharding|mesh|processes|checkpoint)", r"models\.|data\.|convert\."),
  (
    r"eval\.(task|scoring|files|judge|web|benchmark|choices|sheet)",
    r"infer\.(?!generation|__init__)|train\.|models\.",
  ),
)

# (who, third-party packages that it never imports, not even inside a function)
WITHOUT = (
  (r".*", ("torch", "tensorflow", "torchvision")),
  (r"data\.", ("jax", "flax", "optax", "orbax")),
  (
    r"convert\.(layout|tables|keys|key_tables|tensor|torch_|safetensors_|gguf)",
    ("jax", "flax", "optax", "orbax"),
  ),
  (
    r"(config|environment|recipes|cli|devices|limits|locks|folders|jsonl|files|json_files|errors|console)",
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


def layer(name: str) -> int:
  for height, (_, pattern) in enumerate(LAYERS):
    if re.fullmatch(pattern, name):
      return height
  raise AssertionError(f"{name} stands in no layer; add it to LAYERS")


# The public names are imported when they are used: for the type checker alone they stand at the top.
@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_down(name: str) -> None:
  upward = {other for other in own_imports(MODULES[name]) if layer(other) > layer(name)}
  assert not upward, f"{name} ({LAYERS[layer(name)][0]}) imports from above: {upward}"


@pytest.mark.parametrize(("who", "what"), EXCLUDING)
def test_rooms_are_kept_apart(who: str, what: str) -> None:
  mine = [name for name in MODULES if re.match(who, name)]
  assert mine, f"no module matches {who!r}"
  assert any(re.match(what, name) for name in MODULES), f"no module matches {what!r}"
  wrong = {n: bad for n in mine
           if (bad := [o for o in own_imports(MODULES[n]) if re.match(what, o)])}  # fmt: skip
  assert not wrong


@pytest.mark.parametrize(("who", "packages"), WITHOUT)
def test_packages_that_a_room_does_without(who: str, packages: tuple[str, ...]) -> None:
  mine = [name for name in MODULES if re.match(who, name)]
  assert mine
  wrong = {n: bad for n in mine
           if (bad := {i.split(".")[0] for i in imports(MODULES[n])} & set(packages))}  # fmt: skip
  assert not wrong


def test_reading_imports_finds_them(tmp_path: Path) -> None:
  """The reader sees every form of import, also inside functions."""
  file = tmp_path / "x.py"
  file.write_text(
    "import torch.nn\nfrom llava_sp_jax import config as c, mesh\n"
    "def f():\n  from llava_sp_jax.models.llama import Decoder\n  from llava_sp_jax import __version__\n"
  )
  assert own_imports(file) == {"config", "mesh", "models.llama", "__init__"}
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
  names = [f"{PACKAGE}.{n}".removesuffix(".__init__") for n in MODULES]
  python(
    "import importlib, sys\n"
    "sys.modules['torch'] = sys.modules['tensorflow'] = None\n"
    f"for name in {names!r}:\n  importlib.import_module(name)\n"
  )


def test_branches_are_the_same_number_on_host_and_device() -> None:
  """`data` does not import `models`, so each has the constant; they must agree."""
  assert example.BRANCHES == layers.BRANCHES
