"""Which pass and which sites of a recipe cost the quality that is lost, and what to leave out to keep a budget.

Each lossy pass is left out once; then the sites of the worst are switched one by one between the model without that pass and
the whole recipe, in one compiled program; with a budget, how many of the worst must go is found by halving. What is proposed
was run. Everything runs through the ops' references, as in quality.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from optx import ir, pipeline, quality
from optx.checkpoint.source import Source
from optx.errors import QualityError
from optx.lower import Program
from optx.pipeline import Record
from optx.quality import Windows
from optx.recipe import Recipe
from optx.registry import Pass, PassOptions, Stage

KEPT = 2 << 30  # bytes of the uncompiled model's logits that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassCost:
    """A lossy pass of the recipe."""

    name: str
    sites: int
    without: float  # KL of the recipe without the pass, nats a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """A recipe within the budget."""

    recipe: Recipe
    passes: tuple[str, ...]  # that it leaves out
    sites: tuple[str, ...]  # that it leaves out of `Bisection.culprit`
    of: int  # sites that the pass rewrote
    kl: float  # measured on the recipe as it stands here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """What costs most, the worst first. KL is of the uncompiled model against the compiled one, nats a token."""

    model: str
    recipe: Recipe
    tokens: int  # scored
    kl: float  # of the whole recipe
    budget: float | None
    passes: tuple[PassCost, ...]
    culprit: str  # the pass in which sites were looked at
    sites: tuple[tuple[str, float], ...]  # (path, KL of the recipe without the pass at that site), on the first window
    first: float  # KL of the recipe on the first window
    edit: Edit | None  # None: there is no budget, or it is kept

    def to_dict(self) -> dict:
        out = dataclasses.asdict(self) | {"recipe": self.recipe.to_dict()}
        return out | {"edit": out["edit"] and out["edit"] | {"recipe": self.edit.recipe.to_dict()}}


def bisect(source: Source, recipe: Recipe, calibration: str | Path, progress: bool = False) -> Bisection:
    """Finds the pass and the sites that cost most, and, where `recipe.max_kl` is broken, a recipe that keeps it.

    calibration: a text or a file of one (`quality.windows`). Three models are in memory: the uncompiled one, the compiled one
    and that without a pass. Raises: QualityError for a recipe without a lossy pass, RequestError for a bad text.
    """
    text = quality.windows(calibration, source)
    if not _lossy(recipe):
        raise QualityError(
            f"bisect: {recipe.name} has no lossy pass ({_names(recipe) or 'no pass'}); nothing can cost quality"
        )
    run, base = _without_exact(recipe), _Uncompiled(source.load())
    boards = _boards(source, base, run, calibration, text, progress)
    ranked = sorted(boards, key=lambda board: _order(board.without))
    whole, costs = ranked[0].whole, tuple(PassCost(name=b.name, sites=len(b.paths), without=b.without) for b in ranked)
    removed: list[str] = []
    broken = recipe.max_kl is not None and not whole <= recipe.max_kl
    while broken and not ranked[0].without <= recipe.max_kl:  # not even without the whole pass
        removed.append(ranked[0].name)
        run = _drop(run, removed[-1])
        if not run.steps():
            raise QualityError(
                f"bisect: the KL is {ranked[0].without:.4g} without any pass: {source.origin.name} itself gives no numbers on "
                "this text; check its weights with `optx eval`"
            )
        ranked = sorted(
            _boards(source, base, run, calibration, text, progress), key=lambda board: _order(board.without)
        )
    board = ranked[0]
    sites = board.ranking(progress)
    edit = None
    if broken:
        out = board.fewest([path for path, _ in sites], recipe.max_kl)
        edit = _edit(
            source.tree, recipe, removed, board, out,
            lambda edited: _measured(base, _built(source, edited, calibration)[0], text),
        )  # fmt: skip
    return Bisection(
        model=source.origin.name,
        recipe=recipe,
        tokens=sum(tokens.shape[1] - 1 for tokens in text),
        kl=whole,
        budget=recipe.max_kl,
        passes=costs,
        culprit=board.name,
        sites=tuple(sites),
        first=board.kl(board.sites, text[:1]),
        edit=edit,
    )


class _Uncompiled:
    """The uncompiled model, which computes the logits of a window once while there is room for them."""

    def __init__(self, tree: nnx.Module):
        self.tree, program = tree, Program.of(tree)
        self._leaves, self._kept = program.leaves, {}
        self._run = jax.jit(lambda leaves, tokens: program.merge(leaves)(tokens)[0])

    def __call__(self, tokens) -> jax.Array:
        """int32[1, T] -> float32[T, V]."""
        key = np.asarray(tokens).tobytes()
        if key not in self._kept:
            logits = self._run(self._leaves, tokens)
            if sum(kept.nbytes for kept in self._kept.values()) + logits.nbytes > KEPT:
                return logits
            self._kept[key] = logits
        return self._kept[key]


class _Board:
    """The model without one pass, of which any sites can be switched to their form under the whole recipe."""

    def __init__(self, base: _Uncompiled, before: nnx.Module, after: nnx.Module, record: Record, paths, text: Windows):
        self.name, self.paths, self.text, self.base = record.name, tuple(paths), text, base
        step = quality.Step(base=base.tree, before=before, after=after, sites=self.paths, record=record)
        called = quality.sites_called(step, text[0])
        self.sites = tuple(path for path in called if not any(_above(other, path) for other in called))
        programs = [Program.of(tree) for tree in (before, after)]
        self.leaves = [program.leaves for program in programs]

        @jax.jit
        def run(leaves, old, chosen, tokens):
            """chosen: int32[sites], 1 for the new form."""
            before, after = (program.merge(x) for program, x in zip(programs, leaves, strict=True))
            forms = {path: (ir.get(after, path),) for path in self.sites}
            quality.switch(before, forms, dict(zip(self.sites, chosen, strict=True)))
            return quality.divergence(old, before(tokens)[0], tokens)[0]

        self._run = run
        self.whole, self.without = self.kl(self.sites), self.kl(())

    def kl(self, new: Sequence[str], text: Windows | None = None) -> float:
        """Nats a token with the sites `new` as the recipe makes them and the others as they were."""
        text, chosen = text or self.text, jnp.asarray([path in set(new) for path in self.sites], jnp.int32)
        total = sum(float(self._run(self.leaves, self.base(tokens), chosen, tokens)) for tokens in text)
        return total / sum(tokens.shape[1] - 1 for tokens in text)

    def ranking(self, progress: bool) -> list[tuple[str, float]]:
        """Sites with the KL of the recipe but for each, on the first window, the most costly first."""
        bar = tqdm(self.sites, desc="bisect", unit="site", disable=not progress)
        kl = {path: self.kl([other for other in self.sites if other != path], self.text[:1]) for path in bar}
        return sorted(kl.items(), key=lambda item: _order(item[1]))

    def fewest(self, ranked: Sequence[str], budget: float) -> list[str]:
        """The shortest beginning of `ranked` without which the KL is within the budget, but for what can be put back."""
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.kl(ranked[middle:]) <= budget else (middle + 1, high)
        out = list(ranked[:low])
        for path in reversed(out[:-1]):
            fewer = [other for other in out if other != path]
            out = fewer if self.kl([other for other in ranked if other not in fewer]) <= budget else out
        return out

    def rewritten(self, sites: Sequence[str]) -> list[str]:
        """Paths that the pass rewrote at or below the sites."""
        return [path for path in self.paths if any(path == site or _above(site, path) for site in sites)]


def _boards(
    source: Source, base: _Uncompiled, recipe: Recipe, calibration: str | Path, text: Windows, progress: bool
) -> list[_Board]:
    """One a pass of the recipe, whose passes are all lossy."""
    after, records, paths = _built(source, recipe, calibration)
    found = []
    for record in tqdm(records, desc="bisect", unit="pass", disable=not progress):
        before = _built(source, _drop(recipe, record.name), calibration)[0]
        found.append(_Board(base, before, after, record, paths[record.name], text))
    return found


def _built(
    source: Source, recipe: Recipe, calibration: str | Path
) -> tuple[nnx.Module, list[Record], Mapping[str, list[str]]]:
    """The model after the recipe, its records, and the paths that each pass rewrote."""
    recipe = dataclasses.replace(recipe, max_kl=None)
    trees, records = pipeline.run(source.tree, recipe)
    tree = ir.shallow(trees[-1])
    planned = _Planned(source=source, recipe=recipe, trees=trees, records=records)
    for prefix, block in quality.blocks(planned, calibration, measured=False):
        ir.put(tree, prefix, block)
    taken = [pipeline.matches(before, *step) for before, step in zip(trees, recipe.steps())]
    paths = [[path for path, *_ in sites if path not in r.skipped] for sites, r in zip(taken, records, strict=True)]
    return tree, records, {record.name: each for record, each in zip(records, paths, strict=True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Planned:
    """What `quality.blocks` streams."""

    source: Source
    recipe: Recipe
    trees: Sequence[nnx.Module]
    records: Sequence[Record]


def _edit(
    tree: nnx.Module, recipe: Recipe, removed: list[str], board: _Board, out: list[str], cost: Callable[[Recipe], float]
) -> Edit:
    """The recipe without passes and without the sites `out`, measured as it stands: calibrated passes see other inputs once a
    site before them is left out, so more may have to go.

    cost: KL of a recipe.
    """
    for name in removed:
        recipe = _drop(recipe, name)
    more = [path for path in board.sites if path not in out]
    while True:
        paths = board.rewritten(out)
        whole = len(paths) == len(board.paths)
        edited = _drop(recipe, board.name) if whole else _narrow(tree, recipe, board.name, paths)
        kl = cost(edited)
        if kl <= recipe.max_kl or not more:
            return Edit(recipe=edited, passes=tuple(removed), sites=tuple(paths), of=len(board.paths), kl=kl)
        out = [*out, more.pop(0)]


def _measured(base: _Uncompiled, after: nnx.Module, text: Windows) -> float:
    program = Program.of(after)

    @jax.jit
    def run(leaves, old, tokens):
        return quality.divergence(old, program.merge(leaves)(tokens)[0], tokens)[0]

    total = sum(float(run(program.leaves, base(tokens), tokens)) for tokens in text)
    return total / sum(tokens.shape[1] - 1 for tokens in text)


def _narrow(tree: nnx.Module, recipe: Recipe, name: str, paths: Sequence[str]) -> Recipe:
    """The recipe whose rules of a pass leave `paths` out; rules that are left without a site go."""
    pass_ = next(pass_ for pass_, _ in recipe.steps() if pass_.name == name)
    sites = [path for path, module in ir.walk(tree) if isinstance(module, pass_.module)]
    kept: list[PassOptions] = []
    for rule in getattr(recipe, pass_.stage):
        if type(rule) is pass_.options:
            earlier = [old for old in kept if type(old) is pass_.options]
            taken = {path for path in sites if _fits(rule, path) and not any(_fits(old, path) for old in earlier)}
            if not (left := taken & set(paths)):
                kept.append(rule)
                continue
            if left == taken:
                continue
            rule = dataclasses.replace(rule, match=_but(sorted(paths), rule.match))
        kept.append(rule)
    return dataclasses.replace(recipe, **{pass_.stage: tuple(kept)})


def _fits(rule: PassOptions, path: str) -> bool:
    return rule.match is None or re.fullmatch(rule.match, path) is not None


def _but(paths: Sequence[str], match: str | None) -> str:
    """A pattern for what `match` takes but for the paths."""
    return f"(?!({'|'.join(map(re.escape, paths))})$){'.*' if match is None else f'(?:{match})'}"


def _lossy(recipe: Recipe) -> list[Pass]:
    return [pass_ for pass_, _ in recipe.steps() if not pass_.exact]


def _names(recipe: Recipe) -> str:
    return ", ".join(pass_.name for pass_, _ in recipe.steps())


def _without_exact(recipe: Recipe) -> Recipe:
    """Sites keep their paths: exact passes cost nothing, and some join modules."""
    for pass_, _ in recipe.steps():
        recipe = _drop(recipe, pass_.name) if pass_.exact else recipe
    return recipe


def _drop(recipe: Recipe, name: str) -> Recipe:
    """The recipe without a pass."""
    options = next(pass_.options for pass_, _ in recipe.steps() if pass_.name == name)
    rules = {stage: tuple(r for r in getattr(recipe, stage) if type(r) is not options) for stage in Stage}
    return dataclasses.replace(recipe, **rules)


def _above(path: str, other: str) -> bool:
    """Whether `other` lies in the module at `path`."""
    return other.startswith(f"{path}/")


def _order(kl: float) -> float:
    """What is no number is worst."""
    return math.inf if math.isnan(kl) else kl
