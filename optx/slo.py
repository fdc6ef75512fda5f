"""Service-level objectives: `tpot<=5ms, ctx=128k, kl<=0.05` as typed bounds.

`name op value`, separated by commas. Upper bounds (`<=`): tpot, ttft, memory, bytes, weights, bits, kl. Lower bound (`>=`):
tok/s. Settings (`=`): ctx and batch, at which the bounds hold. Tokens and sequences count in powers of two, as contexts do:
128k is 131,072. Bytes count as memory is sold: GB is 10^9 B, GiB 2^30 B. A time without a unit is in milliseconds, a size in
bytes.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from optx.errors import UsageError, did_you_mean
from optx.ir import size_text

_TIMES = {"": 1e-3, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_SIZES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12} | {
    f"{unit}iB": 2.0 ** (10 * i) for i, unit in enumerate("KMGT", 1)
}
_COUNTS = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What a name means, and how it may be said."""

    means: str
    op: str
    units: Mapping[str, float]  # to seconds, bytes, tokens, ...
    text: Callable[[float], str]  # a value for people


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


KINDS: Mapping[str, Kind] = {
    "tpot": Kind(means="time per output token", op="<=", units=_TIMES, text=_time),
    "ttft": Kind(means="time to the first token of a prompt of ctx tokens", op="<=", units=_TIMES, text=_time),
    "tok/s": Kind(means="tokens a second, of all sequences", op=">=", units={"": 1}, text=lambda x: f"{x:,.4g} tokens/s"),
    "memory": Kind(means="weights and caches in memory", op="<=", units=_SIZES, text=size_text),
    "bytes": Kind(means="bytes that a decode step reads", op="<=", units=_SIZES, text=size_text),
    "weights": Kind(means="stored bytes of all weights", op="<=", units=_SIZES, text=size_text),
    "bits": Kind(
        means="bits a weight, scales included, over the weights that the candidates can rewrite",
        op="<=",
        units={"": 1},
        text=lambda x: f"{x:.4g} bits",
    ),
    "kl": Kind(means="KL divergence from the model as it is", op="<=", units={"": 1, "nats": 1}, text=lambda x: f"{x:.4g} nats"),
    "ctx": Kind(means="tokens of each sequence", op="=", units=_COUNTS, text=lambda x: f"{x:,.0f} tokens"),
    "batch": Kind(means="sequences decoded at once", op="=", units=_COUNTS, text=lambda x: f"{x:,.0f}"),
}  # fmt: skip
_TERM = re.compile(r"([A-Za-z_/]+) *(<=|>=|=|<|>) *(\S+?) *([A-Za-z]*)")
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+(?:e-?\d+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """One term, its value in seconds, bytes, tokens, bits or nats."""

    name: str
    value: float

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def __str__(self):
        return f"{self.name}{self.kind.op}{self.kind.text(self.value)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLO:
    """Bounds, and at which batch and context they hold."""

    bounds: tuple[Bound, ...] = ()
    batch: int = 1
    context: int | None = None  # tokens; None: the model's

    def get(self, name: str) -> float | None:
        """The value of a bound, or None where there is none."""
        return next((bound.value for bound in self.bounds if bound.name == name), None)

    def __str__(self):
        settings = [f"batch={self.batch}", *([f"ctx={self.context:,}"] if self.context else [])]
        return ", ".join([*map(str, self.bounds), *settings])


def parse(text: str) -> SLO:
    """`tpot<=5ms, ctx=128k` -> SLO. Raises UsageError that names the term, what is allowed and the nearest name."""
    found: dict[str, float] = {}
    for term in text.split(","):
        name, value = _term(term.strip())
        if name in found:
            raise UsageError(f"slo: {name} stands twice")
        found[name] = value
    if not found.keys() - {"ctx", "batch"}:
        raise UsageError(f"slo: {text}: bounds nothing; add one of {', '.join(list(KINDS)[:-2])}")
    context, batch = found.pop("ctx", None), found.pop("batch", 1)
    bounds = tuple(Bound(name=name, value=value) for name, value in found.items())
    return SLO(bounds=bounds, batch=int(batch), context=None if context is None else int(context))


def _term(term: str) -> tuple[str, float]:
    match = _TERM.fullmatch(term)
    if match is None:
        raise UsageError(f"slo: got {term!r}; allowed: name, operator, value, as in 'tpot<=5ms, ctx=128k, kl<=0.05'")
    name, op, number, unit = match.groups()
    if name not in KINDS:
        raise UsageError(f"slo: no objective is called {name!r}{did_you_mean(name, KINDS)}")
    kind = KINDS[name]
    if op != kind.op and not (kind.op == "=" and op == ">="):  # to serve at least so many tokens is to serve so many
        raise UsageError(f"slo: {term}: {name} ({kind.means}) takes {kind.op!r}, not {op!r}")
    if _NUMBER.fullmatch(number) is None or unit not in kind.units:
        units = " or ".join(unit for unit in kind.units if unit)
        raise UsageError(f"slo: {term}: got {number + unit!r}; allowed: a number{units and f' and a unit, {units}'}")
    value = float(number) * kind.units[unit]
    if not 0 < value < float("inf") or (kind.op == "=" and value % 1):
        raise UsageError(f"slo: {term}: allowed: a {'whole ' if kind.op == '=' else ''}number above 0")
    return name, value
