"""What a target makes of a step's bytes and operations: bounds on time, what fits, which wall binds, energy and price.

All but `Estimate.predicted` are bounds that no program beats: bytes at the full bandwidth, operations at the dense peak, nothing
in between.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from flax import nnx

from optx import ir
from optx.cost import OpCost, held, step_ops
from optx.cost_mesh import Collective, Mesh, cache_parts, check, collectives, parts_of
from optx.predict import Prediction, predict
from optx.target import TIERS, Target

AGAIN = "computed again"  # the last rung


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step on a target: parts, exchanges, and the bounds that follow. None where the target lacks a figure."""

    target: Target
    ops: tuple[OpCost, ...]  # of one device
    exchanges: tuple[Collective, ...] = ()

    @property
    def bytes(self) -> float:
        return sum(op.bytes for op in self.ops)

    @property
    def flops(self) -> float:
        return sum(op.flops for op in self.ops)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    @property
    def seconds(self) -> float | None:
        """Op after op, each at its own wall, then the exchanges."""
        moved = [exchange.seconds(self.target.link) for exchange in self.exchanges]
        if not self.target.bandwidth or None in moved:
            return None
        return sum(op.seconds(self.target) for op in self.ops) + sum(moved)

    @property
    def binds(self) -> str | None:
        """Where most of the time goes: memory, compute, link."""
        if self.seconds is None:
            return None
        times = {"memory": 0.0, "compute": 0.0, "link": sum(e.seconds(self.target.link) for e in self.exchanges)}
        for op in self.ops:
            seconds = op.seconds(self.target)
            times["compute" if seconds > op.bytes / self.target.bandwidth else "memory"] += seconds
        return max(times, key=times.get)

    def of_peak(self) -> bool:
        """Whether the target tells the peak of everything that is multiplied in bulk."""
        return all(
            getattr(self.target.peak, op.dtype)
            for op in self.ops
            if op.op in ("matmul", "experts", "head", "attention")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """A way to have the KV of a sequence back."""

    name: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """`batch` sequences of `context` tokens on `mesh.devices` devices of a target."""

    target: Target
    batch: int
    context: int
    mesh: Mesh
    decode: Step  # one token for each sequence
    prefill: Step  # one prompt of `context` tokens
    held: float  # bytes of weights and caches a device
    largest_batch: int | None  # of sequences of `context`; None: memory is not known, or the cache takes none
    largest_context: int | None  # of `batch` sequences; None as above, or the cache stops growing before
    kv_rungs: tuple[Rung, ...]  # one sequence's KV: copied from each place, or computed again
    predicted: Prediction | None = None  # of the decode step; None: the target's kernels were not measured

    @property
    def tpot(self) -> float | None:
        """Seconds of a decode step, at least."""
        return self.decode.seconds

    @property
    def ttft(self) -> float | None:
        """Seconds from a prompt to its first token, nothing else running; None where a peak is not known."""
        return self.prefill.seconds if self.prefill.of_peak() else None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.tpot is None else self.batch / self.tpot

    @property
    def ridge(self) -> float | None:
        """Operations a byte above which the type of the head's activations is bound by compute."""
        head = next(op for op in self.decode.ops if op.op == "head")
        peak = getattr(self.target.peak, head.dtype)
        return peak / self.target.bandwidth if peak and self.target.bandwidth else None

    @property
    def joules_per_token(self) -> float | None:
        """Of memory alone: bytes of a decode step x energy a byte."""
        if self.target.energy is None:
            return None
        return self.decode.bytes * self.mesh.devices * self.target.energy / self.batch

    @property
    def dollars_per_million(self) -> float | None:
        """Of decoded tokens at the bound on the speed, so no less."""
        if self.target.price is None or self.tokens_per_second is None:
            return None
        return 1e6 * self.target.price.hourly * self.mesh.devices / (3600 * self.tokens_per_second)

    def to_dict(self) -> dict:
        return {
            "devices": self.mesh.devices,
            "tpot_seconds": self.tpot,
            "tpot_predicted_seconds": self.predicted and self.predicted.seconds,
            "predicted": self.predicted and self.predicted.to_dict(),
            "tokens_per_second": self.tokens_per_second,
            "decode_flops": self.decode.flops,
            "intensity": self.decode.intensity,
            "ridge": self.ridge,
            "binds": self.decode.binds,
            "prefill_flops": self.prefill.flops,
            "prefill_flops_attention": sum(op.flops for op in self.prefill.ops if op.op == "attention"),
            "ttft_seconds": self.ttft,
            "memory_per_device": self.held,
            "largest_batch": self.largest_batch,
            "largest_context": self.largest_context,
            "exchanged_bytes": sum(exchange.sent for exchange in self.decode.exchanges),
            "joules_per_token": self.joules_per_token,
            "dollars_per_million_tokens": self.dollars_per_million,
            "kv_back_seconds": {rung.name: rung.seconds for rung in self.kv_rungs},
            "by_op": by_op(self.decode),
            "by_layer": by_layer(self.decode),
            "sources": [dataclasses.asdict(source) for source in self.target.sources],
        }


def estimate(tree: nnx.Module, target: Target, *, batch: int = 1, context: int = 1, mesh: Mesh = Mesh()) -> Estimate:
    """Bounds for a concrete or abstract tree. Raises UsageError for a mesh that the model does not divide into."""
    check(tree, mesh)
    weights = _device_weights(tree, mesh)
    specs = collections.Counter(spec for spec in tree.cache_plan().specs if spec is not None)

    def kept(rows: int, length: int) -> float:  # by a device
        mine = math.ceil(rows / mesh.expert)
        return sum(n * held(spec, mine, length) / cache_parts(spec, mesh) for spec, n in specs.items())

    room = None if target.memory is None else target.memory - weights
    step = {
        "decode": _step(tree, target, mesh, batch=batch, tokens=1, context=context),
        "prefill": _step(tree, target, mesh, batch=1, tokens=context, context=context),
    }
    return Estimate(
        target=target,
        batch=batch,
        context=context,
        mesh=mesh,
        **step,
        held=weights + kept(batch, context),
        largest_batch=_largest(lambda rows: kept(rows, context), room),
        largest_context=_largest(lambda length: kept(batch, length), room),
        kv_rungs=_rungs(target, kept(1, context), step["prefill"]),
        predicted=_predicted(tree, step["decode"], batch if mesh.devices == 1 else 0),
    )


def _predicted(tree, step: Step, batch: int) -> Prediction | None:
    if step.seconds is None or step.target.decode is None:
        return None
    return predict(tree, step.ops, step.target, sum(e.seconds(step.target.link) for e in step.exchanges), batch=batch)


def _step(tree, target: Target, mesh: Mesh, *, batch, tokens, context) -> Step:
    ops = step_ops(tree, batch=batch, tokens=tokens, context=context)
    if mesh.devices == 1:
        return Step(target=target, ops=ops)
    parts, specs = parts_of(tree, mesh), tree.cache_plan().specs
    mine = math.ceil(batch / mesh.expert)  # sequences of a group; experts get tokens of all groups
    ours = step_ops(tree, batch=mine, tokens=tokens, context=context)
    met = [every if every.op == "experts" else own for every, own in zip(ops, ours, strict=True)]
    return Step(
        target=target,
        ops=tuple(_share(op, parts, specs, mesh) for op in met),
        exchanges=collectives(tree, mesh, mine * tokens, mine),
    )


def _share(op: OpCost, parts: Mapping[str, float], specs, mesh: Mesh) -> OpCost:
    """What one device does of it. Attention's heads are split also where its cache is not."""
    if op.op not in ("attention", "state"):
        n = parts[op.path]
        return dataclasses.replace(op, weights=op.weights / n, flops=op.flops / n)
    n = cache_parts(specs[op.layer], mesh)
    return dataclasses.replace(op, cache=op.cache / n, written=op.written / n, flops=op.flops / mesh.tensor)


def _device_weights(tree, mesh: Mesh) -> float:
    if mesh.devices == 1:
        return ir.weight_bytes(tree)
    parts, whole = parts_of(tree, mesh), dict(ir.walk(tree))
    return sum(_own_bytes(whole[path]) / n for path, n in parts.items())


def _own_bytes(module) -> int:
    return ir.weight_bytes(module) - sum(ir.weight_bytes(child) for _, child in ir.children(module))


LONGEST = 2**31  # tokens, sequences: beyond, memory does not bind


def _largest(size, room: float | None) -> int | None:
    """The largest n with size(n) <= room, size growing; 0 when not even one fits."""
    if room is None or size(LONGEST) <= room:
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return low


def _rungs(target: Target, kv: float, prefill: Step) -> tuple[Rung, ...]:
    """From the nearest place to the farthest, then computing it again."""
    places = [
        *([("memory", target.bandwidth)] if target.bandwidth else []),
        *([("another device", target.link / 2)] if target.link else []),
        *((tier.name, tier.bandwidth) for tier in TIERS),
    ]
    rungs = [Rung(name=name, seconds=kv / rate) for name, rate in places]
    again = prefill.seconds if prefill.of_peak() else None
    return (*rungs, *([Rung(name=AGAIN, seconds=again)] if again else []))


def by_op(step: Step) -> list[dict]:
    """Sums by kind of op and storage format, the slowest first."""
    groups: dict[tuple[str, str], list[OpCost]] = {}
    for op in step.ops:
        groups.setdefault((op.op, op.format), []).append(op)
    found = [{"op": op, "format": format, **_sums(ops, step.target)} for (op, format), ops in groups.items()]
    return sorted(found, key=lambda group: -group["bytes"])


def by_layer(step: Step) -> list[dict]:
    """Sums by layer; None: what stands outside the layers."""
    groups: dict[int | None, list[OpCost]] = {}
    for op in step.ops:
        groups.setdefault(op.layer, []).append(op)
    return [{"layer": layer, **_sums(ops, step.target)} for layer, ops in groups.items()]


def _sums(ops: Sequence[OpCost], target: Target) -> dict:
    seconds = [op.seconds(target) for op in ops]
    return {
        "sites": len(ops),
        "bytes": sum(op.bytes for op in ops),
        "flops": sum(op.flops for op in ops),
        "seconds": None if None in seconds else sum(seconds),
    }


def accepted(rate: float, drafts: int) -> float:
    """Tokens that a verification of `drafts` drafted tokens is expected to give, each accepted with probability `rate`:
    (1 - a^(g + 1)) / (1 - a) (Leviathan et al. 2023, arXiv:2211.17192, eq. 1)."""
    return drafts + 1 if rate == 1 else (1 - rate ** (drafts + 1)) / (1 - rate)


def speculation_gain(rate: float, drafts: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """How many times faster decoding gets. draft_cost: seconds of one draft, verify_cost: of the verification, both over a plain
    decode step (the same paper, theorem 3.8). Below 1 it is a loss: a large batch makes verify_cost grow with `drafts`."""
    return accepted(rate, drafts) / (drafts * draft_cost + verify_cost)
