"""The attention kernels of the longest rows that they take are compiled for TPUs, code and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import topologies
from tests.conftest import REPOSITORY
from tests.plan.test_compile import LIBTPU

COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from llava_sp_jax.models import flash
name, more, shared = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
width, rotates = int(sys.argv[4]), sys.argv[5] == "rotates"
described = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
place = jax.sharding.SingleDeviceSharding(described.devices[0])
length, heads = flash.ROOM // max(width, 128), 16
q, k = (jax.ShapeDtypeStruct((1, length, n, width), jnp.bfloat16, sharding=place)
        for n in (heads, heads // shared))
angle = jax.ShapeDtypeStruct((1, length, width // 2), jnp.float32, sharding=place)
segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
most = 1 if described.devices[0].device_kind == flash.SMALL else 2
names = ("q", "k", "v", "kept")
kernel = flash.Kernel(length, width, heads, shared, flash.BLOCK, 0.1, names, False, rotates, most)
def loss(q, k, v, segments, *angles):
  made = flash.attend(q, k, v, flash.first_keys(segments), kernel, angles or None)
  return made.astype(jnp.float32).sum()
given = (q, k, k, segments, *[angle] * (2 * rotates))
text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given).compile().as_text()
print(*(name for name in (flash.FORWARD, flash.BACKWARD) if name in text))
"""


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize(
  ("name", "shared", "width", "rotates"),
  [
    ("v4-8", 1, 128, True),
    ("v5e-4", 4, 128, True),
    ("v6e-4", 1, 128, False),
    ("v5p-8", 1, 64, False),
  ],
)
def test_heads_of_the_longest_rows_fit_into_vector_memory(
  name: str, shared: int, width: int, rotates: bool
) -> None:
  topology = topologies.topology(name)
  words = [topology.compiler_name, json.dumps(topology.compiler_arguments), str(shared)]
  words += [str(width), "rotates" if rotates else ""]
  done = subprocess.run(
    [sys.executable, "-c", COMPILE, *words],
    env={**os.environ, **compile_lib.ENVIRONMENT},
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == ["flash_forward", "flash_backward"]
