"""One benchmark a file; TASKS names them. What each reads, asks and scores: docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from llava_sp_jax.eval.tasks.easy_vqa import EasyVqa
from llava_sp_jax.eval.tasks.gqa import Gqa
from llava_sp_jax.eval.tasks.llava_bench import LlavaBench
from llava_sp_jax.eval.tasks.mmbench import MmBench
from llava_sp_jax.eval.tasks.mmbench_cn import MmBenchCn
from llava_sp_jax.eval.tasks.mme import Mme
from llava_sp_jax.eval.tasks.mmvet import MmVet
from llava_sp_jax.eval.tasks.pope import Pope
from llava_sp_jax.eval.tasks.scienceqa import ScienceQa
from llava_sp_jax.eval.tasks.seed import Seed
from llava_sp_jax.eval.tasks.textvqa import TextVqa
from llava_sp_jax.eval.tasks.vizwiz import VizWiz
from llava_sp_jax.eval.tasks.vqav2 import VqaV2

# The twelve of the paper, in the order of its table.
BENCHMARKS = (
  VqaV2, Gqa, VizWiz, ScienceQa, TextVqa, Pope, Mme, MmBench, MmBenchCn, Seed, LlavaBench, MmVet,
)  # fmt: skip

# name -> class, called with the folder of the data and the options that its `options` names
# (protocol, split, circular, judge, reviews).
TASKS: dict[str, Any] = {task.name: task for task in (EasyVqa, *BENCHMARKS)}
