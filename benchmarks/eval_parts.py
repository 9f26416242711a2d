"""Times parts of the engine alone, beside what this machine reads and multiplies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from eval_sides import Bench

PROMPT, STEPS = 640, 16  # positions and steps of the parts that are timed separately
STARTED = time.monotonic()


def said(record: dict[str, Any]) -> None:
  """Prints one line of progress."""
  shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in record.items()}
  print(
    f"{time.monotonic() - STARTED:5.0f} s  " + "  ".join(f"{k} {v}" for k, v in shown.items()),
    flush=True,
  )


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
  started = time.perf_counter()
  result = run()
  return time.perf_counter() - started, result


def medians(repeats: int, *sides: Callable[[], float]) -> list[float]:
  """Returns the median seconds of each side."""
  return [statistics.median(column) for column in zip(*turns(repeats, *sides), strict=True)]


def turns(repeats: int, *sides: Callable[[], float]) -> list[list[float]]:
  """Measures the sides in turns, so that a busy moment affects all of them."""
  return [[side() for side in sides] for _ in range(repeats)]


def limits() -> dict[str, float]:
  """Measures the limits of XLA here: reading memory (GB/s) and large matmuls (GFLOP/s)."""
  import jax
  import jax.numpy as jnp

  def best(run: Any, *arguments: Any) -> float:
    jitted = jax.jit(run)
    return min(timed(lambda: jax.block_until_ready(jitted(*arguments)))[0] for _ in range(8))

  vector, wide = jnp.ones((1, 4096)), jnp.ones((4096, 22016))
  a, b = jnp.ones((2560, 2048)), jnp.ones((2048, 2048))
  return {
    "read_gb_s": wide.nbytes / 1e9 / best(jnp.matmul, vector, wide),
    "matmul_gflop_s": 2 * a.size * b.shape[1] / 1e9 / best(jnp.matmul, a, b),
  }


def work(config: Any, name: str, rows: int) -> tuple[float, float]:
  """Returns GB to read and GFLOP of matmuls, of a decode step after PROMPT positions or of a
  prefill.
  """
  text = config.model.language_model
  width, inner = text.width, text.heads * text.head_dim
  layer = 2 * width * inner + 2 * width * text.kv_heads * text.head_dim + 3 * width * text.mlp_width
  head = text.width * text.vocab_size
  read = 4e-9 * (text.layers * layer + head)
  tokens = rows if name == "decode" else rows * PROMPT
  seen = PROMPT if name == "decode" else PROMPT / 2
  flop = 2e-9 * (tokens * text.layers * (layer + 2 * inner * seen) + rows * head)
  if name == "decode":
    read += 4e-9 * rows * text.layers * 2 * text.kv_heads * text.head_dim * PROMPT
  return read, flop


def parts(bench: Bench, repeats: int) -> list[dict[str, Any]]:
  """Measures decoding of 8 rows, and prefill of 1 and 4, separately."""
  import jax
  import numpy as np

  from llava_sp_jax.infer import decode, prefill, row_settings
  from llava_sp_jax.infer.counts import Counts
  from llava_sp_jax.infer.programs import Programs

  vocabulary = bench.config.model.language_model.vocab_size
  strategy = decode.Sampling(decode.StopRule((), STEPS + 1, vocabulary))
  settings = row_settings.empty(8, vocabulary, STEPS + 1)
  programs = Programs(bench.config, bench.model.params, strategy, None, Counts())
  rng = np.random.default_rng(0)

  def group(rows: int) -> prefill.Group:
    tokens = rng.integers(0, 1000, (rows, PROMPT), dtype=np.int32)
    full = np.full(rows, PROMPT, np.int32)
    return prefill.Group(tokens, np.full_like(tokens, -1), full, full * 0, (), ())

  def decoded(rows: int) -> float:
    index = np.arange(rows, dtype=np.int32)
    state = programs.admit(programs.state(rows, PROMPT + 64), group(rows), index, settings)
    jax.block_until_ready(state)
    nobody = np.zeros(rows, bool)
    seconds, _ = timed(
      lambda: jax.block_until_ready(programs.decode(state, nobody, STEPS, rows + 1))
    )
    return seconds / STEPS

  def prefilled(rows: int) -> float:
    some = group(rows)
    return timed(lambda: jax.block_until_ready(programs.grow(some, PROMPT)))[0]

  records, peak = [], limits()
  said(peak)
  for name, rows, ours in (
    ("decode", 8, decoded),
    ("prefill", 1, prefilled),
    ("prefill", 4, prefilled),
  ):
    ours(rows)  # compiles

    def theirs(name: str = name, rows: int = rows) -> float:
      task = {"batch": rows, "length": PROMPT, "steps": STEPS}
      return bench.torch.do(name, **task)["seconds"]

    theirs()
    one, other = medians(repeats, lambda ours=ours, rows=rows: ours(rows), theirs)
    tokens = rows if name == "decode" else rows * PROMPT
    read, flop = work(bench.config, name, rows)
    bounds = {"memory": read / peak["read_gb_s"], "matmul": flop / peak["matmul_gflop_s"]}
    bound = max(bounds, key=lambda k: bounds[k])
    records.append(
      {
        "part": name,
        "batch": rows,
        "ours_tokens_per_s": tokens / one,
        "torch_tokens_per_s": tokens / other,
        "ratio": other / one,
        "bound": bound,
        "of_bound": bounds[bound] / one,
        "gbytes": read,
        "gflops": flop,
        **peak,
      }
    )
    said(records[-1])
  return records
