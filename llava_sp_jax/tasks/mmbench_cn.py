"""MMBench in Chinese (scripts/v1_5/eval/mmbench_cn.sh): like MMBench, with prompts in Chinese."""

from __future__ import annotations

from typing import ClassVar

from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks.benchmark import LONG, Rules
from llava_sp_jax.tasks.choices import of_llava, of_lmms
from llava_sp_jax.tasks.mmbench import MmBench


class MmBenchCn(MmBench):
  """Implements MMBench in Chinese."""

  name = "mmbench_cn"
  homes = ("mmbench_cn", "mmbench")  # of LLaVA's script, and of its docs/Evaluation.md
  split = "mmbench_dev_cn_20231003"
  protocols: ClassVar = {
    "llava": Rules("the server scores", LONG, prompt=of_llava("请直接回答选项字母。")),
    "lmms": Rules(
      "MMBench's rules for letters and texts, then the judge",
      Generation(max_new_tokens=256),
      prompt=of_lmms("有如下几个选项：", "请直接使用所提供的选项字母作为答案回答。"),
    ),
  }
