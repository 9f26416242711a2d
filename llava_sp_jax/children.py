"""Ends a child process with its parent: one that is killed stops no child.

A compile, for one, would take cores and gigabytes for minutes more, for nobody.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping

PARENT = "LLAVA_SP_PARENT"  # the variable with the number of the process that started this one


def environment(values: Mapping[str, str]) -> dict[str, str]:
  """Returns the variables `values` for a child of this process that calls `end_with_parent`."""
  return {**values, PARENT: str(os.getpid())}


def end_with_parent(every: float = 1.0) -> None:
  """Ends this process within `every` seconds after the one that started it has ended.

  Does nothing where nobody set PARENT.
  """
  parent = int(os.environ.get(PARENT, "0"))

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(every)
    os._exit(1)

  if parent:
    threading.Thread(target=watch, daemon=True, name="end with the parent").start()
