"""vLLM's benchmark of servers, unchanged, against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.infer.requests import Request
from tests.clients import pairs, run
from tests.conftest import ConfigMaker
from tests.serve.answered import again
from tests.serve.conftest import Real

COUNT = 24
PROGRAM = "from vllm.entrypoints.cli.main import main; main()"


@pytest.mark.slow
def test_vllm_bench_serve(
  real: Real, tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Every request succeeds, has as many tokens as it asked for, and the text of the engine."""
  asked: list[Request] = []
  submit = real.service.submit

  def record(request: Request, listener: Any) -> Any:
    asked.append(request)
    return submit(request, listener)

  monkeypatch.setattr(real.service, "submit", record)
  options: dict[str, object] = {
    "backend": "openai-chat",
    "endpoint": "/v1/chat/completions",
    "base-url": real.server.url,
    "model": "tiny",
    "tokenizer": tiny_config("finetune").data.tokenizer,
    "dataset-name": "random-mm",
    "num-prompts": COUNT,
    "random-input-len": 20,
    "random-output-len": 16,
    "random-range-ratio": 0.5,
    "random-mm-num-mm-items-range-ratio": 1,  # none, one or two pictures
    "max-concurrency": 4,
    "ready-check-timeout-sec": 60,
    "ignore-eos": True,
    "save-result": True,
    "save-detailed": True,
    "result-filename": tmp_path / "found.json",
  }
  run("vllm", PROGRAM, "bench", "serve", *pairs(options), cwd=tmp_path)
  monkeypatch.undo()
  found = json.loads((tmp_path / "found.json").read_text())
  assert (found["completed"], found["failed"]) == (COUNT, 0), found["errors"]
  assert len(asked) == COUNT + 1, "one before, to see that the server is there"
  assert {len(request.images) for request in asked} == {0, 1, 2}
  wanted = []
  for request in asked[1:]:
    answer = again(real, request)
    assert request.generation is not None
    assert answer.tokens == request.generation.max_new_tokens
    wanted.append((answer.prompt_tokens, answer.tokens, answer.text))
  got = zip(found["input_lens"], found["output_lens"], found["generated_texts"], strict=True)
  assert sorted(got) == sorted(wanted)
  assert len({text for _, _, text in wanted}) > COUNT // 2
