"""Joins several processes to one run: start-up, barriers, agreement on a stop, and a watchdog.

Each host of a pod runs the same command. JAX's coordination service, in process 0, joins the
processes, watches the heartbeat of each, and passes on a notice of preemption.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llava_sp_jax import config as config_lib
from llava_sp_jax import environment
from llava_sp_jax.errors import LlavaSPError

BARRIER_SECONDS = 3600
START_SECONDS = 300  # the limit for all processes to find each other
WITHOUT_LIMIT = 10 * 365 * 24 * 3600  # seconds; the heartbeat still ends a wait for dead processes
FLAGS = ("coordinator", "processes", "process")
PROGRAMS = "compiled"  # the folder of compiled programs in a run of several processes
Environment = Mapping[str, str]
Result = TypeVar("Result")


def _several(environment: Environment, key: str) -> bool:
  return int(environment.get(key) or 1) > 1


# Where JAX finds coordinator, count and index by itself: (its name, whether this is one).
ENVIRONMENTS: tuple[tuple[str, Callable[[Environment], bool]], ...] = (
  ("SLURM (srun)", lambda e: _several(e, "SLURM_NTASKS") and "SLURM_STEP_NODELIST" in e),
  ("Open MPI (mpirun)", lambda e: _several(e, "OMPI_COMM_WORLD_SIZE")),
  ("GKE TPU slice", lambda e: "," in e.get("TPU_WORKER_HOSTNAMES", "")),
  ("several TPU slices", lambda e: _several(e, "MEGASCALE_NUM_SLICES")),
  ("indexed Kubernetes job", lambda e: {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(e)),
  # JAX sets the first on import where it finds TPU chips, the second where no metadata server is.
  (
    "Cloud TPU VM",
    lambda e: e.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in e,
  ),
)  # fmt: skip


def detected(environment: Environment) -> str | None:
  """Returns the name of the first of ENVIRONMENTS with several processes, or None."""
  return next((name for name, here in ENVIRONMENTS if here(environment)), None)


def start(
  flags: Mapping[str, str] | None = None, peer_seconds: int = 100, shared: str = ""
) -> None:
  """Joins the other processes, by `flags` or, without them, as the environment says.

  A second call does nothing, and so does one for a single process.

  Args:
    flags: values of --coordinator, --processes and --process by name.
    peer_seconds: a process without a heartbeat for so long counts as dead, and all others exit with
      a message.
    shared: a folder that all processes see, for compiled programs; "" caches none.

  If the others do not appear within START_SECONDS (300), this process exits with a message and
  status 1.

  Raises:
    ConfigError: for flags that do not describe a process, or a port that is in use here.
    PeerError: when process 0 does not answer.
  """
  if jax.distributed.is_initialized():
    return
  waits: dict[str, Any] = {
    "heartbeat_timeout_seconds": peer_seconds,
    "shutdown_timeout_seconds": peer_seconds,
    "initialization_timeout": START_SECONDS + 60,  # JAX's own time-out crashes with a stack
  }
  if flags:
    coordinator, count, index = parse(flags)
    (_reach if index else _check_free)(coordinator)
    waits |= {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
  if flags or detected(os.environ):
    limit = threading.Timer(START_SECONDS, _give_up)
    limit.daemon = True
    limit.start()
    try:
      jax.distributed.initialize(**waits)
    finally:
      limit.cancel()
  if jax.distributed.is_initialized():
    _share_programs(shared)


def _give_up() -> None:
  print(
    f"llava-sp: the processes of this run did not find each other within {START_SECONDS} s; are "
    "all of them started, with the same --coordinator and --processes?",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _check_free(coordinator: str) -> None:
  """Checks that the port is free; JAX's service would otherwise crash this process.

  Raises: ConfigError when it is in use.
  """
  host, _, port = coordinator.rpartition(":")
  for family, anywhere in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
    with contextlib.suppress(OSError), socket.socket(family) as trial:
      trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        trial.bind((anywhere, int(port)))
      except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
          raise  # no such addresses here
        raise config_lib.ConfigError(
          f"--coordinator: port {port} of {host} cannot be used here, where process 0 listens "
          f"({error.strerror}); give all processes another one"
        ) from None


def _reach(coordinator: str) -> None:
  """Waits until process 0 listens. Raises: PeerError after START_SECONDS."""
  host, _, port = coordinator.rpartition(":")
  begun, told = time.monotonic(), False
  while True:
    try:
      with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return
    except OSError as error:
      waited = time.monotonic() - begun
      if waited > START_SECONDS:
        raise PeerError(
          f"--coordinator {coordinator}: no answer for {waited:.0f} s ({error}); is process 0 "
          "running on that host, and may this one reach the port?"
        ) from None
      if not told and waited > START_SECONDS / 30:
        told = True
        print(
          f"waiting for process 0 at {coordinator} ({error}), for up to {START_SECONDS} s",
          flush=True,
        )
      time.sleep(min(1.0, START_SECONDS / 10))


def _share_programs(folder: str) -> None:
  """Replaces the compilation cache of this host by one that all processes read alike.

  Only process 0 writes to it. If a process read a program from its own cache while the others
  compile it, they would wait for it in the collective autotuning of GPUs. A folder that the user
  names stays.
  """
  if os.environ.get(environment.FOLDER) != str(environment.cache_folder()):
    return
  if folder:
    jax.config.update("jax_compilation_cache_dir", f"{folder}/{PROGRAMS}")
  else:
    jax.config.update("jax_enable_compilation_cache", False)


def parse(flags: Mapping[str, str]) -> tuple[str, int, int]:
  """Returns (HOST:PORT, number of processes, index of this one) from the flags by name.

  Raises: ConfigError with every problem of the flags.
  """
  problems = [f"no --{name}" for name in FLAGS if name not in flags]
  host, _, port = flags.get("coordinator", "host:1").rpartition(":")
  if not host or not (port.isascii() and port.isdigit()):
    problems.append(f"--coordinator: expected HOST:PORT, found {flags['coordinator']!r}")
  elif not 0 < int(port) < 1 << 16:
    problems.append(f"--coordinator: expected a port from 1 to 65535, found {port}")
  numbers = {}
  for name, least in (("processes", 1), ("process", 0)):
    text = flags.get(name, str(least))
    if not (text.isascii() and text.isdigit()) or int(text) < least:
      problems.append(f"--{name}: expected a whole number from {least}, found {text!r}")
    numbers[name] = int(text) if text.isascii() and text.isdigit() else least
  if not problems and numbers["process"] >= numbers["processes"]:
    problems.append(
      f"--process: {numbers['process']} of {numbers['processes']}; they are counted from 0"
    )
  if problems:
    raise config_lib.ConfigError(
      "; ".join(problems) + "; several processes are started with --coordinator HOST:PORT "
      "--processes N --process I (the same HOST:PORT everywhere, on the host of process 0)"
    )
  return flags["coordinator"], numbers["processes"], numbers["process"]


def barrier(name: str, seconds: int = 0) -> None:
  """Blocks until every process has reached the barrier `name`; returns at once in a single one.

  Raises an error after `seconds`; 0 is BARRIER_SECONDS, an hour.

  Collectives have a shorter limit (gloo: 30 s until all have joined). So a barrier follows slow
  work that ends at different times, such as compiling.
  """
  limit = 1000 * (seconds or BARRIER_SECONDS)
  ocp.multihost.get_barrier_sync_fn()(key=f"llava_sp {name}", timeout_ms=limit)


class PeerError(LlavaSPError, RuntimeError):
  """Raised when another process of this run failed; the message says which and why."""


def barrier_within(name: str, seconds: float) -> bool:
  """Waits at the barrier `name`, and returns whether every process reaches it within `seconds`."""
  try:
    ocp.multihost.get_barrier_sync_fn()(key=f"llava_sp {name}", timeout_ms=int(1000 * seconds))
  except RuntimeError:
    return False
  return True


def all_gather(text: str, name: str) -> list[str]:
  """Returns the `text` of every process, in the order of their indices.

  All must call it with the same `name`, that of a barrier before it.
  """
  if jax.process_count() == 1:
    return [text]
  barrier(name)  # because the limit of a collective is shorter
  mine = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(len(mine), np.int32))
  padded = np.zeros(int(sizes.max()) + 1, np.uint8)  # never empty
  padded[: len(mine)] = mine
  every = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, size in zip(every, sizes, strict=True)]


def collective(name: str, work: Callable[[], Result], only: int | None = None) -> Result | None:
  """Does `work` in all processes, or only in process `only`; an error in one is raised in all.

  So no process continues or waits alone. `name` is that of a barrier. Returns what `work` returned
  here, None where it was not done.

  Raises: this process's error, or PeerError with that of the first process that had one.
  """
  result, failed = None, None
  if only is None or only == jax.process_index():
    try:
      result = work()
    except Exception as error:
      failed = error
  said = all_gather(f"{type(failed).__name__}: {failed}" if failed else "", name)
  if failed:
    raise failed
  problems = [f"process {i}: {text}" for i, text in enumerate(said) if text]
  if problems:
    raise PeerError(problems[0])
  return result


def agreed(name: str, work: Callable[[], Result]) -> Result:
  """Does `work` in process 0, and returns in all what it returned there, which JSON can hold.

  So nothing depends on what a network disk shows to the others, which may be older. `name` is that
  of a barrier. Raises: as `collective`.
  """
  found = json.dumps(collective(name, work, only=0))
  result: Result = json.loads(all_gather(found, f"{name}, and told to all")[0])
  return result
