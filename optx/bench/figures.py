"""What came of a served load: latencies by percentile, throughput, goodput under an SLO, errors.

TTFT is the time from sending to the first token, TPOT the mean time of the tokens after it, ITL each gap between two arrivals,
e2e the time to the last token; a request waits for its turn under a cap of requests in flight before it counts as sent. Goodput
is the rate of requests that meet every limit of the SLO (DistServe, Zhong et al., 2024, arXiv:2401.09670).
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from optx.bench.load import Load
from optx.errors import UsageError, did_you_mean
from optx.report import table

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """One request as its client saw it. Times are time.perf_counter() seconds."""

    sent: float
    prompt_tokens: int
    arrivals: list[float] = dataclasses.field(default_factory=list)  # of tokens, or of pieces of text that hold some
    output_tokens: int = 0
    error: str | None = None  # why there is no whole answer

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        return np.diff(self.arrivals).tolist()


METRICS = {
    "ttft": lambda outcome: [outcome.ttft],
    "tpot": lambda outcome: [] if outcome.tpot is None else [outcome.tpot],
    "itl": lambda outcome: outcome.itls,
    "e2e": lambda outcome: [outcome.e2e],
}
SLO_METRICS = ("ttft", "tpot", "e2e")  # one value a request


def parse_slo(text: str) -> dict[str, float]:
    """`ttft:1000 tpot:50` -> milliseconds by metric. Raises UsageError."""
    limits = {}
    for part in text.split():
        name, _, value = part.partition(":")
        if name not in SLO_METRICS:
            raise UsageError(f"--slo: {part!r}{did_you_mean(name, SLO_METRICS)}; an SLO is like 'ttft:1000 tpot:50'")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = float("nan")
        if not limits[name] > 0:
            raise UsageError(f"--slo: {part!r}; allowed: milliseconds above 0, as in '{name}:50'")
    return limits


def summarize(outcomes: Sequence[Outcome], load: Load, slo: Mapping[str, float]) -> dict:
    """The figures of a load as plain data. Times in ms, `seconds` from the first request sent to the last token.

    Keys: load (the fields of Load); requests {sent, completed, failed}; errors {message: how many}; seconds; prompt_tokens and
    output_tokens (of completed requests); requests_per_second, output_tokens_per_second, total_tokens_per_second; ttft_ms,
    tpot_ms, itl_ms, e2e_ms, each {mean, p50, p90, p99} or null without a value; slo_ms {metric: limit};
    goodput_requests_per_second (null without an SLO).
    """
    done = [outcome for outcome in outcomes if outcome.error is None]
    errors = collections.Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    last = max((outcome.arrivals[-1] for outcome in done), default=0.0)
    seconds = max(last - min(outcome.sent for outcome in outcomes), 0.0)
    prompts, answers = sum(o.prompt_tokens for o in done), sum(o.output_tokens for o in done)
    good = [o for o in done if all(1e3 * x <= slo[name] for name in slo for x in METRICS[name](o))]

    def rate(count: float) -> float:
        return count / seconds if seconds else 0.0

    return {
        "load": dataclasses.asdict(load) | {"request_rate": _finite(load.request_rate)},
        "requests": {"sent": len(outcomes), "completed": len(done), "failed": len(outcomes) - len(done)},
        "errors": dict(errors.most_common()),
        "seconds": seconds,
        "prompt_tokens": prompts,
        "output_tokens": answers,
        "requests_per_second": rate(len(done)),
        "output_tokens_per_second": rate(answers),
        "total_tokens_per_second": rate(prompts + answers),
        **{f"{name}_ms": _spread([x for o in done for x in values(o)]) for name, values in METRICS.items()},
        "slo_ms": dict(slo),
        "goodput_requests_per_second": rate(len(good)) if slo else None,
    }


def _finite(rate: float) -> float | str:
    return "inf" if rate == float("inf") else rate  # JSON has no infinity


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = 1e3 * np.asarray(seconds)
    found = np.percentile(values, PERCENTILES).tolist()
    return {"mean": float(values.mean())} | {f"p{p}": x for p, x in zip(PERCENTILES, found, strict=True)}


def text(figures: Mapping) -> str:
    """Two tables: throughput, latencies; then errors, if any."""
    counts, load = figures["requests"], figures["load"]
    at_once = "" if load["concurrency"] is None else f", at most {load['concurrency']} at once"
    rows = [
        ["requests completed", f"{counts['completed']:,} of {counts['sent']:,}"],
        ["seconds", f"{figures['seconds']:.2f}"],
        ["prompt tokens", f"{figures['prompt_tokens']:,}"],
        ["output tokens", f"{figures['output_tokens']:,}"],
        ["requests/s", f"{figures['requests_per_second']:.2f}"],
        ["output tokens/s", f"{figures['output_tokens_per_second']:,.1f}"],
        ["prompt and output tokens/s", f"{figures['total_tokens_per_second']:,.1f}"],
    ]
    if figures["goodput_requests_per_second"] is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in figures["slo_ms"].items())
        rows.append([f"goodput, requests/s ({limits})", f"{figures['goodput_requests_per_second']:.2f}"])
    spreads = {name: figures[f"{name}_ms"] for name in METRICS}
    latencies = [
        [f"{name.upper() if name != 'e2e' else name}, ms", *(f"{spread[key]:,.2f}" for key in spread)]
        for name, spread in spreads.items()
        if spread
    ]
    lines = [
        f"{figures['model']}, {figures['form']}: {load['num_prompts']} requests, {load['input_len']} tokens in, "
        f"{load['output_len']} out, {load['request_rate']} requests/s{at_once}",
        table(("throughput", ""), rows),
        "",
        table(("latency", "mean", *(f"p{p}" for p in PERCENTILES)), latencies),
    ]
    failed = [f"FAILED {count:,} of {counts['sent']:,}: {message}" for message, count in figures["errors"].items()]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def comparison(found: Mapping, against: Mapping) -> str:
    """Output tokens/s and latencies against an earlier run's; the cost is 1 - the ratio of tokens/s. Says where loads differ."""
    ratio = found["output_tokens_per_second"] / against["output_tokens_per_second"]
    rows = [["output tokens/s", f"{against['output_tokens_per_second']:,.1f}", f"{found['output_tokens_per_second']:,.1f}",
             f"{ratio:.3f}"]]  # fmt: skip
    for name in METRICS:
        old, new = against[f"{name}_ms"], found[f"{name}_ms"]
        if old and new:
            rows.append(
                [f"{name} p50, ms", f"{old['p50']:,.2f}", f"{new['p50']:,.2f}", f"{new['p50'] / old['p50']:.3f}"]
            )
    lines = [table(("against", against["form"], found["form"], "ratio"), rows), f"cost in throughput: {1 - ratio:.1%}"]
    differing = sorted(name for name, value in found["load"].items() if against["load"].get(name) != value)
    lines += [f"the loads differ in {', '.join(differing)}"] if differing else []
    return "\n".join(lines)
