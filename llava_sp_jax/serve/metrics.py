"""Measures what the server does, under the names that vLLM's dashboards look for.

Times are those that the server sees: from a request's body to its first text and to its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llava_sp_jax.infer.requests import Answer
from llava_sp_jax.serve.served import Served

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
MODEL = "model_name"  # the label that all metrics have

# Upper bounds of buckets, in seconds and in tokens.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
TOKENS = tuple(float(1 << power) for power in range(17))

# Name -> (what it is, bounds of its buckets).
HISTOGRAMS = {
  "vllm:time_to_first_token_seconds": ("Until the first text of an answer", LONG),
  "vllm:inter_token_latency_seconds": ("Between tokens, the mean of an answer", SHORT),
  "vllm:e2e_request_latency_seconds": ("Until the end of an answer", LONG),
  "vllm:request_queue_time_seconds": ("Until a request got a row", LONG),
  "vllm:request_inference_time_seconds": ("From its row to the end of an answer", LONG),
  "vllm:request_prompt_tokens": ("Tokens of a prompt, with image tokens", TOKENS),
  "vllm:request_generation_tokens": ("Tokens of an answer", TOKENS),
}


class Reading(NamedTuple):
  """Describes a metric that is read from the engine when metrics are asked for."""

  kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
  what: str
  value: float


def readings(served: Served) -> dict[str, Reading]:
  """Returns what the service and its engine count, by the names of the metrics."""
  counter, gauge = CounterMetricFamily, GaugeMetricFamily
  service, counts = served.service, served.counts
  hits = max(0, counts.images_asked - counts.encoder_calls)
  used = service.running / served.rows
  return {
    "vllm:num_requests_running": Reading(gauge, "Answers being decoded", service.running),
    "vllm:num_requests_waiting": Reading(gauge, "Requests without a row", service.waiting),
    "vllm:kv_cache_usage_perc": Reading(gauge, "Share of the rows of the cache in use", used),
    "vllm:prefix_cache_queries": Reading(
      counter, "Prefixes asked for", counts.prefills + counts.prefix_hits
    ),
    "vllm:prefix_cache_hits": Reading(counter, "Prefixes found", counts.prefix_hits),
    "vllm:mm_cache_queries": Reading(counter, "Pictures asked for", counts.images_asked),
    "vllm:mm_cache_hits": Reading(counter, "Pictures whose features were found", hits),
    "llava_sp:compiles": Reading(counter, "Programs compiled", counts.compiles),
  }


class _Readings(Collector):
  def __init__(self, served: Served):
    self._served = served

  def collect(self) -> Iterator[Metric]:
    for name, (kind, what, value) in readings(self._served).items():
      family = kind(name, what, labels=[MODEL])
      family.add_metric([self._served.names[0]], value)
      yield family


class Metrics:
  """Holds the metrics of a server. Its methods belong to the event loop."""

  def __init__(self, served: Served):
    self._registry, self._model = prometheus.CollectorRegistry(), served.names[0]
    self._registry.register(_Readings(served))
    self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts, with image tokens")
    self._generated = self._counter("vllm:generation_tokens", "Tokens of answers")
    self._success = self._counter("vllm:request_success", "Answers", "finished_reason")
    self._refused = self._counter("llava_sp:refused_requests", "Requests that got errors", "code")
    self._histograms = {
      name: prometheus.Histogram(name, what, [MODEL], buckets=bounds, registry=self._registry)
      for name, (what, bounds) in HISTOGRAMS.items()
    }

  def text(self) -> bytes:
    """Returns all metrics in Prometheus' format."""
    return prometheus.generate_latest(self._registry)

  def refused(self, code: str) -> None:
    """Counts a request that got an error with this code."""
    self._refused.labels(self._model, code).inc()

  def answered(self, answer: Answer, since: float, begun: float | None, first: float) -> None:
    """Takes the tokens and times of an answer that ends now.

    Args:
      answer: the answer.
      since: when it was asked for (`time.monotonic`), like the next ones.
      begun: when it got a row; None if that is not known.
      first: when its first text was there.
    """
    now = time.monotonic()
    self._prompt.labels(self._model).inc(answer.prompt_tokens)
    self._generated.labels(self._model).inc(answer.tokens)
    self._success.labels(self._model, answer.reason).inc()
    seen = {
      "vllm:time_to_first_token_seconds": first - since,
      "vllm:e2e_request_latency_seconds": now - since,
      "vllm:request_prompt_tokens": answer.prompt_tokens,
      "vllm:request_generation_tokens": answer.tokens,
    }
    if answer.tokens > 1:
      seen["vllm:inter_token_latency_seconds"] = (now - first) / (answer.tokens - 1)
    if begun is not None:
      seen["vllm:request_queue_time_seconds"] = max(0.0, begun - since)
      seen["vllm:request_inference_time_seconds"] = now - begun
    for name, value in seen.items():
      self._histograms[name].labels(self._model).observe(value)

  def _counter(self, name: str, what: str, *labels: str) -> prometheus.Counter:
    return prometheus.Counter(name, what, [MODEL, *labels], registry=self._registry)
