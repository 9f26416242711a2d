"""Where each figure of README and docs comes from: a record under docs/results, or a stated reason.

A figure is a number with a unit in running text or a table of these pages.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests import documents
from tests.conftest import REPOSITORY
from tests.recorded import (
  LORA,
  VARIANTS,
  accuracy,
  answered,
  changed,
  changed_by_int4,
  changed_by_the_batch,
  cost_of_a_row,
  faster_in_int8,
  host,
  mean_of,
  memory_of_conversion,
  minutes,
  minutes_of_the_paper,
  passed_trials,
  passed_trials_in_a_bucket,
  perplexity,
  plan,
  planned,
  pod,
  result,
  second_start,
  served,
  step_of,
  workload,
)

PAGES = documents.PAGES
UNIT = (
  r"(?:\s?%|x\b|\s(?:times as|seconds|s|ms|us|minutes|min|hours|steps/s|tokens/s|samples/s|images/s"
  r"|questions/s|requests a second|GB/s|GB|GiB|MB|TFLOP/s)(?![\w/]))"
)
SHARE = r"\d[\d,]* of \d[\d,]+(?! [a-z])"
FIGURE = re.compile(rf"(?<![\w./-])(?:{SHARE}|(?:\d[\d,]*(?:\.\d+)?|\.\d+){UNIT})")
CODE = re.compile(r"`[^`]*`|\]\([^)]*\)")


class Figure(NamedTuple):
  page: str
  line: int
  text: str  # with its unit: "93.4%"


def figures(page: Path) -> Iterator[Figure]:
  """All figures of a page, without those in code and links."""
  code = False
  for number, line in enumerate(page.read_text().splitlines(), 1):
    if line.startswith("```"):
      code = not code
    elif not code:
      for found in FIGURE.finditer(CODE.sub("", line)):
        yield Figure(str(page.relative_to(REPOSITORY)), number, found.group())


FULL = "llava-sp-7b-cropping-finetune-full"
OPTIONS = (  # of the compiler, as docs/performance.md has them
  "--xla_tpu_enable_experimental_fusion_cost_model=true "
  "--xla_tpu_async_copy_bandwidth_scaling_factor=0.5"
)

# (page, figure as it stands there): what the record says. Compared at the precision that is shown.
RECORDED: dict[tuple[str, str], Callable[[], float]] = {
  ("README.md", "11 minutes"): lambda: minutes("easy_vqa_demo"),
  ("README.md", "98.3%"): lambda: statistics.mean(answered("easy_vqa_demo")),
  ("README.md", "96.1%"): lambda: min(answered("easy_vqa_demo")),
  ("README.md", "99.9%"): lambda: statistics.mean(answered("easy_vqa_scale_3")),
  **{("docs/variants.md", shown): functools.partial(mean_of, variant) for variant, shown in VARIANTS.items()},
  ("docs/training.md", "81.6%"): lambda: 100 * result("easy_vqa_smollm2")["by_kind"]["all"]["accuracy"],
  ("README.md", "2.4 GB"): memory_of_conversion,
  ("README.md", "20 of 20"): passed_trials,
  ("README.md", "0 of 2,000"): lambda: changed_by_the_batch(2000),
  ("README.md", "9.3 times as"): lambda: workload("pope"),
  ("README.md", "3.613 s"): lambda: plan(LORA.format("cropping"), "v5e-16"),
  ("docs/distributed.md", "20 of 20"): passed_trials,
  ("docs/pods.md", "3.613 s"): lambda: plan(LORA.format("cropping"), "v5e-16"),
  ("docs/pods.md", "3.609 s"): lambda: plan(LORA.format("pooling"), "v5e-16"),
  ("docs/pods.md", "3.602 s"): lambda: plan(LORA.format("none"), "v5e-16"),
  ("docs/data.md", "97.7%"): lambda: 100 * result("bucket_reading")["cases"][0]["ratio"],
  ("docs/data.md", "97.5%"): lambda: 100 * result("bucket_reading")["cases"][1]["ratio"],
  ("docs/data.md", "50 ms"): lambda: 1000 * result("bucket_reading")["latency"],
  ("docs/training.md", "36.2%"): lambda: second_start("resumed once more"),
  ("docs/training.md", "30.2%"): lambda: second_start("resumed with an executable"),
  ("docs/training.md", "28.6%"): lambda: second_start("resumed once more", "without YNNPACK"),
  ("docs/training.md", "15.2%"): lambda: second_start(
    "resumed with an executable", "without YNNPACK"
  ),
  ("docs/training.md", "65 s"): lambda: result("second_start")["absent"]["compile"],
  ("docs/training.md", "2.3 s"): lambda: result("second_start")["absent"]["trace"],
  ("docs/training.md", "20 of 20"): lambda: passed_trials_in_a_bucket(20),
  ("docs/training.md", "0.09%"): lambda: 100 * max(
    abs(trial["accounted"] / trial["wall"] - 1) for trial in result("kill_trials_bucket")),
  ("docs/pods.md", "0.3%"): lambda: 100 * (
    plan(LORA.format("cropping"), "v5e-16") / plan(LORA.format("none"), "v5e-16") - 1),
  ("docs/training.md", "1 of 9,673"): lambda: changed("float32", "default", 9673),
  ("docs/training.md", "0 of 6,624"): lambda: changed("float32", "highest", 6624),
  ("docs/training.md", "14 of 9,673"): lambda: changed("bfloat16", "default", 9673),
  ("docs/performance.md", "9.3 times as"): lambda: workload("pope"),
  ("docs/performance.md", "1.4 times as"): lambda: workload("vizwiz"),
  ("docs/performance.md", "1.41 times as"): lambda: result("image_loading")[-1]["ratio"],
  ("docs/performance.md", "40.3%"): lambda: 100 * result("packing")["fill"][0]["fill"],
  ("docs/performance.md", "86.6%"): lambda: 100 * result("packing")["fill"][2]["fill"],
  ("docs/performance.md", "95.4%"): lambda: 100 * result("packing")["fill"][4]["fill"],
  ("docs/pods.md", "39 MB"): lambda: host("665000", "MB, an epoch of balanced"),
  ("docs/pods.md", "436 MB"): lambda: host("10000000", "MB, an epoch of balanced"),
  ("docs/pods.md", "0.02 s"): lambda: host("665000", "CPU s, an epoch of none"),
  ("docs/pods.md", "0.97 s"): lambda: host("10000000", "CPU s, an epoch of none"),
  ("docs/pods.md", "4.6 s"): lambda: host("40000000", "CPU s, an epoch of none"),
  ("docs/pods.md", "1.9 s"): lambda: host("665000", "CPU s, an epoch of first_fit"),
  ("docs/pods.md", "31 s"): lambda: host("10000000", "CPU s, an epoch of first_fit"),
  ("docs/pods.md", "140 s"): lambda: host("40000000", "CPU s, an epoch of first_fit"),
  ("docs/pods.md", "3.0 s"): lambda: host("665000", "CPU s, an epoch of balanced"),
  ("docs/pods.md", "52 s"): lambda: host("10000000", "CPU s, an epoch of balanced"),
  ("docs/pods.md", "215 s"): lambda: host("40000000", "CPU s, an epoch of balanced"),
  ("docs/pods.md", "2.3 us"): lambda: host("665000", "us, a row of balanced"),
  ("docs/pods.md", "2.7 us"): lambda: host("10000000", "us, a row of balanced"),
  ("docs/pods.md", "2.6 us"): lambda: host("40000000", "us, a row of balanced"),
  ("docs/pods.md", "7.6 MB"): lambda: host("665000", "MB of the file of sizes"),
  ("docs/pods.md", "1.7 GB"): lambda: host("40000000", "MB, an epoch of balanced") / 1000,
  ("docs/pods.md", "458 MB"): lambda: host("40000000", "MB of the file of sizes"),
  ("docs/pods.md", "114 MB"): lambda: host("10000000", "MB of the file of sizes"),
  ("docs/pods.md", "10,844 requests a second"): lambda: result("hosts")["asked"]["requests"],
  ("docs/pods.md", "1.6 s"): lambda: host("665000", "CPU s, the ledger checked"),
  ("docs/pods.md", "34 s"): lambda: host("10000000", "CPU s, the ledger checked"),
  ("docs/pods.md", "1.4%"): lambda: cost_of_a_row("weak-v5p", "v5p-128", "v5p-4096"),
  ("docs/pods.md", "10%"): lambda: -cost_of_a_row("weak-v5e", "v5e-16", "v5e-256"),
  ("docs/pods.md", "1.29%"): lambda: cost_of_a_row("weak-v5e", "v5e-256", "v5e-256x8"),
  ("docs/performance.md", "447 MB"): lambda: max(
    case["MB, batches"] for case in result("data_memory")["cases"].values()),
  ("docs/performance.md", "226 MB"): lambda: (
    result("data_memory")["cases"]["packed, later start"]["MB, libraries"]),
  ("docs/performance.md", "2.4 GB"): memory_of_conversion,
  ("docs/performance.md", "42.1%"): lambda: 100 * result("accelerator")["train"][0]["mfu"],
  ("docs/performance.md", "3.613 s"): lambda: plan(LORA.format("cropping"), "v5e-16"),
  ("docs/converting.md", "2.4 GB"): memory_of_conversion,
  ("docs/training.md", "1.57 times as"): functools.partial(
    faster_in_int8, "v5e-256", "replicate_tower", "replicate"),
  ("docs/training.md", "1.48 times as"): functools.partial(faster_in_int8, "v5p-128", "replicate"),
  ("docs/training.md", "1.37 times as"): functools.partial(faster_in_int8, "v6e-256", "replicate"),
  ("docs/performance.md", "0.0924 s"): lambda: plan(LORA.format("cropping"), "v6e-256", unrolled=32),
  ("docs/performance.md", "0.1045 s"): lambda: plan(LORA.format("cropping"), "v6e-256"),
  ("docs/performance.md", "0.397 s"): lambda: plan(LORA.format("cropping"), "v5e-256", unrolled=32),
  ("docs/performance.md", "0.411 s"): lambda: plan(LORA.format("cropping"), "v5e-256"),
  ("docs/performance.md", "0.390 s"): lambda: plan(
    LORA.format("cropping"), "v5e-256", unrolled=32, options=OPTIONS),
  ("docs/performance.md", "2%"): lambda: 100 * (1 - plan(
    LORA.format("cropping"), "v5e-256", unrolled=32, options=OPTIONS) / plan(
    LORA.format("cropping"), "v5e-256", unrolled=32)),
  ("docs/pods.md", "46%"): lambda: 100 * planned(FULL, "v6e-256", rows=256)["mfu"],
  ("docs/pods.md", "67%"): lambda: 100 * planned(FULL, "v6e-256", rows=1024)["mfu"],
  ("docs/pods.md", "62%"): lambda: 100 * planned(FULL, "v6e-64")["mfu"],
  ("docs/pods.md", "73%"): lambda: 100 * planned(FULL, "v5e-256", rows=256)["mfu"],
  ("docs/pods.md", "77%"): lambda: 100 * planned(FULL, "v5e-256", rows=512)["mfu"],
  ("docs/pods.md", "0.60 s"): lambda: plan(FULL, "v6e-64"),
  ("docs/pods.md", "0.20 s"): lambda: plan(FULL, "v6e-256", rows=256),
  ("docs/training.md", "98.36%"): functools.partial(accuracy, "easy-VQA", "int8"),
  ("docs/training.md", "98.32%"): functools.partial(accuracy, "easy-VQA", "floats"),
  ("docs/training.md", "80.93%"): functools.partial(accuracy, "SmolLM2", "int8"),
  ("docs/training.md", "81.07%"): functools.partial(accuracy, "SmolLM2", "floats"),
  ("docs/evaluation.md", "10.6 GiB"): lambda: pod((1, 1, 4), "hbm_gib"),
  ("docs/evaluation.md", "0.136 s"): lambda: pod((1, 1, 4), "step_seconds"),
  ("docs/evaluation.md", "3.2 ms"): lambda: 1000 * pod((1, 1, 4), "decode_step_seconds"),
  ("docs/evaluation.md", "21.7 GiB"): lambda: pod((4, 1, 1), "hbm_gib"),
  ("docs/evaluation.md", "0.087 s"): lambda: pod((4, 1, 1), "step_seconds"),
  ("docs/evaluation.md", "1.57 times as"): lambda: (
    pod((1, 1, 4), "step_seconds") / pod((4, 1, 1), "step_seconds")),
  ("docs/evaluation.md", "9.2 ms"): lambda: 1000 * pod((4, 1, 1), "decode_step_seconds"),
  ("docs/evaluation.md", "0.56 s"): lambda: pod((4, 1, 4), "step_seconds", "v5e-16"),
  ("docs/evaluation.md", "0.39 s"): lambda: pod((1, 1, 4), "step_seconds", "v5e-4"),
  ("docs/evaluation.md", "7.5 minutes"): minutes_of_the_paper,
  ("docs/quantized.md", "10 of 9,673"): changed_by_int4,
  ("docs/quantized.md", "0.71 times as"): functools.partial(step_of, "int8"),
  ("docs/quantized.md", "4.35 times as"): functools.partial(step_of, "int4"),
  ("docs/serving.md", "95.6%"): lambda: 100 * served(16, "engine"),
  ("docs/serving.md", "1.77 times as"): functools.partial(served, 16, "torch"),
  ("docs/serving.md", "0.76 times as"): functools.partial(served, 1, "torch"),
  ("docs/quantized.md", "0.15%"): functools.partial(perplexity, "int8"),
  ("docs/quantized.md", "0.06%"): functools.partial(perplexity, "int4"),
  ("docs/quantized.md", "30.5%"): functools.partial(perplexity, "int4_64"),
}  # fmt: skip

# Numbers that are no results of ours: (page, figure): what they are instead.
STATED: dict[tuple[str, str], str] = {
  ("README.md", "37.3%"): "counted in the data; tests/test_demo.py compares it",
  ("README.md", "95%"): "the level of an interval",
  ("README.md", "90%"): "what the demo promises; tests/test_ablation.py compares it",
  ("README.md", "99%"): "what the demo promises; tests/test_ablation.py compares it",
  ("README.md", "15 minutes"): "what the default suite may take",
  ("CONTRIBUTING.md", "15 minutes"): "what the default suite may take",
  ("CONTRIBUTING.md", "25 minutes"): "what the guards may take",
  ("CONTRIBUTING.md", "0.8 GB"): "what their packages take on the disk",
  ("CONTRIBUTING.md", "0.6 GB"): "what scripts/clients.sh fetches",
  ("docs/variants.md", "95%"): "the level of an interval",
  ("docs/pods.md", "88 GiB"): lambda: result("accelerator")["train"][0]["temporaries_gib"],
  ("docs/pods.md", "87.2 GiB"): "compiled again, and held to 3%, by tests/plan/test_gpu.py",
  ("docs/pods.md", "0.5 GB"): "the size of a package",
  ("docs/accelerator.md", "40 GiB"): "a limit in benchmarks/accelerator.py",
  ("docs/accelerator.md", "28 MB"): "the size of wheels",
  ("docs/data.md", "1 GiB"): "a limit in llava_sp_jax/data/decode.py",
  ("docs/evaluation.md", "1 GiB"): "a limit in llava_sp_jax/infer/layout.py",
  ("docs/evaluation.md", "15 seconds"): "a limit in llava_sp_jax/stores/bucket.py",
  ("docs/evaluation.md", "60 seconds"): "a limit in llava_sp_jax/tasks/judge.py",
  ("docs/evaluation.md", "95%"): "the level of an interval",
  ("docs/evaluation.md", "5%"): "ChartQA's rule; tests/tasks/test_vqa_json.py holds it",
  ("docs/pods.md", "90 s"): "a limit in llava_sp_jax/locks.py",
  ("docs/pods.md", "2 GiB"): "a limit in llava_sp_jax/data/packed.py",
  ("docs/data.md", "2 GiB"): "a limit in llava_sp_jax/data/packed.py",
  ("docs/pods.md", "11.2 GB"): "by shapes; tests hold the sizes of checkpoints",
  ("docs/pods.md", "17.2 GB"): "by shapes; tests hold the sizes of checkpoints",
  ("docs/pods.md", "6.4 GB"): "by shapes; tests hold the sizes of checkpoints",
  ("docs/pods.md", "93%"): "an assumption of the predictor",
  ("docs/pods.md", "4 s"): "an example with assumed numbers",
  ("docs/pods.md", "8 hours"): "an example with assumed numbers",
  ("docs/pods.md", "15 minutes"): "an example with assumed numbers",
  ("docs/pods.md", "10 s"): "an example with assumed numbers",
  ("docs/pods.md", "6.6%"): "arithmetic on an example",
  ("docs/pods.md", "900 s"): "arithmetic on an example",
  ("docs/pods.md", "4.4%"): "arithmetic on an example",
  ("docs/pods.md", "1.3%"): "arithmetic on an example",
  ("docs/training.md", "15 seconds"): "a limit in llava_sp_jax/locks.py and stores/bucket.py",
  ("docs/training.md", "1 MB"): "15 seconds of the rate in llava_sp_jax/stores/bucket.py",
  ("docs/training.md", "0.1 s"): "a limit in llava_sp_jax/training/goodput.py",
  ("docs/training.md", "2 s"): "a limit in llava_sp_jax/training/goodput.py",
  ("docs/training.md", "15 s"): "a limit in llava_sp_jax/training/goodput.py",
  ("docs/training.md", "90 seconds"): "a limit in llava_sp_jax/locks.py",
  ("docs/training.md", "12.1 GiB"): "bits of a weight times the weights of seven layers in 7B",
  ("docs/training.md", "6.0 GiB"): "bits of a weight times the weights of seven layers in 7B",
  ("docs/training.md", "6.4 GiB"): "bits of a weight times the weights of seven layers in 7B",
  ("docs/training.md", "3.4 GiB"): "bits of a weight times the weights of seven layers in 7B",
  ("docs/training.md", "3.1 GiB"): "bits of a weight times the weights of seven layers in 7B",
  ("docs/training.md", "0.9%"): "tests/models/test_quantize.py holds the errors",
  ("docs/training.md", "0.6%"): "tests/models/test_quantize.py holds the errors",
  ("docs/training.md", "2.6%"): "tests/models/test_quantize.py holds the errors",
  ("docs/training.md", "9.2%"): "tests/models/test_quantize.py holds the errors",
  **{
    ("docs/quantized.md", error): "tests/models/test_quantize.py holds the errors"
    for error in ("0.9%", "0.6%", "2.6%", "7.9%", "9.1%", "9.2%")
  },
}


def shown_as(value: float, text: str) -> bool:
  """Whether `value` is `text` at the precision of `text`."""
  number = re.match(r"[\d,.]+", text)
  assert number
  plain = number.group().replace(",", "")
  decimals = len(plain.partition(".")[2])
  return abs(value - float(plain)) <= 0.5 * 10**-decimals * (1 + 1e-9)
