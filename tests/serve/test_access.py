"""Keys of clients."""

from __future__ import annotations

import pytest

from llava_sp_jax.serve.access import check_key
from llava_sp_jax.serve.errors import ApiError


@pytest.mark.parametrize("header", ["Bearer secret", "bearer  other ", " BEARER secret"])
def test_right_keys(header: str) -> None:
  check_key(header, ["secret", "other"])


def test_without_keys_everybody_may_ask() -> None:
  check_key(None, [])
  check_key("Bearer anything", [])


@pytest.mark.parametrize(
  ("header", "says"),
  [
    (None, "no key"),
    ("", "no key"),
    ("secret", "no key"),
    ("Basic secret", "no key"),
    ("Bearer", "no key"),
    ("Bearer secre", "a wrong key"),
    ("Bearer secret2", "a wrong key"),
    ("Bearer secret other", "a wrong key"),
    ("Bearer \xff", "a wrong key"),
  ],
)
def test_wrong_keys(header: str | None, says: str) -> None:
  with pytest.raises(ApiError, match=f"^{says}; send the server's") as caught:
    check_key(header, ["secret", "other"])
  assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
  assert "secret" not in str(caught.value)
