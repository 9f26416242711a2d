"""Defines the base of all errors whose message is written for users."""

from __future__ import annotations


class LlavaSPError(Exception):
  """States what was found, what was expected and what to do, in one line that a command prints.

  Every error that a user can cause derives from it. Any other error is a bug of this package and is
  shown with its traceback (`--traceback` shows the traceback of every error).
  """


class CheckpointError(LlavaSPError, RuntimeError):
  """Raised for a run folder that cannot be used; the message says why and what to do."""
