"""Says whether the server takes requests: it warms up, is ready, stops, or has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llava_sp_jax.serve.asked import Asked
from llava_sp_jax.serve.errors import ApiError

WARMING = "the server is warming up; ask again later"
STOPPING = "the server is stopping; ask another one"


class State:
  """Holds the state of a server, and the requests that it has taken."""

  def __init__(self) -> None:
    self.ready = self.stopping = False
    self.failure: BaseException | None = None  # of warming up
    self._taken, self._asked = 0, set[Asked]()

  def check(self) -> None:
    """Raises: ApiError (503) unless the server takes requests."""
    if self.stopping or not self.ready:
      raise ApiError("not_ready", STOPPING if self.stopping else WARMING)

  @contextlib.contextmanager
  def taking(self) -> Iterator[None]:
    """Counts a request as taken within the block. Raises: as `check`."""
    self.check()
    self._taken += 1
    try:
      yield
    finally:
      self._taken -= 1

  @contextlib.contextmanager
  def answering(self, asked: Asked) -> Iterator[None]:
    """Knows, within the block, that the engine was asked for these answers."""
    self._asked.add(asked)
    try:
      yield
    finally:
      self._asked.discard(asked)

  @property
  def busy(self) -> bool:
    """Returns whether a request that was taken has no whole answer yet."""
    return self._taken > 0

  def abandon(self) -> None:
    """Ends all requests that the engine was asked for, with an error."""
    for asked in list(self._asked):
      asked.abandon(ApiError("not_ready", STOPPING))
