"""FLOPs and bytes of single operations by hand: collectives, products, kernels, a whole step."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import attention, flops
from llava_sp_jax.plan import cost, hlo, kernels, lower, memory, report, topologies, work
from llava_sp_jax.plan.compile import Compiled
from tests.conftest import ConfigMaker

V5E = topologies.topology("v5e-4")
PLACES = [[0, 0], [1, 0], [0, 1], [1, 1]]
GIB = 1 << 30


def predicted(text: str) -> cost.Cost:
  return cost.Predictor(hlo.parse(text), V5E, PLACES).run()


def one(opcode: str, given: str, made: str, more: str) -> str:
  """A module of one operation on one parameter."""
  return (
    f"HloModule m, is_scheduled=true\n\nENTRY %main (a: {given}) -> {made} {{\n"
    f"  %a = {given}{{1,0}} parameter(0)\n"
    f"  ROOT %x = {made}{{1,0}} {opcode}(%a), {more}\n}}\n"
  )


GROUPS = "replica_groups={{0,1,2,3}}"
PAIRS = "replica_groups={{0,2},{1,3}}"
SIZE = 1024 * 512 * 2  # bytes of the input, bfloat16
# What a device receives, by the ring algorithms: n - 1 of n parts; an all-reduce sends them twice.
RECEIVED = {
  "all-gather": ("bf16[4096,512]", GROUPS, 3 * SIZE),
  "all-gather of two": ("bf16[2048,512]", PAIRS, SIZE),
  "reduce-scatter": ("bf16[256,512]", GROUPS, SIZE * 3 / 4),
  "all-reduce": ("bf16[1024,512]", GROUPS, 2 * SIZE * 3 / 4),
  "all-reduce of two": ("bf16[1024,512]", PAIRS, SIZE),
  "all-to-all": ("bf16[1024,512]", GROUPS, SIZE * 3 / 4),
  "ragged-all-to-all": ("bf16[1024,512]", GROUPS, SIZE * 3 / 4),
  "collective-permute": ("bf16[1024,512]", "source_target_pairs={{0,1},{1,0}}", SIZE),
}


@pytest.mark.parametrize("name", RECEIVED)
def test_bytes_of_collectives(name: str) -> None:
  made, more, wanted = RECEIVED[name]
  opcode = name.split(" ")[0]
  found = predicted(one(opcode, "bf16[1024,512]", made, more))
  ((kind, (received, count, seconds, waited)),) = found.collectives.items()
  assert (kind, count) == (opcode, 1)
  assert received == wanted
  spans = 2 if more == GROUPS else 1  # axes of a 2 x 2 slice, one link each
  assert seconds == pytest.approx(wanted / (spans * 4.5e10) + cost.LATENCY)
  assert found.seconds == waited == pytest.approx(seconds)


def test_every_collective_has_its_bytes_here() -> None:
  assert {name.split(" ")[0] for name in RECEIVED} == set(cost.COLLECTIVES)


PRODUCTS = {  # operands, result, how they are multiplied, multiply-adds
  "a batched dot": (
    ("bf16[4,8,32]", "bf16[4,32,16]"), "f32[4,8,16]",
    "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    "rhs_contracting_dims={1}", 4 * 8 * 16 * 32,
  ),
  "a dot over two axes": (
    ("bf16[8,4,32]", "bf16[4,32,16]"), "f32[8,16]",
    "dot(%a, %b), lhs_contracting_dims={1,2}, rhs_contracting_dims={0,1}", 8 * 16 * 4 * 32,
  ),
  "a matmul as a convolution": (
    ("bf16[8,32]", "bf16[32,16]"), "f32[8,16]", "convolution(%a, %b), dim_labels=bf_io->bf",
    8 * 16 * 32,
  ),
  "a strided convolution": (
    ("bf16[2,24,24,3]", "bf16[16,16,3,5]"), "f32[2,5,5,5]",
    "convolution(%a, %b), window={size=16x16 stride=2x2}, dim_labels=b01f_01io->b01f",
    2 * 5 * 25 * 256 * 3,
  ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "s8"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_products(name: str, dtype: str) -> None:
  """Two for each multiply-add; 8-bit operands take half of the time."""
  (left, right), made, how, adds = PRODUCTS[name]
  left, right = (x.replace("bf16", dtype) for x in (left, right))
  module = hlo.parse(
    f"HloModule m\n\nENTRY %main (a: {left}, b: {right}) -> {made} {{\n  %a = {left} parameter(0)\n"
    f"  %b = {right} parameter(1)\n  ROOT %x = {made} {how}\n}}\n"
  )
  found = work.Worker(module).of(module.entry.root, module.entry)
  assert found.flops == work.matmul_flops(module.entry.root, module.entry) == 2 * adds
  assert found.low_flops == (2 * adds if dtype == "s8" else 0)
  sizes = [op.nbytes for op in module.entry.ops]
  assert (found.read, found.written) == (sizes[0] + sizes[1], sizes[2])
  large = dataclasses.replace(found, flops=1e12, low_flops=1e12 if dtype == "s8" else 0.0, read=0.0)
  seconds, kind = cost.duration(large, V5E.chip)
  assert kind == "matmul"
  assert seconds == pytest.approx((0.5e12 if dtype == "s8" else 1e12) / (0.93 * 197e12))


def test_of_two_branches_the_longer_is_waited_for() -> None:
  """And a loop's body counts as often as it runs."""
  body = "\n".join(
    f"%{name} (x: bf16[1024,512]) -> bf16[{rows},512] {{\n  %x = bf16[1024,512] parameter(0)\n"
    f"  ROOT %g = bf16[{rows},512] all-gather(%x), {groups}\n}}\n"
    for name, rows, groups in (("two", 2048, PAIRS), ("four", 4096, GROUPS))
  )
  text = (
    f"HloModule m, is_scheduled=true\n\n{body}\nENTRY %main (p: pred[], x: bf16[1024,512]) -> "
    "bf16[4096,512] {\n  %p = pred[] parameter(0)\n  %x = bf16[1024,512] parameter(1)\n"
    "  ROOT %c = bf16[4096,512] conditional(%p, %x, %x), branch_computations={%two, %four}\n}\n"
  )
  found = predicted(text)
  assert found.collectives["all-gather"][0] == 3 * SIZE
  assert found.seconds == pytest.approx(3 * SIZE / (2 * 4.5e10) + cost.LATENCY)


# ---- kernels ----------------------------------------------------------------------------------------


def inner(jaxpr: Any) -> Iterator[Any]:
  """All equations, those of nested jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for one in value if isinstance(value, tuple | list) else [value]:
        nested = getattr(one, "jaxpr", one)
        if hasattr(nested, "eqns"):
          yield from inner(nested)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("name", ["splash", "flash"])
@pytest.mark.parametrize("length", [512, 1536, 2048])
def test_attention_counts_the_products_that_its_kernels_make(
  name: str, length: int, samples: int
) -> None:
  """Forward and backward as `models.attention` traces them: products within a tile, times the tiles
  that the causal triangle touches, found here position by position; flash skips other samples."""
  heads, width, filled = 3, 128, 0.866
  size = length * filled / samples if samples > 1 else length
  sample = np.searchsorted(
    [round(size * n) for n in range(1, samples + 1)], np.arange(length), "right"
  )
  spec = attention.AttentionChoice(name, "tpu", branches=False)
  x = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
  segments = jnp.ones((1, length), jnp.int32)
  mask = jnp.ones((1, length, length), bool)
  angle = jnp.ones((1, length, width // 2))

  def scalar(q: Any, k: Any, v: Any) -> Any:
    made = attention.attend(spec, q, k, v, mask, segments, (angle, angle))
    return made.astype(jnp.float32).sum()

  def seen(q: int, k: int) -> bool:
    return k <= q and (
      name == "splash" or (q == k if sample[q] == samples else sample[q] == sample[k])
    )

  traced = jax.make_jaxpr(jax.grad(scalar, (0, 1, 2)))(x, x, x)
  calls = [e for e in inner(traced.jaxpr) if e.primitive.name == "pallas_call"]
  assert len(calls) == 2
  products = {"fwd": 2, "dkv": 5}
  for call in calls:
    traced_as, told = call.params["name"], call.params["metadata"]["xprof_metadata"]
    phase = "fwd" if re.search("fwd|forward", traced_as) else "dkv"
    inside = [e for e in inner(call.params["jaxpr"]) if e.primitive.name == "dot_general"]
    count = products.pop(phase)
    assert len(inside) == count  # of one head, because their number is odd
    suffix = "_dkv" if phase == "dkv" and name == "splash" else ""
    rows, columns = (json.loads(told)[f"block_{side}{suffix}"] for side in ("q", "kv"))
    tiles = {
      (q // rows, k // columns) for q in range(length) for k in edges(q, sample) if seen(q, k)
    }
    wanted = 2 * count * len(tiles) * rows * columns * width * heads
    arrays = ", ".join(
      f"%p{i}" for i, v in enumerate(call.invars) if v.aval.dtype in (jnp.bfloat16, jnp.int8)
    )
    parameters = "".join(
      f"  %p{i} = {'s8' if v.aval.dtype == jnp.int8 else 'bf16'}"
      f"[{','.join(map(str, v.aval.shape))}] parameter({i})\n"
      for i, v in enumerate(call.invars)
      if f"%p{i}" in arrays.split(", ")
    )
    metadata = json.dumps(told)
    module = hlo.parse(
      f"HloModule m\n\nENTRY %main () -> bf16[1] {{\n{parameters}  ROOT %{traced_as}.1 = bf16[1] "
      f'custom-call({arrays}), custom_call_target="tpu_custom_call", '
      f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":{metadata}\n}}}}\n}}\n'
    )
    row = kernels.Row(samples, filled)
    found, share = kernels.flops(module.entry.root, module.entry, row)
    assert found == pytest.approx(wanted, rel=1e-12), phase
    assert 0 < share < 1
    rotated = {"fwd": 2, "dkv": 4}[phase] if name == "flash" else 0  # arrays; gradients, too
    turned = kernels.vector(module.entry.root, module.entry)
    assert turned == pytest.approx(kernels.ROTATION * rotated * length * heads * width)
  assert not products


def edges(query: int, sample: np.ndarray) -> set[int]:
  """Keys that a query may see: the first of a tile, the first of its own sample, itself."""
  first = int(np.argmax(sample == sample[query]))
  return {*range(0, query + 1, 128), first, query}


# ---- a step -----------------------------------------------------------------------------------------


VIEWED = """HloModule m, is_scheduled=true

%view (p: s8[32,64,128]) -> s8[32,64,128] {
  %p = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[32,64,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%body (p: s8[32,64,128], i: s32[]) -> bf16[1,64,128] {
  %p = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %v = s8[32,64,128]{2,1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, ALIASED calls=%view
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = s8[1,64,128]{2,1,0} dynamic-slice(%v, %i, %z, %z), dynamic_slice_sizes={1,64,128}
  ROOT %f = bf16[1,64,128]{2,1,0} convert(%d)
}

ENTRY %main (p: s8[32,64,128], i: s32[]) -> bf16[1,64,128] {
  %p = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %x = bf16[1,64,128]{2,1,0} fusion(%p, %i), kind=kLoop, calls=%body
}
"""


@pytest.mark.parametrize(
  ("aliased", "slices"), [("output_to_operand_aliasing={{}: (0, {})},", 1), ("", 32)]
)
def test_a_slice_of_a_view_is_what_is_read_of_a_stack(aliased: str, slices: int) -> None:
  """The TPU compiler reads a layer's int8 weights from the stack through a view of other tiles."""
  module = hlo.parse(VIEWED.replace("ALIASED", aliased))
  main = module.computations["main"]
  assert work.Worker(module).of(main.by_name["x"], main).read == slices * 64 * 128 + 4


def test_useful_flops_of_a_step_by_hand(tiny_config: ConfigMaker) -> None:
  """Full rows, a causal triangle of pairs with its diagonal, every image there."""
  config = tiny_config(train={"batch_size": 6}, data={"row_length": 10, "images_per_row": 3})
  costs = flops.costs(config.model, lambda path: "lora_" in path or path.startswith("projector/"))
  wanted = 60 * costs.position + 6 * 55 * costs.pair + 18 * costs.image
  assert lower.useful_flops(config) == pytest.approx(wanted)


def test_memory_where_no_assignment_was_written() -> None:
  sizes = {
    "arguments": {
      "arguments[0].trainable['x']": 7,
      "arguments[0].frozen['y']": 20,
      "arguments[0].opt_state[0]": 14,
      "arguments[1]['tokens']": 3,
    },
    "temp_size_in_bytes": 100,
    "output_size_in_bytes": 25,
    "alias_size_in_bytes": 21,
    "generated_code_size_in_bytes": 2,
  }
  found = memory.of_analysis(sizes)
  assert found.parts == {
    "trainable": 7,
    "frozen": 20,
    "optimizer": 14,
    "batch": 3,
    "temporaries": 100,
    "results": 4,
    "program": 2,
  }
  assert found.total == 150


def test_what_fits_leaves_room_for_what_the_compiler_does_not_count() -> None:
  module = hlo.parse(one("all-reduce", "bf16[8,8]", "bf16[8,8]", GROUPS))
  limit = V5E.chip.hbm_bytes
  config = config_lib.from_dict({"train": {"batch_size": 8}, "data": {"row_length": 100}})
  for total, known, fits in (
    (limit - report.RESERVE, module, True),
    (limit - report.RESERVE + 1, module, False),
    (limit, None, True),
    (limit + 1, None, False),
  ):
    compiled = Compiled(
      memory.Memory({"temporaries": total}, total), 1.0, {"useful_flops": 1e15}, known
    )
    plan = report.Plan(config, V5E, "train", {"train": report.Program(compiled, cost.Cost(2.0))})
    assert plan.fits == fits
  assert 0.2 * GIB < report.RESERVE < GIB
  assert plan.mfu == pytest.approx(1e15 / (4 * 197e12 * 2.0))
  assert plan.tokens == 800
