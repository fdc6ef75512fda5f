"""Recipes under objectives: per-site formats and passes chosen from measured sensitivities and the cost model.

1. On shapes: groups of sites, the forms that each can take, what each form adds to bytes and time (`search_space`,
   `search_cost`). An objective that the smallest recipe misses is refused here, before a weight is read.
2. On calibration text: the KL of each group alone in each form (`search_meter`), kept in a file and resumed from it.
3. An integer program (`search_solve`) takes for each budget the forms of the least predicted KL: the sum over the groups, a first
   order that layer-wise quantization is well known to follow while errors are small (Malinovskii et al. 2024, arXiv:2411.17525).
4. The recipes of the front are compiled and measured. Where the winner's KL is far from the sum, forms next to the chosen ones
   are measured around it and the program is solved once more: the better of the two is kept.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from optx import api, quality
from optx import target as targets
from optx.checkpoint.source import Source
from optx.errors import RequestError, SearchError
from optx.quality import Windows
from optx.recipe import Calibration, Recipe
from optx.search_cost import Costs, Limit, check_possible, costs_of, limits_of
from optx.search_meter import NEVER, Ledger, Meter, Sensitivities, name_of, sensitivities
from optx.search_solve import budgets, solve
from optx.search_space import LADDER, Choice, Group, candidates_of, groups_of, recipe_of
from optx.slo import SLO
from optx.target import Target

ADDITIVE = 1.25  # measured over predicted KL, either way, beyond which the winner is refined
TRIES = 4  # budgets on the predicted KL until the measured one keeps the bound
POINTS, WINDOWS = 8, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A recipe of the front, or a uniform one to hold it against."""

    recipe: Recipe
    figures: dict[str, float]  # of search_cost.FIGURES; NaN where the target does not tell
    predicted: float  # KL, nats a token: the sum of its groups' alone; infinite where one of them was not measured
    measured: float  # KL of the compiled recipe on the calibration text

    @property
    def name(self) -> str:
        return self.recipe.name

    def to_dict(self) -> dict:
        figures = {name: None if np.isnan(value) else value for name, value in self.figures.items()}
        predicted = None if np.isinf(self.predicted) else self.predicted
        return {"name": self.name, **figures, "kl_predicted": predicted, "kl_measured": self.measured}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    model: str
    target: Target
    slo: SLO
    context: int
    figure: str  # of search_cost.FIGURES, along which the front runs
    front: tuple[Point, ...]  # the smallest first
    uniform: tuple[Point, ...]  # one candidate at all sites of its stage
    winner: Point | None  # None: no point keeps the bound on the KL
    tokens: int  # scored, for each KL
    limits: tuple[Limit, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        return {
            "model": self.model,
            "target": self.target.name,
            "slo": str(self.slo),
            "batch": self.slo.batch,
            "context": self.context,
            "along": self.figure,
            "tokens": self.tokens,
            "front": [point.to_dict() for point in self.front],
            "uniform": [point.to_dict() for point in self.uniform],
            "winner": self.winner and self.winner.to_dict() | {"recipe": self.winner.recipe.to_dict()},
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """All that is known on shapes."""

    source: Source
    target: Target
    slo: SLO
    groups: tuple[Group, ...]
    costs: Costs
    limits: tuple[Limit, ...]
    calibration: Calibration  # of the candidates

    @property
    def along(self) -> str:
        """The figure that the objective bounds first; else the bytes of a step."""
        names = [limit.figure for limit in self.limits]
        return names[0] if self.asked else "bytes"

    @property
    def asked(self) -> bool:
        """Whether the objective bounds a figure, and not the KL alone."""
        return any(bound.name != "kl" for bound in self.slo.bounds)

    def recipe(self, choice: Choice, name: str, description: str = "") -> Recipe:
        recipe = recipe_of(self.groups, choice, name, self.source.tree, description)
        return dataclasses.replace(recipe, calibration=self.calibration)


def space_of(
    model, slo: SLO, target: str | Target = "auto", candidates: Recipe = LADDER, sites: str = "layer+projection"
) -> Space:
    """Reads no weights. Raises SearchError for an objective that no recipe of the candidates meets."""
    source = api.as_source(model)
    place = target if isinstance(target, Target) else targets.get(target)
    if source.recipe is not None:
        raise SearchError(
            f"search: {source.origin.name} was compiled with {source.recipe.name!r}; search the original model"
        )
    tree = source.tree
    context = slo.context or tree.context
    if context > tree.context:
        raise SearchError(
            f"slo: ctx={context:,} cannot be met: {source.origin.name} has a context of {tree.context:,} tokens"
        )
    groups = groups_of(tree, candidates_of(candidates), sites)
    costs = costs_of(tree, groups, place, slo.batch, context)
    limits = limits_of(slo, costs, groups)
    check_possible(limits, costs)
    return Space(
        source=source,
        target=place,
        slo=slo,
        groups=groups,
        costs=costs,
        limits=limits,
        calibration=candidates.calibration,
    )


def search(
    model,
    slo: SLO,
    target: str | Target = "auto",
    *,
    calibration: str | Path | None,
    out: str | Path | None = None,
    candidates: Recipe = LADDER,
    sites: str = "layer+projection",
    points: int = POINTS,
    windows: int = WINDOWS,
    measured: int | None = None,
    refine: bool = True,
    progress: bool = False,
) -> Found:
    """The front of recipes and the winner: of the least KL within the bounds; with a bound on the KL alone, of the fewest bytes a
    step that keeps it.

    calibration: text or a file of one, of which `windows` windows of up to 512 tokens are read. out: a folder in which figures
    are kept, and from which an interrupted search goes on. candidates: a recipe whose rules are taken as candidates. sites: one
    of `search_space.GRANULARITIES`. points: budgets along the front. measured: forms a group that are run on the text, the others
    following from their errors; None: all. refine: measure around a winner whose KL is far from predicted.
    Raises: SearchError for an objective that cannot be met on shapes and for a config without weights, RecipeError for candidates
    that fit nowhere, RequestError for a model or text that cannot be scored.
    """
    space = space_of(model, slo, target, candidates, sites)
    source = space.source
    if not source.origin.bytes:
        raise SearchError(
            f"search: {source.origin.name} is a config without weights, and sensitivities are measured on weights; give a "
            "checkpoint, or `optx plan` for what recipes cost on shapes"
        )
    if calibration is None:
        raise RequestError(
            "search: sensitivities are measured on a text; give calibration=TEXT or a path (--calibration FILE of optx search)"
        )
    text = quality.windows(calibration, source)[:windows]
    ledger = Ledger(_ledger_path(out), _facts(source, text))
    whole = quality.windows(calibration, source, candidates.calibration)
    meter = Meter(source.load(), space.groups, text, whole)
    found = sensitivities(meter, space.costs.sizes, ledger, measured=measured, progress=progress)
    run = _Run(space=space, meter=meter, ledger=ledger, found=found, calibration=calibration, progress=progress)
    notes = run.winner(refine)
    choices = list(dict.fromkeys([*run.front(points), *run.tried]))
    choices.sort(key=lambda choice: space.costs.of(choice)[space.along])
    front = [
        run.point(choice, f"point{i}") for i, choice in enumerate(tqdm(choices, desc="front", disable=not progress), 1)
    ]
    return Found(
        model=source.origin.name,
        target=space.target,
        slo=slo,
        context=space.costs.context,
        figure=space.along,
        front=tuple(front),
        uniform=tuple(run.uniform()),
        winner=_best(space, front),
        tokens=sum(tokens.shape[1] - 1 for tokens in text),
        limits=space.limits,
        notes=tuple(notes),
    )


def _ledger_path(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out) / "sensitivities.json"


def _facts(source: Source, text: Windows) -> dict[str, object]:
    """What a measured figure depends on besides the form."""
    read = hashlib.sha256(b"".join(tokens.tobytes() for tokens in text)).hexdigest()
    shape = [len(text), int(text[0].shape[1])]
    origin = {"model": source.origin.name, "bytes": source.origin.bytes, "dtype": source.origin.dtype}
    return {**origin, "windows": shape, "text": read[:16]}


def _best(space: Space, front: Sequence[Point]) -> Point | None:
    most = space.slo.get("kl") or NEVER
    kept = [p for p in front if p.measured <= most and all(limit.within(p.figures) for limit in space.limits)]
    order = (
        (lambda p: (p.measured, p.figures["bytes"])) if space.asked else (lambda p: (p.figures["bytes"], p.measured))
    )
    return min(kept, key=order, default=None)


@dataclasses.dataclass(kw_only=True)
class _Run:
    """A search with weights in memory."""

    space: Space
    meter: Meter
    ledger: Ledger
    found: Sensitivities
    calibration: str | Path
    progress: bool
    tried: list[Choice] = dataclasses.field(default_factory=list)  # for the winner

    def front(self, points: int) -> list[Choice]:
        """The best choice for each of some budgets, whatever the objective says of the figure along which they run."""
        space = self.space
        others = [limit for limit in space.limits if limit.figure != space.along]
        swept = [Limit(figure=space.along, most=most, said="") for most in budgets(space.costs, space.along, points)]
        choices = [solve(self.found, space.costs, [*others, limit]) for limit in swept]
        return [choice for choice in choices if choice is not None]

    def winner(self, refine: bool) -> list[str]:
        """Tries what may win; notes on what was met."""
        if not self.space.asked:
            self._within_kl()
            return []
        choice = solve(self.found, self.space.costs, self.space.limits)
        if choice is None:
            said = " and ".join(limit.said for limit in self.space.limits)
            raise SearchError(f"slo: no recipe of the candidates keeps {said} at once, though one keeps each of them")
        self.tried.append(choice)
        return self._refined(choice) if refine else []

    def _within_kl(self) -> None:
        """The fewest bytes whose measured KL keeps the bound, by tighter bounds on the predicted one."""
        bound = most = self.space.slo.get("kl")
        for _ in range(TRIES):
            choice = solve(self.found, self.space.costs, self.space.limits, most_kl=most, least="bytes")
            if choice is None:
                return
            self.tried.append(choice)
            measured = self.compiled(choice)
            if measured <= bound:
                return
            most *= 0.9 * bound / measured

    def _refined(self, choice: Choice) -> list[str]:
        """Tries the choice that is best by figures measured around `choice`, where the sum over groups is far off."""
        predicted, measured = self.found.of(choice), self.compiled(choice)
        if predicted / ADDITIVE <= measured <= predicted * ADDITIVE:
            return []
        again = solve(self._around(choice), self.space.costs, self.space.limits)
        met = f"the KL of the best choice by the sum over groups was predicted {predicted:.4g} and measured {measured:.4g}"
        if again is None or again == choice:
            return [f"{met}; by figures measured around it, it stays the best"]
        self.tried.append(again)
        return [f"{met}; the best by figures measured around it has {self.compiled(again):.4g}"]

    def _around(self, choice: Choice) -> Sensitivities:
        """What a step to the next smaller and the next larger form of one group adds to the KL of `choice`."""
        rows = [np.full_like(row, NEVER) for row in self.found.kl]
        steps = []
        for g, (row, sizes) in enumerate(zip(self.found.kl, self.space.costs.sizes, strict=True)):
            rows[g][choice[g]] = 0
            order = sorted(np.flatnonzero(np.isfinite(row)), key=lambda index: sizes[index])
            at = order.index(choice[g])
            steps += [(g, int(index)) for index in order[max(at - 1, 0) : at + 2] if index != choice[g]]
        here = self.kl(choice)
        for g, index in tqdm(steps, desc="around the winner", unit="form", disable=not self.progress):
            rows[g][index] = self.kl((*choice[:g], index, *choice[g + 1 :])) - here
        return Sensitivities(kl=tuple(rows))

    def uniform(self) -> list[Point]:
        """Each candidate that fits all groups of its stage, and nothing else."""
        points, groups = [], self.space.groups
        for candidate in dict.fromkeys(form for group in groups for form in group.forms):
            if any(candidate not in g.forms for g in groups if g.stage == candidate.pass_.stage):
                continue
            choice = tuple(1 + g.forms.index(candidate) if candidate in g.forms else 0 for g in groups)
            points.append(self._point(choice, self.space.recipe(choice, candidate.label), self.kl(choice)))
        return sorted(points, key=lambda point: point.figures[self.space.along])

    def kl(self, choice: Choice) -> float:
        return self.ledger.get(name_of(self.space.groups, choice), functools.partial(self.meter.kl, choice))

    def compiled(self, choice: Choice) -> float:
        """KL of the compiled recipe on this machine."""
        recipe = self.space.recipe(choice, "tried")
        measure = functools.partial(
            compiled_kl, self.space.source, recipe, self.meter.text, self.meter.base, self.calibration
        )
        return self.ledger.get("compiled " + name_of(self.space.groups, choice), measure)

    def point(self, choice: Choice, name: str) -> Point:
        measured, slo = self.compiled(choice), self.space.slo
        about = f"Found for {self.space.source.origin.name} on {self.space.target} under {slo}: KL {measured:.4g} nats a token."
        return self._point(choice, self.space.recipe(choice, name, about), measured)

    def _point(self, choice: Choice, recipe: Recipe, measured: float) -> Point:
        figures, predicted = self.space.costs.of(choice), self.found.of(choice)
        return Point(recipe=recipe, figures=figures, predicted=predicted, measured=measured)


def compiled_kl(
    source: Source, recipe: Recipe, text: Windows, base: Sequence[jax.Array], calibration: str | Path | None = None
) -> float:
    """KL(base || the model compiled with the recipe) on this machine, nats a token. base: logits float32[T, V] of each window;
    calibration: what calibrated passes read."""
    needs = any(options.needs for _, rules in recipe.steps() for _, options in rules)
    program = api.compile(source, recipe, calibration=calibration if needs else None, measured=False).program
    total = 0.0
    for tokens, logits in zip(text, base, strict=True):
        got = program.forward(program.leaves, tokens, np.array([tokens.shape[1]], np.int32))[0]
        total += float(quality.divergence(logits, got, tokens)[0])
    return total / sum(tokens.shape[1] - 1 for tokens in text)
