"""Figures for Prometheus, with the meaning of vLLM's and the prefix `optx:`.

The engine's thread counts, whoever scrapes reads: a histogram is an array of counts, so that a step of many rows costs
one pass over them and no lock.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from optx.compaction import Event
from optx.engine.engine import Stats
from optx.engine.request import Request

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15)
BETWEEN += (0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
TOKENS = tuple(float(2**i) for i in range(18))
FINISHES = ("stop", "length", "abort", "error")
COMPACTIONS = ("made", "reused", "failed")  # a summary made for the request, made before, or not to be used


class Histogram:
    """Counts of values by upper bounds."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]):
        self.name, self.help, self.bounds = name, help, np.asarray(bounds)
        self.counts, self.sum = np.zeros(len(bounds) + 1, np.int64), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[np.searchsorted(self.bounds, value)] += times
        self.sum += value * times

    def family(self) -> HistogramMetricFamily:
        up_to = np.cumsum(self.counts).tolist()
        names = [*map(str, self.bounds.tolist()), "+Inf"]
        return HistogramMetricFamily(
            self.name, self.help, buckets=list(zip(names, up_to, strict=True)), sum_value=self.sum
        )


class Meter:
    """What the server has done so far. Written by the engine's thread alone, but for `refused` and compactions, whose pages it
    writes: the application does."""

    def __init__(self, model: str, version: str):
        self.model, self.version = model, version
        self.stats: Stats | None = None  # of the engine that runs now
        self.recoveries = 0
        self.finishes = dict.fromkeys(FINISHES, 0)
        self.refused: dict[str, int] = {}  # responses with an error, by status
        self.prompt_tokens = self.generation_tokens = 0
        self.compactions = dict.fromkeys(COMPACTIONS, 0)
        self.compaction_before = self.compaction_after = self.compaction_pages = 0
        self.first = Histogram(
            "optx:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST
        )
        self.between = Histogram(
            "optx:inter_token_latency_seconds",
            "Between two tokens of an answer; tokens that one step gave share its time evenly.",
            BETWEEN,
        )
        self.mean = Histogram(
            "optx:time_per_output_token_seconds", "Mean of an answer's tokens after the first.", BETWEEN
        )
        self.whole = Histogram("optx:e2e_request_latency_seconds", "From a request's arrival to its last token.", WHOLE)
        self.prompts = Histogram("optx:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.outputs = Histogram("optx:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def tokens(self, arrived: float, last: float | None, now: float, count: int) -> None:
        """A step gave an answer `count` tokens at `now`; its last one came at `last`, None: these are its first."""
        self.generation_tokens += count
        if last is None:
            self.first.add(now - arrived)
        else:
            self.between.add((now - last) / count, count)

    def finished(self, finish: str, arrived: float, now: float, request: Request) -> None:
        """An answer has ended; one that was cut off counts as such and in no latency."""
        self.finishes[finish] += 1
        self.prompt_tokens += len(request.prompt)
        if finish not in ("stop", "length"):
            return
        self.whole.add(now - arrived)
        self.prompts.add(len(request.prompt))
        self.outputs.add(len(request.output))
        if len(request.output) > 1 and request.first_token_at is not None:
            self.mean.add((now - request.first_token_at) / (len(request.output) - 1))

    def compacted(self, event: Event) -> None:
        """A conversation was compacted, or should have been."""
        self.compactions["failed" if event.failed else "reused" if event.reused else "made"] += 1
        if not event.failed:
            self.compaction_before += event.tokens_before
            self.compaction_after += event.tokens_after

    def text(self) -> bytes:
        """The exposition format of Prometheus, version 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks a collector for."""
        info = GaugeMetricFamily("optx:info", "The model served.", labels=["model", "version"])
        info.add_metric([self.model, self.version], 1)
        yield info
        yield from (h.family() for h in (self.first, self.between, self.mean, self.whole, self.prompts, self.outputs))
        for name, help, value in (
            ("optx:prompt_tokens", "Tokens of the prompts of requests that ended.", self.prompt_tokens),
            ("optx:generation_tokens", "Tokens generated.", self.generation_tokens),
            ("optx:engine_recoveries", "Times that a step failed and caches were made anew.", self.recoveries),
            (
                "optx:compaction_tokens_before",
                "Prompt tokens of compacted conversations as sent.",
                self.compaction_before,
            ),
            ("optx:compaction_tokens_after", "Prompt tokens of the same, compacted.", self.compaction_after),
            ("optx:compaction_pages", "Cache pages that compactions gave back.", self.compaction_pages),
        ):
            yield CounterMetricFamily(name, help, value=value)
        yield _by_label("optx:requests", "Answers by how they ended.", "finish", self.finishes)
        yield _by_label("optx:compactions", "Compactions by what became of their summary.", "summary", self.compactions)
        yield _by_label("optx:refused", "Responses with an error, by status.", "status", dict(self.refused))
        if self.stats is not None:
            yield from _of_engine(self.stats)


def _of_engine(stats: Stats) -> Iterator[Metric]:
    free = stats.pages - stats.pages_used - stats.pages_cached
    for name, help, value in (
        ("optx:num_requests_running", "Requests that are being computed.", stats.running),
        ("optx:num_requests_waiting", "Requests that wait for a row or for pages.", stats.waiting),
        ("optx:kv_pages", "Cache pages of all groups: free, cached and used.", stats.pages),
        ("optx:kv_pages_free", "Cache pages that hold nothing.", free),
        ("optx:kv_pages_cached", "Cache pages kept for prompts to come.", stats.pages_cached),
        ("optx:kv_pages_used", "Cache pages that running requests hold.", stats.pages_used),
    ):
        yield GaugeMetricFamily(name, help, value=value)
    for name, help, value in (
        ("optx:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_asked_tokens),
        ("optx:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
        (
            "optx:preemptions",
            "Times that a request gave its pages to another and was computed anew.",
            stats.preemptions,
        ),
        ("optx:compiles", "Programs compiled; constant after the start.", stats.compiles),
        ("optx:engine_steps", "Steps of the engine.", stats.steps),
        ("optx:draft_tokens", "Tokens drafted by speculation.", stats.drafted),
        ("optx:accepted_tokens", "Drafted tokens that were right.", stats.accepted),
    ):
        yield CounterMetricFamily(name, help, value=value)


def _by_label(name: str, help: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
