"""What a user reads of an error: one line for what a user can cause, a traceback for our mistakes."""

from __future__ import annotations

from llava_sp_jax import console


def line(error: BaseException) -> str:
  """The line of an error; empty for one that is a mistake of ours and keeps its traceback.

  Names out of files stand in it: what a terminal would obey is escaped.
  """
  return console.one_line(_text(error))


def is_ours(error: BaseException) -> bool:
  """Whether an error's text was written to be read by a user, as those of this package are."""
  return type(error).__module__.startswith("llava_sp_jax")


def _text(error: BaseException) -> str:
  text = str(error)
  if is_ours(error):
    return text
  if isinstance(error, OSError):  # files, disks, devices
    return text if error.filename is None else f"{error.filename}: {error.strerror or text}"
  if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("llava_sp_jax"):
    return f"{text}; install it, or the extra of llava-sp-jax that brings it (README lists them)"
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return f"out of memory ({(text.splitlines() or ['on the host'])[0][:200]})"
  return ""
