"""What a user reads of an error: one line for what a user can cause, a traceback for our mistakes."""

from __future__ import annotations


def line(error: BaseException) -> str:
  """The line of an error; empty for one that is a mistake of ours and keeps its traceback."""
  text = str(error)
  if type(error).__module__.startswith("llava_sp_jax"):  # written to be read
    return text
  if isinstance(error, OSError):  # files, disks, devices
    return text if error.filename is None else f"{error.filename}: {error.strerror or text}"
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return f"out of memory ({(text.splitlines() or ['on the host'])[0][:200]})"
  return ""
