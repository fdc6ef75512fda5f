"""`optx bench retrieval`: what a model finds again in a long prompt, under each of several recipes.

A grid of lengths and depths with some prompts each, the same for all recipes, is answered by the paged engine; the uncompiled
model comes first. Every cell is kept in a file as soon as it is known, so that a run that was killed goes on.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

import optx
from optx import api, ir, kept
from optx.ablate import NONE, REFUSALS
from optx.ablate_config import content
from optx.bench.retrieval_table import Cell, Row
from optx.bench.retrieval_tasks import DIGITS, NEEDLE, QUESTION, Forced, Maker, Prompt, Setting, right
from optx.checkpoint.source import Source
from optx.engine.engine import Engine
from optx.engine.request import Request, Sampling
from optx.errors import RecipeError, RequestError
from optx.recipe import Recipe

SPARE = 2  # tokens of an answer beyond the number's

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What is asked of every recipe."""

    setting: Setting
    lengths: tuple[int, ...]  # tokens of a prompt, all of it
    depths: tuple[float, ...]  # of the needle in the filler, 0: its start, 1: its end
    samples: int = 4  # prompts a cell
    rows: int = 8  # of the engine; a prompt takes two

    def __post_init__(self):
        least = {"lengths": min(self.lengths, default=0), "depths": len(self.depths), "samples": self.samples}
        for name, value in least.items():
            if value < 1:
                raise RequestError(f"retrieval.{name}: got {getattr(self, name)}; allowed: at least 1")
        if self.rows < 2:
            raise RequestError(f"retrieval.rows: got {self.rows}; allowed: at least 2, a prompt takes two")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of one recipe."""

    recipe: Recipe
    length: int
    depth: float
    inputs: dict  # all that determines it

    @functools.cached_property
    def key(self) -> str:
        return kept.key(self.inputs)


def run(
    model: str,
    recipes: Sequence[Recipe],
    grid: Grid,
    out: Path,
    *,
    weights: str = "dense",
    dtype: str | None = None,
    calibration: str | None = None,
    fresh: bool = False,
    say: Say = print,
) -> list[Row]:
    """A row for the uncompiled model and for each recipe; cells are kept in `out`/results. fresh: nothing kept is used.

    Raises: CheckpointError for a model that cannot be had, RequestError for lengths that it has no room for, RecipeError for two
    recipes of one name. A recipe that the model refuses is a row with the reason.
    """
    source = api.load(model, weights, dtype)
    maker = Maker(grid.setting, source.tokenizer)
    asked = _prompts(maker, grid, source)
    folder = Path(out) / "results"
    folder.mkdir(parents=True, exist_ok=True)
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"retrieval: two recipes are called {twice!r}; give each a name of its own")
    bench, rows = Workbench(source, calibration), []
    for recipe in (NONE, *recipes):
        jobs = [
            Job(
                recipe=recipe,
                length=n,
                depth=d,
                inputs=_inputs(model, weights, source, grid, recipe, calibration, n, d),
            )
            for n in grid.lengths
            for d in grid.depths
        ]
        found = (
            {} if fresh else {job.key: cell for job in jobs if (cell := kept.read(folder, job.key, Cell)) is not None}
        )
        if found:
            say(f"{recipe.name}: {len(found)} of {len(jobs)} cells kept from an earlier run, {folder}")
        missing = [job for job in jobs if job.key not in found]
        try:
            for job, cell in bench.cells(recipe, missing, asked, grid, maker) if missing else ():
                kept.write(folder, job.key, cell, job.inputs)
                found[job.key] = cell
                say(f"{recipe.name}: {cell.line()}")
        except REFUSALS as error:
            if recipe is NONE:
                raise
            rows.append(Row(recipe=recipe.name, steps=recipe.to_dict(), refused=f"{type(error).__name__}: {error}"))
            say(f"{recipe.name}: refused: {error}")
            continue
        rows.append(Row(recipe=recipe.name, steps=recipe.to_dict(), cells=tuple(found[job.key] for job in jobs)))
    return rows


def _prompts(maker: Maker, grid: Grid, source: Source) -> dict[tuple[int, float], list[Prompt]]:
    """All prompts by cell, made before a weight is read."""
    room = source.tree.context - maker.answer_tokens() - SPARE
    if max(grid.lengths) > room:
        told = f"the context is {source.tree.context} and an answer takes {source.tree.context - room} tokens"
        raise RequestError(f"retrieval.length: got {max(grid.lengths)}; {told}; allowed: at most {room}")
    return {(n, d): [maker.prompt(n, d, i) for i in range(grid.samples)] for n in grid.lengths for d in grid.depths}


def _inputs(model, weights, source: Source, grid: Grid, recipe: Recipe, calibration, length, depth) -> dict:
    """All that determines a cell; of the machine, what its speed is of."""
    setting = grid.setting
    return {
        "versions": {"optx": optx.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "model": [kept.model_files(model), weights, source.origin.dtype],
        "recipe": content(recipe),
        "calibration": None if calibration is None or not recipe.steps() else kept.digest(calibration),
        "task": [setting.task, setting.keys if setting.task == "multikey" else 1, setting.seed, NEEDLE, QUESTION],
        "text": None if setting.text is None else kept.digest(setting.text),
        "cell": [length, depth, grid.samples, grid.rows],
    }


class Workbench:
    """One model whose weights are read once, compiled with one recipe at a time."""

    def __init__(self, source: Source, calibration: str | None):
        self._unread, self.calibration = source, calibration

    @functools.cached_property
    def source(self) -> Source:
        tree = self._unread.load()
        values = {path: variable.get_value() for path, variable in ir.params(tree).items()}
        return dataclasses.replace(self._unread, read=values.__getitem__)

    def cells(self, recipe: Recipe, jobs: Sequence[Job], asked, grid: Grid, maker: Maker) -> Iterator[tuple[Job, Cell]]:
        """Cells as they are known, by length, each from an engine that is warm."""
        text = self.calibration if recipe.steps() else None
        compiled = api.compile(self.source, recipe, calibration=text, measured=False)
        most = maker.answer_tokens() + SPARE
        ways = Sampling(max_tokens=most), Sampling(max_tokens=most, logprobs=0, grammar=Forced(()), ignore_eos=True)
        for length in dict.fromkeys(job.length for job in jobs):
            # Prompts share nothing, and some caches cannot share: no prefix cache.
            engine = compiled.engine(rows=grid.rows, context=length + most, prefix_cache=False)
            engine.warm_up(*ways)
            for job in (job for job in jobs if job.length == length):
                yield job, measure(engine, maker, asked[job.length, job.depth], ways, job.length, job.depth)


def measure(
    engine: Engine, maker: Maker, prompts: Sequence[Prompt], ways: tuple[Sampling, Sampling], length: int, depth: float
) -> Cell:
    """Answers of one cell's prompts, several at once. Each prompt is computed once for two answers: the model's own, greedy, and
    the right one, forced on it for its log-probability. Pages are the fewest that a prompt's row holds once it answers:
    policies of eviction cut it after its first token."""
    began, pairs = time.perf_counter(), []
    for prompt in prompts:
        forced = dataclasses.replace(ways[1], grammar=Forced(prompt.answer))
        pairs.append(engine.add_group(prompt.ids, [ways[0], forced]))
    held: dict[int, tuple[int, float]] = {}
    while not engine.idle:
        for request, _ in engine.step():
            if request.finish is None:
                pages, size = engine.held(request)
                fewest, least = held.get(request.id, (pages, size))
                held[request.id] = min(pages, fewest), min(size, least)
    seconds = time.perf_counter() - began
    answers = [_text(maker, engine, free) for free, _ in pairs]
    counts = [held.get(forced.id) or held[free.id] for free, forced in pairs]
    return Cell(
        length=length,
        depth=depth,
        numbers=tuple(prompt.number for prompt in prompts),
        answers=tuple(answers),
        score=statistics.fmean(right(a, prompt.number) for a, prompt in zip(answers, prompts, strict=True)),
        logprob=statistics.fmean(sum(one.chosen for one in forced.logprobs) / DIGITS for _, forced in pairs),
        pages=statistics.fmean(pages for pages, _ in counts),
        bytes=statistics.fmean(size for _, size in counts),
        tokens=sum(len(free.prompt) + len(free.output) + len(forced.output) for free, forced in pairs),
        seconds=seconds,
    )


def _text(maker: Maker, engine: Engine, request: Request) -> str:
    return maker.tokenizer.decode([token for token in request.output if token not in engine.eos_ids])
