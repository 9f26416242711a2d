"""The base of every error whose text was written for a user."""

from __future__ import annotations


class LlavaSPError(Exception):
  """What was found, what was expected and what to do, in one line that a command prints.

  Every error that a user can cause derives from it; an error that does not is a mistake of this
  package and keeps its traceback (`--traceback` shows one for all).
  """


class CheckpointError(LlavaSPError, RuntimeError):
  """A run folder that cannot be used; the message says what was found and what to do."""
