"""Where the ops of a step stand under a target's roof: geometry of a plot, without a word of how it is drawn.

Operations a byte to the right, FLOP/s upward, both by powers of ten; the roof is min(peak, bandwidth x intensity)
(Williams et al. 2009, "Roofline: an insightful visual performance model"). Bounds lie on the roof; a dot's area is its
share of the step's time.
"""

import dataclasses
import math
from collections.abc import Sequence

from optx.cost import OpCost
from optx.target import Target

WIDTH, HEIGHT = 760.0, 400.0  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 92.0, 28.0, 24.0, 48.0  # margins
SMALLEST, LARGEST = 4.0, 24.0  # radius of a dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """Ops of one kind and one cost, so one place."""

    op: str
    format: str
    sites: int
    first: str  # path
    intensity: float  # operations a byte
    rate: float  # FLOP/s, at most
    seconds: float  # of all
    share: float  # of the step's time
    binds: str  # memory, compute
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """A slope of the bandwidth up to a peak; peak None: the slope alone."""

    dtype: str
    points: tuple[tuple[float, float], ...]
    peak: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    width: float
    height: float
    left: float
    right: float  # where the plotting area ends
    top: float
    bottom: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    roofs: tuple[Roof, ...]
    dots: tuple[Dot, ...]  # the largest first, so that the small ones stay visible
    still: int  # ops that multiply nothing and stand in no plot of operations
    kinds: tuple[str, ...]


def roofline(ops: Sequence[OpCost], target: Target) -> Plot | None:
    """None where the target's bandwidth is not known."""
    if not target.bandwidth:
        return None
    groups: dict[tuple, list[OpCost]] = {}
    for op in ops:
        if op.flops and op.bytes:
            groups.setdefault((op.op, op.format, op.dtype, round(op.bytes), round(op.flops)), []).append(op)
    dtypes = list(dict.fromkeys(key[2] for key in groups))
    peaks = {dtype: getattr(target.peak, dtype) for dtype in dtypes}
    intensities = [same[0].flops / same[0].bytes for same in groups.values()]
    ridges = [peak / target.bandwidth for peak in peaks.values() if peak]
    low, high = _decades([*intensities, *ridges])
    rates = [same[0].flops / same[0].seconds(target) for same in groups.values()]
    bottom, top = _decades([*rates, *filter(None, peaks.values())])

    def x(intensity: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(intensity) - low) / (high - low)

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(rate) - bottom) / (top - bottom)

    def roof(dtype: str) -> Roof:
        peak = peaks[dtype]
        start = max(10.0**low, 10.0**bottom / target.bandwidth)
        corner = peak / target.bandwidth if peak else min(10.0**high, 10.0**top / target.bandwidth)
        places = [(start, start * target.bandwidth), (corner, corner * target.bandwidth)]
        places += [(10.0**high, peak)] if peak else []
        return Roof(dtype=dtype, points=tuple((x(a), y(b)) for a, b in places), peak=peak)

    total = sum(op.seconds(target) for op in ops)
    dots = []
    for same in groups.values():
        op, seconds = same[0], same[0].seconds(target) * len(same)
        dots.append(
            Dot(
                op=op.op,
                format=op.format,
                sites=len(same),
                first=op.path,
                intensity=op.flops / op.bytes,
                rate=op.flops / op.seconds(target),
                seconds=seconds,
                share=seconds / total,
                binds="memory" if op.bytes / target.bandwidth >= op.seconds(target) else "compute",
                x=x(op.flops / op.bytes),
                y=y(op.flops / op.seconds(target)),
                radius=SMALLEST + (LARGEST - SMALLEST) * math.sqrt(seconds / total),
            )
        )
    return Plot(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        x_ticks=tuple((x(10.0**n), _power(10.0**n)) for n in range(low, high + 1)),
        y_ticks=tuple((y(10.0**n), _rate(10.0**n)) for n in range(bottom, top + 1)),
        roofs=tuple(roof(dtype) for dtype in dtypes),
        dots=tuple(sorted(dots, key=lambda dot: -dot.radius)),
        still=sum(not op.flops for op in ops),
        kinds=tuple(dict.fromkeys(dot.op for dot in dots)),
    )


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten around all values, with room for the dots."""
    low, high = math.floor(math.log10(min(values) / 2)), math.ceil(math.log10(max(values) * 2))
    return low, max(high, low + 1)


def _power(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.0f}{unit}"
    return f"{value:g}"


def _rate(value: float) -> str:
    for unit, size in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6)):
        if value >= size:
            return f"{value / size:.0f} {unit}"
    return f"{value:g} FLOP/s"
