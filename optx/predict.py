"""How long a decode step will take: its bounds, corrected by what the target's kernels were measured to reach.

    seconds = kernels x launch + sum over ops of bytes / (bandwidth x share) + FLOPs / (peak x share)
              + small kernels x small + between

with the figures of `optx.target.Decode`, each of a target whose kernels were measured. Elsewhere the prediction is the bounds
alone, and says so.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from flax import nnx

from optx import lower
from optx.cost import OpCost
from optx.target import Target, key

# Kernels of a decode step that read the bytes of one call of an op. `vectors` ride along in others.
KERNELS: Mapping[str, int] = {"matmul": 1, "head": 1, "experts": 1, "attention": 1, "state": 1, "vectors": 0}

# Other kernels of a decode step that stand around one call site, by op and backend: what merges splits, pads, normalises,
# rotates and routes. Of a block, `add_norm` is two. Counted in profiles of an H100 (dense, mixtures of experts, gated delta); not
# counted but taken by likeness: recurrences other than gated_delta, indexed_attention, attention by XLA.
SMALL: Mapping[tuple[str, str], int] = {
    ("add_norm", "mosaic_gpu"): 2,
    ("add_norm", "xla"): 4,
    ("gated_act", "mosaic_gpu"): 1,
    ("gated_act", "xla"): 1,
    ("rotate_append", "mosaic_gpu"): 1,
    ("rotate_append", "xla"): 6,
    ("paged_decode", "mosaic_gpu"): 1,
    ("paged_decode", "xla"): 6,
    ("indexed_attention", "xla"): 8,
    ("matmul", "xla"): 1,
    ("quant_matmul", "xla"): 1,
    ("grouped_matmul", "mosaic_gpu"): 7,
    ("grouped_matmul", "xla"): 7,
    ("ssm_scan", "xla"): 8,
    ("selective_scan", "xla"): 8,
    ("linear_attention", "xla"): 8,
    ("gated_delta", "xla"): 12,
}
# Of one token a block's products behind its attention run in one kernel, with the next block's first: it costs as much to start,
# and to wait where one product reads all of another, as so many of them, and no kernels stand between them.
CHAINED, CHAIN, WITHIN = 4, 2, 3  # products, what they cost, small kernels that are in it
STEP = 10  # small kernels once a step: tokens looked up, the last norm, sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Ops of one kind and one format."""

    op: str
    format: str
    sites: int
    bytes: float
    bound: float  # s
    seconds: float  # predicted
    measured: bool  # the target tells what share of its figures the kernels reach; False: taken at the bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a decode step."""

    parts: tuple[Part, ...]  # the longest first
    small: int  # kernels beside those
    rest: float  # s of them
    between: float  # s between kernels and, on a mesh, on the link
    source: str | None  # where the target's figures were measured; None: bounds alone

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts) + self.rest + self.between

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """What is taken at its bound though the target has figures of other ops."""
        return tuple(key(part.op, part.format) for part in self.parts if self.source and not part.measured)

    def to_dict(self) -> dict:
        parts = [dataclasses.asdict(part) for part in self.parts]
        return {"seconds": self.seconds, **dataclasses.asdict(self), "parts": parts, "unmeasured": self.unmeasured}


def site_seconds(op: OpCost, target: Target) -> float:
    """One op's prediction. Raises TypeError on a target without a bandwidth."""
    if target.decode is None or not KERNELS[op.op]:
        return op.seconds(target)
    start, share = KERNELS[op.op] * target.decode.launch, target.decode.of(op.op, op.format)
    if share is None:
        return start + op.seconds(target)
    peak = getattr(target.peak, op.dtype)
    computed = op.flops / (peak * share.compute) if peak and share.compute else 0
    return start + op.bytes / (target.bandwidth * share.memory) + computed


def chains(tree: nnx.Module, batch: int) -> int:
    """Kernels of a decode step of a lowered tree that run several products."""
    return sum(getattr(layer, "chains", False) for layer in getattr(tree, "layers", ())) if batch == 1 else 0


def spared(tree: nnx.Module, batch: int) -> int:
    """Products of a decode step that cost nothing to start."""
    return (CHAINED - CHAIN) * chains(tree, batch)


def small_kernels(tree: nnx.Module, batch: int) -> int:
    """Kernels of a decode step of a lowered tree that read next to nothing."""
    around = sum(SMALL.get((choice.op, choice.backend), 0) for _, choice in lower.choices(tree))
    return STEP + around - WITHIN * chains(tree, batch)


def predict(
    tree: nnx.Module, ops: Sequence[OpCost], target: Target, exchanged: float = 0, *, batch: int
) -> Prediction | None:
    """ops: of one decode step of `batch` sequences by the tree on one device; exchanged: its seconds on the link. None where the
    target's bandwidth is not known.

    Raises: LoweringError when no kernel takes a call on the target.
    """
    if not target.bandwidth:
        return None
    groups: dict[tuple[str, str], list[OpCost]] = collections.defaultdict(list)
    counts = collections.Counter(op.op for op in ops)
    for op in ops:
        groups[op.op, op.format].append(op)
    figures = target.decode
    known = figures is not None
    tree = tree if lower.choices(tree) or not known else lower.choose(tree, target)
    less = {"matmul": spared(tree, batch) * figures.launch if known else 0}
    parts = [
        Part(
            op=op,
            format=format,
            sites=len(same),
            bytes=sum(each.bytes for each in same),
            bound=sum(each.seconds(target) for each in same),
            seconds=sum(site_seconds(each, target) for each in same) - less.get(op, 0) * len(same) / counts[op],
            measured=figures is not None and (not KERNELS[op] or figures.of(op, format) is not None),
        )
        for (op, format), same in groups.items()
    ]
    small = small_kernels(tree, batch) if known else 0
    return Prediction(
        parts=tuple(sorted(parts, key=lambda part: -part.seconds)),
        small=small,
        rest=small * figures.small if known else 0,
        between=exchanged + (figures.between if known else 0),
        source=target.source("decode").title if known and target.source("decode") else None,
    )
