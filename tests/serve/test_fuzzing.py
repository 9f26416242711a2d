"""schemathesis asks what our OpenAPI document allows, and more: no answer is a fault of the server."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from llava_sp_jax.serve import openapi
from llava_sp_jax.serve.errors import CODES
from tests.serve import fake
from tests.serve.fake import FakeService
from tests.serve.live import Live, live

schemathesis = pytest.importorskip("schemathesis")
CASES = 2000  # of all endpoints together, in the long test


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
  with live(fake.served(FakeService())) as found:
    yield found


def check(server: Live, operation: Any, count: int) -> collections.Counter[int]:
  """Asks `count` times; returns how often each status came."""
  statuses: collections.Counter[int] = collections.Counter()
  checks = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.content_type_conformance,
  ]

  @hypothesis.settings(
    max_examples=count,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
  )
  @hypothesis.given(case=operation.as_strategy())
  def ask(case: Any) -> None:
    response = case.call(timeout=20)
    statuses[response.status_code] += 1
    case.validate_response(response, checks=checks)
    if response.status_code >= 400:
      error = response.json()["error"]
      assert CODES[error["code"]] == (response.status_code, error["type"])

  ask()
  return statuses


def operations(server: Live) -> list[Any]:
  schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
  found = [result.ok() for result in schema.get_all_operations()]
  assert {(o.method, o.path) for o in found} == {(e.method, e.path) for e in openapi.ENDPOINTS}
  return found


def test_a_few_cases(server: Live) -> None:
  for operation in operations(server):
    assert check(server, operation, 5)


@pytest.mark.guard
def test_many_cases(server: Live) -> None:
  statuses: collections.Counter[int] = collections.Counter()
  found = operations(server)
  posts = [operation for operation in found if operation.method == "post"]
  for operation in found:
    statuses += check(server, operation, CASES // len(posts) + 1 if operation in posts else 20)
  assert sum(statuses.values()) >= CASES
  assert statuses[200] > CASES // 10, "bodies that are right are among them"
  assert statuses[400] > CASES // 100, "and bodies that are wrong"
