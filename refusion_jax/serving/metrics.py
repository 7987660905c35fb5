"""Figures for Prometheus, under vLLM's names, so that dashboards and gateways made for it work unchanged; and one line
of JSON for every request.
"""

import json
import logging
import time
from typing import Any

import jax
import prometheus_client as prometheus

from refusion_jax.serving.device import Device, Job

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)

_log = logging.getLogger("refusion_jax.serving")
_compiled = [0]  # programs that this process has compiled or read from disk


def _count(event: str, _: float, **__: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
    """Programs compiled, or read from disk, in this process so far."""
    return _compiled[0]


class Metrics:
    """The figures of one server."""

    def __init__(self, model: str):
        self.registry = prometheus.CollectorRegistry()
        self._model = model
        gauge = lambda name, text: self._of(prometheus.Gauge, name, text)
        counter = lambda name, text: self._of(prometheus.Counter, name, text)
        seconds = lambda name, text: self._of(prometheus.Histogram, name, text, buckets=SECONDS)
        tokens = lambda name, text: self._of(prometheus.Histogram, name, text, buckets=TOKENS)
        self._running = gauge("num_requests_running", "Answers being written.")
        self._waiting = gauge("num_requests_waiting", "Answers that wait for a row.")
        self._usage = gauge("kv_cache_usage_perc", "Used part of the cache, in [0, 1].")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._success = prometheus.Counter(
            "vllm:request_success",
            "Finished answers.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._to_first = seconds("time_to_first_token_seconds", "From request to first token.")
        self._between = seconds("inter_token_latency_seconds", "Mean time between an answer's tokens.")
        self._whole = seconds("e2e_request_latency_seconds", "From request to whole answer.")
        self._queue = seconds("request_queue_time_seconds", "Waiting for a row.")
        self._prefill = seconds("request_prefill_time_seconds", "From row to first token.")
        self._decode = seconds("request_decode_time_seconds", "From first token to whole answer.")
        self._prompts = tokens("request_prompt_tokens", "Tokens of a prompt.")
        self._answers = tokens("request_generation_tokens", "Tokens of an answer.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts looked for among kept beginnings.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts found there.")
        self._steps = counter("diffusion_num_denoising_steps", "Forwards that answers took part in.")
        self._canvas = counter("diffusion_num_canvas_positions", "Tokens in these forwards.")
        self._committed = counter("diffusion_num_committed_tokens", "Tokens committed.")
        self._prefixes = (0, 0)  # counted so far
        self._warm = 0

    def _of(self, kind: type, name: str, text: str, **options: Any) -> Any:
        return kind(f"vllm:{name}", text, ("model_name",), registry=self.registry, **options).labels(self._model)

    def warm(self) -> None:
        """Everything is compiled."""
        self._warm = compilations()

    def compiled_since(self) -> int:
        """Programs compiled after the warm-up; there should be none."""
        return compilations() - self._warm

    def turn(self, device: Device) -> None:
        """Before every turn of the device thread, its rows given away, and when it has nothing to do."""
        self._running.set(device.running)
        self._waiting.set(device.waiting)
        self._usage.set(device.cache_used)
        counts = device.prefix_counts
        for counter, now, before in zip((self._queries, self._hits), counts, self._prefixes):
            counter.inc(max(0, now - before))  # an engine made anew counts from 0
        self._prefixes = counts

    def finished(self, job: Job) -> None:
        """A job's end, whatever it was."""
        if job.error is not None or job.latest is None or not job.lane:
            return
        tokens = len(job.latest.tokens)
        self._success.labels(self._model, job.reason).inc()
        self._prompt.inc(len(job.prompt.tokens))
        self._generated.inc(tokens)
        self._prompts.observe(len(job.prompt.tokens))
        self._answers.observe(tokens)
        self._queue.observe(job.started - job.queued)
        self._whole.observe(job.ended - job.queued)
        self._steps.inc(job.latest.forwards)
        self._canvas.inc(job.latest.tokens_forwarded - len(job.prompt.tokens))
        self._committed.inc(len(job.latest.order))
        if job.first:
            self._to_first.observe(job.first - job.queued)
            self._prefill.observe(job.first - job.started)
            self._decode.observe(job.ended - job.first)
            if tokens > 1:
                self._between.observe((job.ended - job.first) / (tokens - 1))

    def text(self) -> bytes:
        """What Prometheus reads."""
        return prometheus.generate_latest(self.registry)


def log(**fields: Any) -> None:
    """A line of JSON on the log of the server."""
    _log.info(json.dumps({"time": round(time.time(), 3), **fields}, ensure_ascii=True))
