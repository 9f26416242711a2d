"""Caches device arrays, and drops the least recently used ones when they grow too large."""

from __future__ import annotations

import collections
from collections.abc import Hashable
from typing import Any

from llava_sp_jax.distributed.memory import device_bytes


class Lru:
  """Holds values by key, at most `limit` bytes of a device. The last value stays, whatever its size."""

  def __init__(self, limit: int):
    self._limit, self._bytes = limit, 0
    self._values: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()

  def __len__(self) -> int:
    return len(self._values)

  def __contains__(self, key: Hashable) -> bool:
    return key in self._values

  def get(self, key: Hashable) -> Any:
    """Returns the value of `key` and marks it as the last used; None if it is absent."""
    if key not in self._values:
      return None
    self._values.move_to_end(key)
    return self._values[key][0]

  def put(self, key: Hashable, value: Any) -> None:
    """Stores `value`, a tree of arrays, and drops the least recently used ones until all fit."""
    if key in self._values:
      self._bytes -= self._values.pop(key)[1]
    size = device_bytes(value)
    self._values[key] = value, size
    self._bytes += size
    while self._bytes > self._limit and len(self._values) > 1:
      _, (_, size) = self._values.popitem(last=False)
      self._bytes -= size
