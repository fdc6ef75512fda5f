"""Kernels of one decode step with their times (CUPTI), and which op of the plan each of them ran."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from optx.cost import OpCost
from optx.predict import KERNELS

# How a kernel's name begins -> the ops that it runs; the first that fits. None: it reads next to nothing.
NAMES: Sequence[tuple[str, tuple[str, ...] | None]] = (
    ("paged_decode_merge", None),
    ("paged_decode_scores", None),
    ("ragged_paged_attention_merge", None),
    ("mla_merge", None),
    ("paged_decode", ("attention",)),
    ("ragged_paged_attention", ("attention",)),
    ("mla", ("attention",)),
    ("grouped_matmul", ("experts",)),
    ("quant_matmul", ("matmul", "head")),
    ("chained_matmul", ("matmul", "head")),
    # products that XLA runs by itself: Triton, cuBLAS, CUTLASS
    ("gemm_fusion", ("matmul", "head")),
    ("nvjet", ("matmul", "head")),
    ("sm90_xmma_gemm", ("matmul", "head")),
    ("cutlass", ("matmul", "head")),
    ("gemv", ("matmul", "head")),
    ("void gemv", ("matmul", "head")),
)
REPEATS = 5  # steps profiled, one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Kernels of equal cost in one step: sums over them."""

    op: str
    format: str
    dtype: str
    kernels: float  # that it costs to start
    bytes: float
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One step by op."""

    seconds: Mapping[tuple[str, str], float]  # measured, by (op, format)
    samples: tuple[Sample, ...]
    rest: float  # s of kernels that run none of the ops

    @property
    def total(self) -> float:
        return sum(self.seconds.values()) + self.rest


def available() -> bool:
    """Whether the running device tells the times of its kernels."""
    return jax.default_backend() == "gpu"


def timings(step: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, milliseconds) of every kernel of one call, in order, of a device that is `available`."""
    from jax.experimental.mosaic.gpu import profiler  # takes a third of a second, which every verb would pay

    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        jax.block_until_ready(step())
    finally:
        found = cupti._cupti_get_timings(True)
    return found


def kernels(step: Callable[[], object]) -> list[tuple[str, float]] | None:
    """(name, seconds) of every kernel of a step: of several steps the one of median length. None where not `available`."""
    if not available():
        return None
    runs = [timings(step) for _ in range(REPEATS)]
    runs.sort(key=lambda run: sum(milliseconds for _, milliseconds in run))
    return [(name, 1e-3 * milliseconds) for name, milliseconds in runs[len(runs) // 2]]


def runs_ops(name: str) -> tuple[str, ...] | None:
    return next((ops for start, ops in NAMES if name.startswith(start)), None)


def by_op(
    found: Sequence[tuple[str, float]], ops: Sequence[OpCost], predicted: Callable[[OpCost], float], spared: float = 0
) -> Profile:
    """Every kernel's time to the op that it ran.

    Kernels of a name run layer after layer. Where there are as many as the plan says, a layer's go to the layer's sites, the
    longest to the one that is predicted to take longest; where not, their sum is shared as predicted. spared: products that
    cost nothing to start, as others' kernels run them too.
    """
    times: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
    rest = 0.0
    for name, seconds in found:
        runs = runs_ops(name)
        if runs is None or not any(op.op in runs for op in ops):
            rest += seconds
        else:
            times[runs].append(seconds)
    sums: dict[tuple[str, str], float] = collections.defaultdict(float)
    samples: list[Sample] = []
    for runs, measured in times.items():
        sites = [op for op in ops if op.op in runs]
        pairs = _matched(measured, sites, predicted)
        for op, seconds in pairs or _shared(sum(measured), sites, predicted):
            sums[op.op, op.format] += seconds
        samples += _samples(pairs) if pairs else _whole(sites, sums, spared)
    return Profile(seconds=dict(sums), samples=tuple(samples), rest=rest)


def _matched(times: Sequence[float], sites: Sequence[OpCost], predicted) -> list[tuple[OpCost, float]] | None:
    """None: not as many kernels as the plan says."""
    if len(times) != sum(KERNELS[op.op] for op in sites):
        return None
    layers: dict[int | None, list[OpCost]] = collections.defaultdict(list)
    for op in sorted(sites, key=lambda op: (op.layer is None, op.layer or 0)):
        layers[op.layer].append(op)
    pairs, at = [], 0
    for same in layers.values():
        count = sum(KERNELS[op.op] for op in same)
        mine, at = times[at : at + count], at + count
        if count == len(same):
            pairs += zip(sorted(same, key=predicted), sorted(mine), strict=True)
        else:
            pairs += _shared(sum(mine), same, predicted)
    return pairs


def _shared(seconds: float, sites: Sequence[OpCost], predicted) -> list[tuple[OpCost, float]]:
    whole = sum(predicted(op) for op in sites)
    return [(op, seconds * predicted(op) / whole) for op in sites]


def _samples(pairs: Sequence[tuple[OpCost, float]]) -> list[Sample]:
    groups: dict[tuple, list[tuple[OpCost, float]]] = collections.defaultdict(list)
    for op, seconds in pairs:
        groups[op.op, op.format, op.dtype, round(op.bytes), round(op.flops)].append((op, seconds))
    return [
        Sample(
            op=op,
            format=format,
            dtype=dtype,
            kernels=KERNELS[op] * len(same),
            bytes=sum(each.bytes for each, _ in same),
            flops=sum(each.flops for each, _ in same),
            seconds=sum(seconds for _, seconds in same),
        )
        for (op, format, dtype, *_), same in groups.items()
    ]


def _whole(sites: Sequence[OpCost], sums: Mapping[tuple[str, str], float], spared: float) -> list[Sample]:
    """One sample an op and format: single kernels are not told apart."""
    products = sum(op.op == "matmul" for op in sites)
    groups: dict[tuple[str, str, str], list[OpCost]] = collections.defaultdict(list)
    for op in sites:
        groups[op.op, op.format, op.dtype].append(op)
    return [
        Sample(
            op=op,
            format=format,
            dtype=dtype,
            kernels=KERNELS[op] * len(same) - (spared * len(same) / products if op == "matmul" else 0),
            bytes=sum(each.bytes for each in same),
            flops=sum(each.flops for each in same),
            seconds=sums[op, format],
        )
        for (op, format, dtype), same in groups.items()
    ]
