"""Streaming: several processes, a kill in the middle, the file's grid, and any mesh afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import initial, opening, own_folders, stream, writing
from llava_sp_jax.convert import export, formats, leaves
from llava_sp_jax.distributed import mesh, sharding
from llava_sp_jax.errors import CheckpointError
from tests.conftest import REPOSITORY
from tests.convert.test_round_trip import assert_same, source

# Converts argv[1] into argv[2] as process argv[3] of argv[4] (port argv[5]); argv[6]: seconds that
# each part takes longer, so that a test can meet it in the middle.
CONVERT = """
import sys, time
from pathlib import Path
import jax
given, out, process, count, port, slow = sys.argv[1:]
if int(count) > 1:
  jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
from llava_sp_jax.checkpoints import writing
from llava_sp_jax.convert import formats, leaves
read, parts = leaves.InTensors.read, []
def slowly(self, index=None):
  time.sleep(float(slow)); parts.append(self.path)
  return read(self, index)
leaves.InTensors.read = slowly
writing.write(formats.open_checkpoint(given), Path(out))
print(len(parts))
"""


def start(
  given: Path, out: Path, process: int = 0, count: int = 1, slow: float = 0.0, port: int = 0
) -> subprocess.Popen:
  arguments = [str(a) for a in (given, out, process, count, port, slow)]
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-c", CONVERT, *arguments],
    cwd=REPOSITORY,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("stream") / "lora"
  export.export(source("cropping", "bfloat16"), "llava_lora", folder)
  return folder


@pytest.mark.guard
def test_two_processes_each_read_a_part(exported: Path, tmp_path: Path) -> None:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  both = [start(exported, tmp_path / "out", i, 2, port=port) for i in range(2)]
  read = []
  for one in both:
    out, error = one.communicate(timeout=120)
    assert one.returncode == 0, error
    read.append(int(out.split()[-1]))
  given = formats.open_checkpoint(exported)
  total = sum(len(list(stream.parts(leaf))) for leaf in given.leaves.values())
  assert sum(read) == total
  assert abs(read[0] - read[1]) <= 1
  assert_same(given, opening.open_any(tmp_path / "out", formats.Options()))


def test_killed_in_the_middle_it_is_no_checkpoint_and_starts_anew(
  exported: Path, tmp_path: Path
) -> None:
  out = tmp_path / "out"
  one = start(exported, out, slow=0.2)
  deadline = time.monotonic() + 60
  while not list(out.glob("checkpoints/*tmp*/params*")):
    assert one.poll() is None, one.stderr.read()  # type: ignore[union-attr]
    assert time.monotonic() < deadline
    time.sleep(0.05)
  one.send_signal(signal.SIGKILL)
  one.communicate()
  with pytest.raises(CheckpointError, match="no checkpoint yet"):
    own_folders.open_own(out)
  given = formats.open_checkpoint(exported)
  writing.write(given, out)
  assert_same(given, opening.open_any(out, formats.Options()))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_any_mesh_places_it(exported: Path, tmp_path: Path, sizes: tuple[int, int, int]) -> None:
  """Stage 2 starts from a converted folder: every device holds its slice of the same values."""
  writing.write(formats.open_checkpoint(exported), tmp_path / "out")
  own = own_folders.open_own(tmp_path / "out")
  config = config_lib.Config(
    model=own.config.model, init=config_lib.InitConfig(checkpoint=str(tmp_path / "out"))
  )
  devices = mesh.create(config_lib.MeshConfig(**dict(zip(mesh.AXES, sizes, strict=True))))
  placed = initial.initial_params(config, lambda tree: sharding.shardings(tree, devices))
  for path, leaf in own.leaves.items():
    value = placed
    for key in path.split("/"):
      value = value[key]
    np.testing.assert_array_equal(np.asarray(value), leaf.read(), err_msg=path)
  kernel = placed["projector"]["crop_5"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_parts_cover_a_leaf_and_chunks_are_small() -> None:
  dtype = np.dtype(jax.numpy.bfloat16)
  stack = leaves.Leaf("language_model/layers/up_proj/kernel", (40, 5120, 13824), dtype)
  assert [p[0] for p in stream.parts(stack)] == [slice(i, i + 1) for i in range(40)]
  chunk = stream.chunk(stack)
  assert chunk[0] == 1
  assert np.prod(chunk) * 2 <= stream.CHUNK_BYTES
  assert all(n % c == 0 for n, c in zip(stack.shape, chunk, strict=True))
  odd = leaves.Leaf("projector/out/bias", (3,), dtype)
  assert stream.chunk(odd) == (3,)
  assert list(stream.parts(odd)) == [(slice(None),)]
