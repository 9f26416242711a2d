"""docs/security.md says what the readers' limits are, and how many names a pickle may use."""

from __future__ import annotations

import importlib
import re

import pytest

from llava_sp_jax.convert import torch_pickle
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/security.md").read_text()
ROWS = re.findall(r"^\| .* \| ([\d,]+)( MiB)? \| `(\w+)\.(\w+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("number", "unit", "module", "name"), ROWS)
def test_a_limit_is_the_one_that_the_page_says(
  number: str, unit: str, module: str, name: str
) -> None:
  room = "llava_sp_jax" if module == "json_files" else "llava_sp_jax.convert"
  value = getattr(importlib.import_module(f"{room}.{module}"), name)
  assert value == int(number.replace(",", "")) * (1 << 20 if unit else 1)


def test_every_limit_is_on_the_page() -> None:
  shown = {(module, name) for _, _, module, name in ROWS}
  for module in ("tensor", "torch_pickle", "torch_zip", "json_files", "gguf_file"):
    room = "llava_sp_jax" if module == "json_files" else "llava_sp_jax.convert"
    names = {n for n in vars(importlib.import_module(f"{room}.{module}")) if n.startswith("MAX_")}
    # Those of another module, and what follows from another limit.
    names -= {"MAX_TENSORS", "MAX_MEMBERS"} if module != "tensor" else set()
    names -= {"MAX_AXES"} if module == "gguf_file" else set()
    assert {(module, name) for name in names} <= shown


def test_the_instructions_and_names_are_as_many_as_the_page_says() -> None:
  assert len(torch_pickle.NAMES) == 11
  count = len(torch_pickle._INSTRUCTIONS) + 1  # and the one that ends a pickle
  assert f"knows the {count} instructions" in " ".join(PAGE.split())
