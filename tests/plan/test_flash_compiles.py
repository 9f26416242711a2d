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
described = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
place = jax.sharding.SingleDeviceSharding(described.devices[0])
length, heads = flash.ROOM // 128, 4
q, k = (jax.ShapeDtypeStruct((1, n, length, 128), jnp.bfloat16, sharding=place)
        for n in (heads, heads // shared))
segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
kernel = flash.Kernel(length, 128, heads, shared, flash.BLOCK, 0.1, "kept", False)
def loss(q, k, v, segments):
  return flash.attend(q, k, v, flash.first_keys(segments), kernel).astype(jnp.float32).sum()
text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile().as_text()
print(*(name for name in (flash.FORWARD, flash.BACKWARD) if name in text))
"""


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize(("name", "shared"), [("v4-8", 1), ("v5e-4", 4), ("v6e-4", 1)])
def test_heads_of_the_longest_rows_fit_into_vector_memory(name: str, shared: int) -> None:
  topology = topologies.topology(name)
  words = [topology.compiler_name, json.dumps(topology.compiler_arguments), str(shared)]
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
