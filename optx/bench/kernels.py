"""Times every kernel of the running device beside its peers: `optx bench kernels`.

Each line is a call of an op: time, % of the ceiling that binds it (reading its bytes, or its FLOPs; both ceilings measured in
the same run), and the relative error against the reference in float32. Random inputs, several sets in rotation, medians.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from optx import target as targets
from optx.bench import timing
from optx.bench.cases import Shape, registry
from optx.bench.timing import Ceilings
from optx.errors import LoweringError
from optx.pallas import dispatch
from optx.pallas.dispatch import Row
from optx.report import table
from optx.tensor import is_qtensor

SANE = {
    "H100": Ceilings(device="H100", read=2.9e12, bf16=740e12)
}  # below, a card is throttled and its figures mean little


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One implementation on one shape."""

    op: str
    shape: str
    implementation: str
    microseconds: float | None  # of its kernels on the device
    wall_microseconds: float | None  # by the host's clock, launches included
    of_ceiling: float | None  # bound / time
    bound: str  # read, bf16, fp8: which ceiling binds
    error: float | None  # relative, against float32; None: not compared
    raised: str = ""

    @property
    def told(self) -> str:
        return self.raised or f"{self.microseconds:.1f} us, {100 * self.of_ceiling:.0f}% of {self.bound}"


def bound(shape: Shape, ceilings: Ceilings) -> tuple[float, str]:
    """(fewest seconds that the call can take, what binds it)."""
    rate = getattr(ceilings, shape.unit) or float("inf")
    read, compute = shape.bytes / ceilings.read, shape.flops / rate
    if shape.both:
        return read + compute, f"read + {shape.unit}"
    return (read, "read") if read >= compute else (compute, shape.unit)


def measure(shape: Shape, ceilings: Ceilings, seed: int = 0, alone: bool = False) -> list[Line]:
    """The rows that take the shape, the reference, and its peers; alone: the rows that lowering
    chooses by itself, compared with nothing."""
    sets = [shape.make(np.random.default_rng([seed, i])) for i in range(shape.copies)]
    args, kwargs = sets[0]
    inputs = [(args, registry.split(kwargs)[0]) for args, kwargs in sets]
    least, binds = bound(shape, ceilings)
    rows = [
        row for row in registry.kernels(shape, targets.detect()) if row.order != "own" and (row.verified or not alone)
    ]
    candidates: dict[str, tuple[Callable, list]] = {
        row.name: (registry.jitted(row.run, kwargs), _arranged(row, inputs)) for row in rows
    }
    peers = {} if alone else {"xla": dispatch.rows(shape.op)[-1].run, **shape.peers}
    candidates |= {name: (registry.jitted(peer, kwargs), inputs) for name, peer in peers.items()}
    want = None if alone else _first(registry.reference(shape.op, args, kwargs))
    lines = []
    for name, (function, inputs) in candidates.items():
        facts = {"op": shape.op, "shape": shape.name, "implementation": name, "bound": binds}
        try:
            error = None if want is None else timing.relative_error(_first(function(*inputs[0])), want)
            prepared = timing.prepare(function, inputs)
            seconds, wall = timing.measure(prepared), timing.wall(prepared)
        except Exception as failure:  # noqa: BLE001 - a peer that does not run here is a line of its own
            said = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:120]
            lines.append(
                Line(**facts, microseconds=None, wall_microseconds=None, of_ceiling=None, error=None, raised=said)
            )
        else:
            times = {"microseconds": 1e6 * seconds, "wall_microseconds": 1e6 * wall}
            lines.append(Line(**facts, **times, of_ceiling=least / seconds, error=error))
    return lines


def _arranged(row: Row, inputs: list) -> list:
    """The inputs as the row gets them in a lowered model: packed weights in its order."""
    if row.relayout is None:
        return inputs
    return jax.tree.map(lambda x: row.relayout(x) if is_qtensor(x) else x, inputs, is_leaf=is_qtensor)


def _first(out):
    return jax.tree.leaves(out)[0]


def text(lines: Sequence[Line], ceilings: Ceilings) -> str:
    header = ("op", "shape", "implementation", "us", "us wall", "% of ceiling", "bound", "error")
    rows = [
        [line.op, line.shape, line.implementation, f"{line.microseconds:.1f}",
         f"{line.wall_microseconds:.1f}", f"{100 * line.of_ceiling:.0f}", line.bound,
         "-" if line.error is None else f"{line.error:.1e}"]
        if not line.raised
        else [line.op, line.shape, line.implementation, "-", "-", "-", line.bound, line.raised]
        for line in lines
    ]  # fmt: skip
    return f"{ceilings_text(ceilings)}\n\n{table(header, rows)}"


def ceilings_text(ceilings: Ceilings) -> str:
    parts = [f"read {ceilings.read / 1e12:.3g} TB/s", f"bf16 {ceilings.bf16 / 1e12:.3g} TFLOP/s"]
    parts += [f"fp8 {ceilings.fp8 / 1e12:.3g} TFLOP/s"] if ceilings.fp8 else []
    least = next((sane for mark, sane in SANE.items() if mark in ceilings.device), None)
    slow = least and (ceilings.read < least.read or ceilings.bf16 < least.bf16)
    note = "  (lower than this card should reach: percentages mean little)" if slow else ""
    return f"{ceilings.device}: {', '.join(parts)}{note}"


def run(ops: Sequence[str] = (), seed: int = 0, alone: bool = False) -> tuple[list[Line], Ceilings]:
    """All benchmark lines of `ops` (all when empty) on the running device; alone: without peers and errors.

    Raises: UsageError for an unknown op, LoweringError on a machine whose device has no kernels.
    """
    shapes = registry.shapes(ops)
    if (here := jax.default_backend()) not in dispatch.PLATFORMS.values():
        raise LoweringError(
            f"bench kernels: this machine runs on {here}, which has no kernels; run it on a GPU or a TPU"
        )
    ceilings = timing.ceilings()
    lines: list[Line] = []
    for shape in tqdm(shapes, unit="shape", file=sys.stderr, mininterval=5):
        found = measure(shape, ceilings, seed, alone)
        for line in found:  # at once: a run that is stopped has shown what it knows
            tqdm.write(f"{line.op} {line.shape} {line.implementation}: {line.told}", file=sys.stderr)
        lines += found
    return lines, ceilings


def to_dict(lines: Sequence[Line], ceilings: Ceilings) -> dict:
    """The JSON form: {"ceilings": {...}, "lines": [...]}."""
    return {"ceilings": dataclasses.asdict(ceilings), "lines": [dataclasses.asdict(line) for line in lines]}
