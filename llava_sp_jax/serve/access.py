"""Checks the key that a client sends."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from llava_sp_jax.serve.errors import ApiError


def check_key(authorization: str | None, keys: Collection[str]) -> None:
  """Checks the header Authorization; without `keys`, everybody may ask.

  Takes as long for a wrong key as for a right one.

  Raises: ApiError (401) unless it is `Bearer` and one of `keys`.
  """
  if not keys:
    return
  scheme, _, key = (authorization or "").strip().partition(" ")
  given = key.strip().encode() if scheme.lower() == "bearer" else b""
  if not sum(hmac.compare_digest(given, known.encode()) for known in keys):
    found = "a wrong key" if given else "no key"
    message = f"{found}; send the server's as 'Authorization: Bearer KEY'"
    raise ApiError("invalid_api_key", message)
