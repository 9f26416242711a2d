"""Reads ranges of objects with TensorStore, as Orbax reads arrays.

A request costs less of a core than one of `fsspec`, and holds Python's lock for a moment only.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax.stores.store import named

DRIVERS = {"gs": "gcs"}  # scheme of an address -> TensorStore's name of it
# TensorStore's settings for each of them. Requests at a time: its own limit is 32. A request is
# repeated for about three minutes: after 1, 2, 4, 8 and 16 s, then every 32 s.
CONTEXT = {
  "gs": {
    "gcs_request_concurrency": {"limit": 128},
    "gcs_request_retries": {"max_retries": 10, "initial_delay": "1s", "max_delay": "32s"},
  }
}
OUT_OF_RANGE = "OUT_OF_RANGE"  # in the error of a range that an object does not have


class Ranges:
  """Reads objects of one scheme; may be used by several threads."""

  def __init__(self, scheme: str):
    """Prepares to read; opens nothing yet."""
    self._scheme = scheme
    self._buckets: dict[str, Any] = {}  # by name, open

  def begin(self, path: Path, start: int, end: int) -> Callable[[], bytes]:
    """Begins to read the bytes from `start` to before `end`, which the object has.

    Returns what waits for them. Either raises an OSError that names the object; the latter after a
    request was repeated in vain.
    """
    bucket, _, name = str(path).partition("://")[2].partition("/")
    with named(path):
      if bucket not in self._buckets:
        self._buckets[bucket] = self._opened(bucket)
      begun = self._buckets[bucket].read(name, byte_range=slice(start, end))
    return functools.partial(_content, path, begun)

  def _opened(self, bucket: str) -> Any:
    import tensorstore

    scheme = self._scheme
    spec = {"driver": DRIVERS[scheme], "bucket": bucket, "context": CONTEXT[scheme]}
    return tensorstore.KvStore.open(spec).result()


def _content(path: Path, begun: Any) -> bytes:
  with named(path):
    try:
      found = begun.result()
    except ValueError as error:
      if OUT_OF_RANGE not in str(error):
        raise
      raise OSError(errno.EIO, "has become shorter since it was opened", str(path)) from error
    if found.state == "missing":
      raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
  return bytes(found.value)
