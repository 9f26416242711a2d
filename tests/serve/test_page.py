"""docs/serving.md has every option, limit, endpoint and metric, with its default."""

from __future__ import annotations

import dataclasses
import re

from llava_sp_jax.serve import metrics, openapi
from llava_sp_jax.serve.limits import DEFAULT
from llava_sp_jax.tools import serve
from tests.conftest import REPOSITORY
from tests.serve import fake

PAGE = (REPOSITORY / "docs/serving.md").read_text()


def rows(text: str) -> dict[str, str]:
  """First cell of the rows of tables -> the rest of the row."""
  found = re.findall(r"^\| `([^|]+)` \| (.*) \|$", text, re.MULTILINE)
  return {name: rest for first, rest in found for name in re.split(r"`, `", first)}


def test_limits() -> None:
  written = {
    name: rest.split(" | ")[0] for name, rest in rows(PAGE.partition("## Limits")[2]).items()
  }
  wanted = {name: f"{value:,g}" if isinstance(value, float) else f"{value:,}"
            for name, value in dataclasses.asdict(DEFAULT).items()}  # fmt: skip
  assert {name: written.get(name) for name in wanted} == wanted


def test_options() -> None:
  table = rows(PAGE.partition("## Options")[2].partition("## Security")[0])
  for action in serve.parser()._actions:
    for name in action.option_strings:
      if name in ("-h", "--help"):
        continue
      assert f"`{name}`" in PAGE, name
      if name in table and action.default not in (None, "", False, []):
        assert table[name].startswith(f"`{action.default}`"), name


def test_endpoints() -> None:
  for endpoint in openapi.ENDPOINTS:
    assert f"`{endpoint.method.upper()} {endpoint.path}`" in PAGE


def test_metrics() -> None:
  known = {*metrics.HISTOGRAMS, *metrics.readings(fake.served(fake.FakeService()))}
  for name in known:
    assert f"`{name}`" in PAGE, name
