"""One form for each group, the least KL within limits: a multiple-choice knapsack, solved as an integer program."""

from collections.abc import Sequence

import numpy as np

from optx.search_cost import FIGURES, Costs, Limit
from optx.search_meter import Sensitivities
from optx.search_space import Choice

SECONDS = 60.0  # for one program; far more than the hundreds of groups of a model need
TIE = 1e-9  # how little bytes weigh in the objective: of choices of equal KL the smallest is taken


def solve(
    found: Sensitivities,
    costs: Costs,
    limits: Sequence[Limit],
    *,
    most_kl: float | None = None,
    least: str | None = None,
) -> Choice | None:
    """The choice of least predicted KL within `limits`; None where there is none.

    most_kl: bound on the predicted KL. least: minimise this figure instead of the KL.

        min sum_g,f kl[g, f] x[g, f]   s.t.   sum_f x[g, f] = 1,   base + sum_g,f added[g, f] x[g, f] <= most,   x in {0, 1}
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    kl, added = np.concatenate(found.kl), np.concatenate(costs.added)
    usable = np.isfinite(kl)
    kl = np.where(usable, kl, 0)
    rows = [_row(added[:, FIGURES.index(limit.figure)], _base(costs, limit.figure), limit.most) for limit in limits]
    rows += [] if most_kl is None else [_row(kl, 0.0, most_kl)]
    counts = [len(row) for row in found.kl]
    once = csr_array((np.ones(len(kl)), (np.repeat(np.arange(len(counts)), counts), np.arange(len(kl)))))
    constraints = [LinearConstraint(once, 1, 1), *(LinearConstraint(row[None], -np.inf, room) for row, room in rows)]
    aim = kl if least is None else added[:, FIGURES.index(least)]
    size = added[:, FIGURES.index("weights")]
    aim = aim / max(np.abs(aim).max(), 1e-300) + TIE * size / max(np.abs(size).max(), 1)
    answer = milp(
        aim,
        constraints=constraints,
        integrality=np.ones_like(aim),
        bounds=Bounds(0, usable.astype(float)),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-6},
    )
    if answer.x is None:
        return None
    return tuple(int(np.argmax(part)) for part in np.split(answer.x, np.cumsum(counts)[:-1]))


def _base(costs: Costs, figure: str) -> float:
    return float(costs.base[FIGURES.index(figure)])


def _row(weights: np.ndarray, base: float, most: float) -> tuple[np.ndarray, float]:
    """weights @ x <= most - base, scaled so that the solver's tolerance is relative to `most`."""
    return weights / most, (most - base) / most


def budgets(costs: Costs, figure: str, count: int) -> list[float]:
    """`count` values of a figure from its smallest to that of the model as it is, evenly spaced by ratio."""
    low, high = costs.of(costs.least(figure))[figure], _base(costs, figure)
    return [float(value) for value in np.geomspace(low, high, count)]
