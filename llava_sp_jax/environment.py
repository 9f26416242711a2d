"""Sets environment variables before JAX is imported: the compilation cache, and fewer messages.

JAX and other libraries read them when they start, so child processes inherit them. A value that the
user has set is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

NO_CACHE = "--no-cache"
ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
FOLDER = "JAX_COMPILATION_CACHE_DIR"
KEEP_DAYS = 60  # age at which an unused cache entry is deleted

# By default, JAX does not cache programs that compile in under a second: most of a small model's.
CACHE_EVERYTHING = {
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# On import, transformers warns that PyTorch is absent; only its tokenizers and configs are used.
QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
# Without a TPU, libtpu looks up the names of its hosts and prints errors.
QUIET_WITHOUT_TPU = {
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
# Signs of TPU chips on a host: Google's PCI vendor id, or a device file (in a container, say).
TPU_VENDOR_FILES, TPU_VENDOR = "sys/bus/pci/devices/*/vendor", "0x1ae0"
TPU_DEVICE_FILES = ("dev/accel*", "dev/vfio/[0-9]*")

Environment = MutableMapping[str, str]


def prepare(arguments: Sequence[str], environment: Environment = os.environ) -> list[str]:
  """Sets variables of `environment` for a command, and returns its arguments without `--no-cache`.

  These are JAX's cache of compiled programs, and fewer messages of libraries.
  """
  wanted = NO_CACHE not in arguments
  _compilation_cache(wanted, environment)
  for name, value in QUIET.items():
    environment.setdefault(name, value)
  if not has_tpu():
    for name, value in QUIET_WITHOUT_TPU.items():
      environment.setdefault(name, value)
  return [argument for argument in arguments if argument != NO_CACHE]


def cache_folder(environment: Environment = os.environ) -> Path:
  """Returns the folder of compiled programs that is used unless JAX_COMPILATION_CACHE_DIR is set.

  Each kind of CPU has its own folder. A home directory may be shared by different hosts, and JAX's
  cache key does not tell them apart.
  """
  home = environment.get("XDG_CACHE_HOME", "")
  # The XDG specification: a relative path is invalid and is ignored.
  try:
    base = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
  except RuntimeError:  # a user without a home: mkdir fails below and the error is printed
    base = Path("/nonexistent/.cache")
  return base / "llava-sp-jax" / f"xla-{platform.machine()}-{_cpu()}"


def has_tpu(root: Path = Path("/")) -> bool:
  """Returns whether this host has TPU chips, by the files of its devices below `root`."""
  vendors = []
  for file in root.glob(TPU_VENDOR_FILES):
    with contextlib.suppress(OSError):  # no permission to read
      vendors.append(file.read_text().strip())
  return TPU_VENDOR in vendors or any(list(root.glob(pattern)) for pattern in TPU_DEVICE_FILES)


def remove_unused(folder: Path, now: float | None = None) -> None:
  """Deletes the files below `folder` that were not read or written for KEEP_DAYS (60).

  `now` is in seconds since the epoch; None is the present time.
  """
  oldest = (time.time() if now is None else now) - KEEP_DAYS * 24 * 3600
  for file in folder.rglob("*"):
    with contextlib.suppress(OSError):  # another process may have deleted it
      about = file.stat()
      if file.is_file() and max(about.st_atime, about.st_mtime) < oldest:
        file.unlink()


def _compilation_cache(wanted: bool, environment: Environment) -> None:
  if not wanted:
    environment[ENABLED] = "false"
    return
  own = FOLDER not in environment
  folder = environment.setdefault(FOLDER, str(cache_folder(environment)))
  for name, value in CACHE_EVERYTHING.items():
    environment.setdefault(name, value)
  # For JAX, "" means no cache. A bucket (a URL) is not checked here.
  if not folder or "://" in folder or environment.get(ENABLED, "true").lower() in ("0", "false"):
    return
  try:
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError("it is not writable")
    if own:
      remove_unused(Path(folder).parent)
  except OSError as error:
    environment[ENABLED] = "false"
    reason = error.strerror or str(error)
    print(
      f"llava-sp: compiled programs are not kept in {folder}: {reason}; set {FOLDER} to a "
      f"folder that can be written, or give {NO_CACHE}",
      file=sys.stderr,
    )


def _cpu() -> str:
  """Returns eight hexadecimal digits that identify the CPU model and its instruction sets."""
  try:
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
  except OSError:
    first = platform.processor()
  keys = ("cpu family", "model", "model name", "flags", "Features", "CPU part")
  facts = [line for line in first.splitlines() if line.partition("\t")[0].strip() in keys]
  return hashlib.sha256("\n".join(facts or [first]).encode()).hexdigest()[:8]
