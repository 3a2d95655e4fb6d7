"""Counts and times for Prometheus, named as vLLM names them, under `moestro_`.

The engine's own counters are read on request. There are only three figures a layer for the experts; the whole matrix is
at `/routing`, where it costs no time series.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moestro.engine.stats import EngineStats
from moestro.routing.stats import dead_experts, load_entropy, max_over_mean

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 400)


class Metrics:
    """What the server has seen since it started."""

    def __init__(self, layers: list[str]) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineFigures(layers)
        self._registry.register(self._engine)
        self.first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.next_token = self._histogram("inter_token_latency_seconds", "From one token of a request to the next.")
        self.whole = self._histogram("e2e_request_latency_seconds", "From the request to its end.")
        self.success = Counter(
            "moestro_request_success", "Continuations that ended.", ["finished_reason"], registry=self._registry
        )
        self.rejected = Counter("moestro_request_rejected", "Requests refused.", ["reason"], registry=self._registry)
        self.aborted = Counter("moestro_request_aborted", "Requests whose client hung up.", registry=self._registry)

    def render(self, stats: EngineStats) -> bytes:
        """The text that Prometheus reads."""
        self._engine.stats = stats
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"moestro_{name}", text, buckets=SECONDS, registry=self._registry)


class _EngineFigures(Collector):
    """The engine's counters at the time of the request."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.stats: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        """The engine's metrics; none before the first request, when the registry only wants the names."""
        if self.stats is None:
            return
        stats = self.stats
        yield _gauge("num_requests_running", "Continuations being computed.", stats.running)
        yield _gauge("num_requests_waiting", "Continuations that wait.", stats.waiting)
        yield _gauge(
            "kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.", stats.pages_used / stats.pages
        )
        yield _count("num_preemptions", "Continuations that gave up their pages for others.", stats.preemptions)
        yield _count("prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
        yield _count("generation_tokens", "Tokens written.", stats.generated_tokens)
        yield _count("prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hit_tokens)
        yield from self._speculation(stats)
        yield from self._experts(stats)

    def _speculation(self, stats: EngineStats) -> Iterator[Metric]:
        drafts = stats.drafted[0] if stats.drafted else 0
        yield _count("spec_decode_num_drafts", "Steps of a continuation that tried drafts.", drafts)
        yield _count("spec_decode_num_draft_tokens", "Tokens drafted.", sum(stats.drafted))
        yield _count("spec_decode_num_accepted_tokens", "Drafted tokens that were kept.", sum(stats.accepted))
        name = "moestro_spec_decode_num_accepted_tokens_per_pos"
        places = CounterMetricFamily(name, "Drafted tokens kept, by place.", labels=["position"])
        for position, count in enumerate(stats.accepted):
            places.add_metric([str(position)], count)
        yield places

    def _experts(self, stats: EngineStats) -> Iterator[Metric]:
        if not self.layers:
            return
        loads = stats.loads.numpy()
        for name, text, values in (
            ("max_over_mean", "Largest over mean load of a layer's experts.", max_over_mean(loads)),
            ("entropy", "Entropy of a layer's load over that of uniform load.", load_entropy(loads)),
            ("dead", "Experts of a layer without a token.", dead_experts(loads)),
        ):
            family = GaugeMetricFamily(f"moestro_expert_load_{name}", text, labels=["layer"])
            for layer, value in zip(self.layers, values, strict=True):
                family.add_metric([layer], float(value))
            yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moestro_{name}", text, value=value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"moestro_{name}", text, value=value)
