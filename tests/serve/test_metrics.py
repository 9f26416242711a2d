"""Metrics have the names that dashboards know, and count what was answered."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from llava_sp_jax.serve.metrics import HISTOGRAMS
from tests.serve import fake
from tests.serve.fake import FakeService
from tests.serve.live import Live, live
from tests.serve.pictures import data_url, encoded
from tests.serve.requests import body, text, user

CHAT = "/v1/chat/completions"
# Those that the panels of vLLM's dashboard for Grafana ask for, without the ends of their names.
DASHBOARD = {
  "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
  "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success",
  "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
  "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds",
  "vllm:request_prompt_tokens", "vllm:request_generation_tokens",
  "vllm:prefix_cache_queries", "vllm:prefix_cache_hits",
  "vllm:mm_cache_queries", "vllm:mm_cache_hits",
}  # fmt: skip


def values(server: Live) -> dict[str, float]:
  """Sample -> its value; a label beside the model's stands behind its name."""
  found = server.ask("GET", "/metrics")
  assert found.headers["content-type"].startswith("text/plain")
  result = {}
  for family in text_string_to_metric_families(found.body.decode()):
    for sample in family.samples:
      labels = dict(sample.labels)
      assert labels.pop("model_name") == "tiny"
      result[" ".join([sample.name, *labels.values()])] = sample.value
  return result


def test_names(server: Live) -> None:
  assert server.ask("POST", CHAT, body()).status == 200
  text = server.ask("GET", "/metrics").body.decode()
  families = {family.name for family in text_string_to_metric_families(text)}
  assert families >= DASHBOARD


def test_counts(service: FakeService, server: Live) -> None:
  before = values(server)
  picture = {"type": "image_url", "image_url": {"url": data_url(encoded())}}
  asked = body(messages=[user(picture, text("a b"))], max_tokens=5, ignore_eos=True, n=2)
  usage = server.ask("POST", CHAT, asked).json["usage"]
  assert server.ask("POST", CHAT, body(stream=True, max_tokens=5, ignore_eos=True)).status == 200
  assert server.ask("POST", CHAT, body(n=0)).status == 400
  after = values(server)

  def more(name: str) -> float:
    return after[name] - before.get(name, 0)

  assert more("vllm:generation_tokens_total") == 15
  assert more("vllm:prompt_tokens_total") == 2 * usage["prompt_tokens"] + 2
  assert more("vllm:request_success_total length") == 3
  assert more("llava_sp:refused_requests_total invalid_value") == 1
  assert more("vllm:mm_cache_queries_total") == 2
  for name in HISTOGRAMS:
    assert more(f"{name}_count") == 3
    assert after[f"{name}_sum"] >= 0
    assert after[f"{name}_bucket +Inf"] == after[f"{name}_count"]
  assert after["vllm:num_requests_running"] == 0


def test_what_runs_is_seen() -> None:
  service = FakeService()
  service.running, service.waiting = 3, 7
  service.counts.prefills, service.counts.prefix_hits, service.counts.compiles = 4, 6, 2
  with live(fake.served(service)) as server:
    found = values(server)
  assert found["vllm:num_requests_running"] == 3
  assert found["vllm:num_requests_waiting"] == 7
  assert found["vllm:kv_cache_usage_perc"] == 0.75
  assert found["vllm:prefix_cache_queries_total"] == 10
  assert found["vllm:prefix_cache_hits_total"] == 6
  assert found["llava_sp:compiles_total"] == 2


def test_an_error_within_a_stream_is_counted(server: Live) -> None:
  code = "llava_sp:refused_requests_total internal_error"
  before = values(server).get(code, 0)
  assert server.ask("POST", CHAT, body(messages=[user("fail")], stream=True)).status == 500
  assert values(server)[code] == before + 1
