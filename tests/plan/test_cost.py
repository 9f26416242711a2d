"""Parser and cost model on a schedule that the TPU compiler wrote, against sums made by hand.

`schedule.txt` and `buffers.txt` are of a small program on v5e:2x2 (after code generation): three
layers `silu(x w)` in a scan, x [4096, 2048] over four chips, w [3, 2048, 2048] divided over them,
then `bnth,bnsh->bnts` of [1, 8, 512, 128] per chip and a mean, all bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava_sp_jax.plan import cost, groups, hlo, kernels, memory, topologies, work

HERE = Path(__file__).parent
PLACES = [[0, 0], [1, 0], [0, 1], [1, 1]]
V5E = topologies.topology("v5e-4")
LAYER, HEADS = 2 * 1024 * 2048 * 2048, 8 * 2 * 512 * 512 * 128


@pytest.fixture(scope="module")
def module() -> hlo.Module:
  return hlo.parse((HERE / "schedule.txt").read_text())


@pytest.fixture(scope="module")
def predicted(module: hlo.Module) -> cost.Cost:
  return cost.Predictor(module, V5E, PLACES).run()


def test_loops_know_their_length(module: hlo.Module) -> None:
  loops = [op for op in module.entry.ops if op.opcode == "while"]
  assert [module.trip_count(op) for op in loops] == [3]


def test_flops(predicted: cost.Cost) -> None:
  assert predicted.flops == 3 * LAYER + HEADS


def test_collectives(predicted: cost.Cost) -> None:
  size, count, wire, waited = predicted.collectives["all-gather"]
  received = 3 * 2048 * 2048 * 2 * 3 / 4
  assert (size, count) == (received, 3)
  assert wire == pytest.approx(received / (2 * 45e9) + 3 * cost.LATENCY)
  assert waited == pytest.approx(wire)  # nothing stands between its start and its end


def test_matmuls_take_the_compilers_cycles(predicted: cost.Cost) -> None:
  entry = next(e for e in predicted.entries if e.name == "divide_multiply_fusion.2")
  assert (entry.kind, entry.count, entry.flops) == ("matmul", 3, 3 * LAYER)
  assert entry.seconds == pytest.approx(3 * 71516 / 1.5e9)


def test_without_cycles_matmuls_take_a_share_of_the_peak(module: hlo.Module) -> None:
  text = (HERE / "schedule.txt").read_text().replace("estimated_cycles", "forgotten")
  entries = cost.Predictor(hlo.parse(text), V5E, PLACES).run().entries
  entry = next(e for e in entries if e.name == "divide_multiply_fusion.2")
  assert entry.seconds == pytest.approx(3 * LAYER / (0.93 * 197e12))


def test_only_the_slice_of_a_stack_is_read(predicted: cost.Cost) -> None:
  entry = next(e for e in predicted.entries if e.name == "constant_dynamic-slice_fusion.2")
  assert entry.nbytes == pytest.approx(3 * 512 * 2048 * 2, abs=16)
  assert entry.seconds == pytest.approx(entry.nbytes / 7.38e11)


def test_seconds_are_those_of_the_entries(predicted: cost.Cost) -> None:
  assert predicted.seconds == pytest.approx(sum(e.seconds for e in predicted.entries))


def test_memory_by_part(module: hlo.Module) -> None:
  found = memory.of_assignment((HERE / "buffers.txt").read_text(), module)
  assert (
    found.parts["other arguments"] == 1024 * 2048 * 2 + 3 * 512 * 2048 * 2 + 2 * 8 * 512 * 128 * 2
  )
  results = 1024 * 2048 * 2 + 8 * 512 * 512 * 2
  assert found.parts[memory.TEMPORARIES] == pytest.approx(results, abs=1 << 17)  # and scratch
  assert found.total == sum(found.parts.values())


# Asynchronous: the gather of 64 MB (out of 16 MB) runs beside a matmul that takes longer or shorter.
ASYNC = """HloModule m, is_scheduled=true

%multiply (p0: bf16[{n},4096], p1: bf16[4096,4096]) -> bf16[{n},4096] {{
  %p0 = bf16[{n},4096]{{1,0}} parameter(0)
  %p1 = bf16[4096,4096]{{1,0}} parameter(1)
  ROOT %c = bf16[{n},4096]{{1,0}} convolution(%p0, %p1), dim_labels=bf_io->bf
}}

ENTRY %main (a: bf16[2048,4096], x: bf16[{n},4096], w: bf16[4096,4096]) -> bf16[8192,4096] {{
  %a = bf16[2048,4096]{{1,0}} parameter(0)
  %x = bf16[{n},4096]{{1,0:S(1)}} parameter(1)
  %w = bf16[4096,4096]{{1,0:S(1)}} parameter(2)
  %s = (bf16[2048,4096]{{1,0}}, bf16[8192,4096]{{1,0}}) all-gather-start(%a), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %f = bf16[{n},4096]{{1,0:S(1)}} fusion(%x, %w), kind=kOutput, calls=%multiply
  ROOT %d = bf16[8192,4096]{{1,0}} all-gather-done(%s)
}}
"""


@pytest.mark.parametrize("rows", [1024, 65536])
def test_collectives_hide_behind_what_stands_between(rows: int) -> None:
  found = cost.Predictor(hlo.parse(ASYNC.format(n=rows)), V5E, PLACES).run()
  wire = 8192 * 4096 * 2 * 3 / 4 / 90e9 + cost.LATENCY
  matmul = 2 * rows * 4096 * 4096 / (0.93 * 197e12)
  assert found.seconds == pytest.approx(max(wire, matmul))
  assert found.collectives["all-gather"][3] == pytest.approx(max(wire - matmul, 0))


# As for a sum that runs on the sparse cores of v6e, which are another thread of the program.
SPARSE = """HloModule m, is_scheduled=true

%sum (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r)
}

%inner (p: f32[1024,1024]) -> f32[1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  ROOT %r = f32[1024,1024]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%sum
}, execution_thread="sparsecore"

%async_computation (q: f32[1024,1024]) -> f32[1024,1024] {
  %q = f32[1024,1024]{1,0} parameter(0)
  ROOT %c = f32[1024,1024]{1,0} call(%q), to_apply=%inner
}, execution_thread="sparsecore"

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  %start = ((f32[1024,1024]{1,0}), f32[1024,1024]{1,0}, s32[]) async-start(%x), async_execution_thread="sparsecore", calls=%async_computation
  ROOT %done = f32[1024,1024]{1,0} async-done(%start), calls=%async_computation
}
"""


def test_sums_on_the_sparse_cores_are_collectives() -> None:
  found = cost.Predictor(hlo.parse(SPARSE), V5E, PLACES).run()
  whole = 1024 * 1024 * 4
  received, _, _, waited = found.collectives["all-reduce"]
  assert received == pytest.approx(whole * 2 * 3 / 4)
  assert found.seconds == pytest.approx(waited) != 0


KERNEL = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[32,2048,128], k: bf16[32,2048,128], v: bf16[32,2048,128]) -> bf16[32,2048,128] {
  %q = bf16[32,2048,128]{2,1,0} parameter(0)
  %k = bf16[32,2048,128]{2,1,0} parameter(1)
  %v = bf16[32,2048,128]{2,1,0} parameter(2)
  ROOT %NAME.1 = bf16[32,2048,128]{2,1,0} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(run)/NAME/pallas_call"}, backend_config={"custom_call_config":{"body":"x)y"}}
}
"""


def test_kernels_are_counted_by_hand() -> None:
  module = hlo.parse(KERNEL.replace("NAME", "splash_mha_fwd"))
  op = module.entry.root
  assert op.op_name == "jit(run)/splash_mha_fwd/pallas_call"
  flops, share = kernels.flops(op, module.entry)
  # two matmuls on 10 of the 16 blocks of 512 x 512
  assert flops == 2 * 2 * 32 * 10 * 512 * 512 * 128
  found = cost.Predictor(module, V5E, PLACES).run()
  assert found.seconds == pytest.approx(flops / (share * 197e12))
  assert not found.unknown


def test_unknown_kernels_are_named() -> None:
  module = hlo.parse(KERNEL.replace("NAME", "mystery"))
  found = cost.Predictor(module, V5E, PLACES).run()
  assert found.unknown == ["jit(run)/mystery/pallas_call"]
  assert found.seconds == pytest.approx(4 * 32 * 2048 * 128 * 2 / 7.38e11)


@pytest.mark.parametrize(
  ("text", "group"),
  [
    ("replica_groups={{0,2},{1,3}}", [0, 2]),
    ("replica_groups=[2,2]<=[4]", [0, 1]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [0, 2]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [0, 1]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [0, 1, 2, 3]),
    ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
    ("replica_groups={}", [0, 1, 2, 3]),
  ],
)
def test_groups(text: str, group: list[int]) -> None:
  assert sorted(groups.first(text, 4)) == group


def test_dropout_counts_in_the_vector_unit() -> None:
  found = work.Work(flops=1e9, vector=6.1e12)
  seconds, kind = cost.duration(found, V5E.chip)
  assert (kind, seconds) == ("vector", pytest.approx(1.0))


def test_no_module_is_an_error() -> None:
  with pytest.raises(hlo.HloError, match="ENTRY"):
    hlo.parse("nothing")


def test_slices_run_beside_the_schedule() -> None:
  """What is moved is the slice, not what it is taken from, and nothing waits before its end."""
  array, part = "bf16[16,8,1024,128]{3,2,1,0}", "bf16[4,8,1024,128]{3,2,1,0:S(1)}"
  text = f"""HloModule slices, is_scheduled=true

ENTRY %main (p: bf16[16,8,1024,128]) -> bf16[4,8,1024,128] {{
  %p = {array} parameter(0)
  %slice-start = (({array}), {part}, s32[]{{:S(2)}}) slice-start(%p), slice={{[12:16], [0:8], [0:1024], [0:128]}}
  ROOT %slice-done = {part} slice-done(%slice-start)
}}
"""
  found = cost.Predictor(hlo.parse(text), V5E, PLACES).run()
  moved = 4 * 8 * 1024 * 128 * 2
  assert found.hbm_bytes == moved
  assert found.seconds == pytest.approx(moved / V5E.chip.hbm_rate)
  assert [entry.kind for entry in found.entries] == ["wait:copy"]


SHARED = """HloModule m, is_scheduled=true

%square (p0: f32[1024,1024]) -> f32[1024,1024] {
  %p0 = f32[1024,1024]{1,0} parameter(0)
  ROOT %m = f32[1024,1024]{1,0} multiply(%p0, %p0)
}

%body (t: (s32[], f32[1024,1024], f32[1024,1024])) -> (s32[], f32[1024,1024], f32[1024,1024]) {
  %t = (s32[], f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[1024,1024]{1,0} get-tuple-element(%t), index=1
  %w = f32[1024,1024]{1,0} get-tuple-element(%t), index=2
  %start = (f32[1024,1024]{1,0:S(1)}, f32[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %f = f32[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%square
  %done = f32[1024,1024]{1,0:S(1)} copy-done(%start)
  ROOT %r = (s32[], f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) tuple(%i, %f, %w)
}

%condition (t: (s32[], f32[1024,1024], f32[1024,1024])) -> pred[] {
  %t = (s32[], f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (t: (s32[], f32[1024,1024], f32[1024,1024])) -> (s32[], f32[1024,1024], f32[1024,1024]) {
  %t = (s32[], f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) while(%t), condition=%condition, body=%body
}
"""


def test_an_iteration_needs_the_time_of_all_its_bytes() -> None:
  """A copy runs beside an operation that already keeps the HBM busy: both share its rate."""
  found = cost.Predictor(hlo.parse(SHARED), V5E, PLACES).run()
  size = 1024 * 1024 * 4
  assert found.hbm_bytes == 7 * 3 * size  # read, written and copied
  assert found.seconds == pytest.approx(found.hbm_bytes / V5E.chip.hbm_rate)
  (floor,) = (e for e in found.entries if e.kind == "wait:hbm")
  assert (floor.count, floor.seconds) == (7, pytest.approx(7 * size / V5E.chip.hbm_rate))


EXCHANGE = """HloModule m, is_scheduled=true

ENTRY %main (g: f32[1024,1024]) -> (f32[{received},1024], token[]) {{
  %g = f32[1024,1024]{{1,0:S(1)}} parameter(0)
  %after = token[] after-all()
  %send = (f32[1024,1024]{{1,0:S(1)}}, u32[]{{:S(2)}}, token[]) send(%g, %after), channel_id=2, is_host_transfer=true{marks}
  %recv = (f32[{received},1024]{{1,0:S(1)}}, u32[]{{:S(2)}}, token[]) recv(%after), channel_id=1, is_host_transfer=true{marks}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %recv-done = (f32[{received},1024]{{1,0:S(1)}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
}}
"""


def exchange(kind: str, received: int) -> hlo.Module:
  """A part of [1024, 1024] is sent to other slices, and `received` rows come back."""
  name, of = '_xla_host_transfer_rendezvous="x.1_0"', f'_xla_megascale_transfer_type="{kind}"'
  marks = f", frontend_attributes={{{name},{of}}}"
  return hlo.parse(EXCHANGE.format(marks=marks, received=received))


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize(
  ("kind", "rows", "parts"),
  [
    ("ALL_REDUCE", lambda slices: 1024, lambda slices: 2 * (slices - 1) / slices),  # by a ring
    ("ALL_TO_ALL", lambda slices: 1024, lambda slices: (slices - 1) / slices),
    ("ALL_GATHER", lambda slices: 1024 * slices, lambda slices: slices - 1),
    ("REDUCE_SCATTER", lambda slices: 1024 // slices, lambda slices: (slices - 1) / slices),
    ("ONE_TO_ONE", lambda slices: 1024, lambda slices: 1),
  ],
)
def test_what_crosses_from_slice_to_slice_takes_the_slow_network(
  slices: int, kind: str, rows: Callable[[int], int], parts: Callable[[int], float]
) -> None:
  """Each chip sends its part from its own host, and receives those of the other slices."""
  several = topologies.topology(f"v5e-4x{slices}")
  module = exchange(kind, rows(slices))
  found = cost.Predictor(module, several, PLACES * slices).run()
  size = 1024 * 1024 * 4 * parts(slices)
  seconds = size / 3.125e9 + cost.LATENCY
  assert found.collectives == {cost.SLOW: [size, 1, *[pytest.approx(seconds)] * 2]}
  assert found.seconds == pytest.approx(seconds)


def test_a_transfer_that_is_not_known_has_a_name() -> None:
  several = topologies.topology("v5e-4x2")
  with pytest.raises(hlo.HloError, match=r"send: a transfer MANY_TO_ONE between slices"):
    cost.Predictor(exchange("MANY_TO_ONE", 1024), several, PLACES * 2).run()


def test_a_transfer_to_the_host_is_not_between_slices() -> None:
  text = EXCHANGE.format(marks="", received=1024)
  found = cost.Predictor(hlo.parse(text), V5E, PLACES).run()
  assert found.collectives[cost.SLOW][0] == 0
