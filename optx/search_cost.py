"""What each form of each group costs on a target, and which bounds an objective sets on the sum.

Every figure is a sum over the tree's parts (`optx.cost`), so that what one group's form changes does not depend on the others'.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx

from optx import ir
from optx.cost import held, step_ops
from optx.errors import SearchError
from optx.estimate import Step
from optx.ir import size_text
from optx.registry import Stage
from optx.search_space import Choice, Group, layers_alike, likeness, with_form
from optx.slo import KINDS, SLO
from optx.target import Target

FIGURES = ("tpot", "ttft", "memory", "bytes", "weights", "bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """One figure of FIGURES may be at most this."""

    figure: str
    most: float
    said: str  # as the objective says it

    def within(self, figures: dict[str, float]) -> bool:
        return figures[self.figure] <= self.most * (1 + 1e-6)  # the solver's tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Figures of the model as it is, and what each form of each group adds to them."""

    target: Target
    batch: int
    context: int
    base: np.ndarray  # float64[figures], NaN where the target does not tell
    added: tuple[np.ndarray, ...]  # float64[1 + forms, figures] a group
    sizes: tuple[np.ndarray, ...]  # float64[1 + forms] a group: bytes of its sites, and of what they cache

    def of(self, choice: Choice) -> dict[str, float]:
        """All figures of a choice."""
        total = self.base + sum(rows[index] for rows, index in zip(self.added, choice, strict=True))
        return dict(zip(FIGURES, map(float, total), strict=True))

    def least(self, figure: str) -> Choice:
        """The choice with the smallest of one figure; among equals the fewest bytes of weights."""
        columns = [FIGURES.index(figure), FIGURES.index("weights")]
        return tuple(int(np.lexsort(rows[:, columns[::-1]].T)[0]) for rows in self.added)


def costs_of(tree: nnx.Module, groups: Sequence[Group], target: Target, batch: int, context: int) -> Costs:
    """On shapes. tree: abstract, as it is."""
    bits = 8 / max(sum(ir.weight_count(ir.get(tree, path)) for path in _weight_sites(groups)), 1)
    whole = sum(ir.weight_bytes(ir.get(tree, path)) for path in _weight_sites(groups))
    base = _figures(tree, target, batch, context)
    alike = layers_alike(tree)
    if any(spec is not None and spec.share is not None for spec in tree.cache_plan().specs):
        alike = tuple(range(len(tree.layers)))  # what others read of a layer's cache is not seen in the layer
    known: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
    found = []
    for group in groups:
        parts = []
        for sites in _by_layer(group.sites):
            key = likeness(sites, alike), group.forms
            if key not in known:
                part = dataclasses.replace(group, sites=sites)
                known[key] = _group_costs(tree, part, target, batch, context, base, bits)
            parts.append(known[key])
        found.append(tuple(sum(rows) for rows in zip(*parts, strict=True)))
    return Costs(
        target=target,
        batch=batch,
        context=context,
        base=np.append(base, bits * whole),
        added=tuple(added for added, _ in found),
        sizes=tuple(sizes for _, sizes in found),
    )


def _by_layer(sites: Sequence[str]) -> list[tuple[str, ...]]:
    """Sites of one layer together: costs of equal layers are equal, and add up."""
    layers: dict[str, list[str]] = {}
    for path in sites:
        layers.setdefault("/".join(path.split("/")[:2]), []).append(path)
    return [tuple(paths) for paths in layers.values()]


def _weight_sites(groups: Sequence[Group]) -> list[str]:
    return [path for group in groups if group.stage == Stage.WEIGHTS for path in group.sites]


def _group_costs(tree, group: Group, target, batch, context, base, bits) -> tuple[np.ndarray, np.ndarray]:
    rows, sizes = [np.zeros(len(FIGURES))], [_size(tree, group)]
    for candidate in group.forms:
        changed = with_form(tree, group.sites, candidate)
        added = _figures(changed, target, batch, context) - base
        share = bits if group.stage == Stage.WEIGHTS else 0
        rows.append(np.append(added, share * added[FIGURES.index("weights")]))
        sizes.append(_size(changed, group))
    return np.stack(rows), np.array(sizes)


def _size(tree, group: Group) -> float:
    """Bytes of the sites' weights and of one token's cache."""
    return sum(ir.weight_bytes(ir.get(tree, path)) for path in group.sites) + tree.cache_plan().unit_bytes


def _figures(tree, target: Target, batch: int, context: int) -> np.ndarray:
    """All of FIGURES but the last."""
    decode = Step(target=target, ops=step_ops(tree, batch=batch, context=context))
    prefill = Step(target=target, ops=step_ops(tree, batch=1, tokens=context, context=context))
    weights = ir.weight_bytes(tree)
    memory = weights + sum(held(spec, batch, context) for spec in tree.cache_plan().specs if spec is not None)
    ttft = prefill.seconds if prefill.of_peak() else None
    read = sum(op.weights + op.cache for op in decode.ops)
    return np.array([decode.seconds, ttft, memory, read, weights], np.float64)


def limits_of(slo: SLO, costs: Costs, groups: Sequence[Group]) -> tuple[Limit, ...]:
    """Bounds on figures: the objective's but for `kl`, and the target's memory. Raises SearchError for a figure that the target
    does not tell, or that no candidate changes."""
    found = []
    for bound in slo.bounds:
        if bound.name == "kl":
            continue
        figure, most = ("tpot", costs.batch / bound.value) if bound.name == "tok/s" else (bound.name, bound.value)
        if np.isnan(costs.base[FIGURES.index(figure)]):
            needs = "bandwidth" if figure == "tpot" else "bandwidth and peak of what is multiplied"
            raise SearchError(
                f"slo: {bound}: the target {costs.target} does not tell its {needs}; name another --target"
            )
        if figure == "bits" and not _weight_sites(groups):
            raise SearchError(f"slo: {bound}: no candidate rewrites weights")
        found.append(Limit(figure=figure, most=most, said=str(bound)))
    if costs.target.memory is not None:
        room = f"memory of {costs.target}, {size_text(costs.target.memory)}"
        found.append(Limit(figure="memory", most=costs.target.memory, said=room))
    return tuple(found)


def check_possible(limits: Sequence[Limit], costs: Costs) -> None:
    """Raises SearchError for the bound that the smallest choice breaks by most."""
    worst = max(limits, key=lambda limit: _ratio(limit, costs), default=None)
    if worst is not None and not worst.within(costs.of(costs.least(worst.figure))):
        raise SearchError(f"slo: {worst.said} cannot be met: {_why(worst, costs)}")


def _ratio(limit: Limit, costs: Costs) -> float:
    return costs.of(costs.least(limit.figure))[limit.figure] / limit.most


def _why(limit: Limit, costs: Costs) -> str:
    figures, ratio, target = costs.of(costs.least(limit.figure)), _ratio(limit, costs), costs.target
    at = f"with batch {costs.batch:,} and {costs.context:,} tokens of context"
    text = KINDS[limit.figure].text(figures[limit.figure])
    smallest = "the smallest recipe of the candidates"
    if limit.figure == "tpot":
        speed = f"{size_text(figures['bytes'])} a step = {text} at {size_text(target.bandwidth)}/s of {target}"
        return f"{smallest} reads {speed}, {ratio:.3g}x too slow, {at}"
    if limit.figure == "ttft":
        return f"{smallest} takes {text} for a prompt of {costs.context:,} tokens on {target}, {ratio:.3g}x too slow"
    what = {"memory": "needs", "bytes": "reads"}.get(limit.figure, "takes")
    where = f", {at}" if limit.figure in ("memory", "bytes") else ""
    return f"{smallest} {what} {text}, {ratio:.3g}x too much{where}"
