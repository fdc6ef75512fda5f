"""What lossy passes cost, measured on calibration text while a model is compiled.

After each lossy pass: KL(uncompiled || after it) of the logits and top-1 agreement, and of every site that it rewrote the
relative error of its output, |y' - y| / |y| with both forms on the inputs that the site has before the pass. The recipe's
`max_kl` is a budget on the KL; `blame` switches single sites.

Everything runs through the ops' references, so that a figure is the recipe's and no kernel's. The uncompiled model stays in
memory beside the compiled one: a compile with calibration text holds both, one without it streams as ever.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from optx import evaluate, heal, ir, pipeline, registry
from optx.calibrate import Feed
from optx.errors import QualityError, RecipeError, RequestError, did_you_mean, no_such_path
from optx.lower import Program
from optx.pipeline import Quality, Record
from optx.recipe import Calibration, Recipe
from optx.registry import Axis, Site, Stage
from optx.resume import Work
from optx.watch import watch

WINDOWS = 8  # of calibration text that quality is measured on
MEASURED = Calibration(windows=WINDOWS)
SHOWN = 8  # sites that an error lists

Windows = Sequence[np.ndarray]  # int32[1, T] each, all of one length


class Planned(Protocol):
    """What is compiled: `optx.plan(model, recipe)`."""

    source: Any
    recipe: Recipe
    trees: Sequence[nnx.Module]  # abstract, the input and after each pass
    records: Sequence[Record]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The whole model with weights around one pass."""

    base: nnx.Module  # uncompiled
    before: nnx.Module
    after: nnx.Module
    sites: tuple[str, ...]  # that the pass rewrote
    record: Record


def blocks(
    planned: Planned,
    calibration: str | Path | None = None,
    progress: bool = False,
    measured: bool = True,
    work: str | Path | None = None,
) -> Iterator[tuple[str, nnx.Module]]:
    """(path, block with weights after all passes), `embed`, `layers/0`, ... one after the other.

    Without calibration text, or with `measured` False, each block is read when it is asked for and forgotten then. Else all
    blocks are read at once, the quality of each lossy pass goes into its record, and QualityError is raised after a pass that
    breaks the budget; so are they where the recipe heals. Raises RecipeError for a recipe that needs text and has none, HealError
    for what cannot be healed.

    work: a folder in which a streaming compile keeps its blocks until it has ended: one that was killed goes on from there.
    """
    source, recipe = planned.source, planned.recipe
    _check_text(recipe, calibration is not None, measured)
    heal.check_planned(planned)
    text = None if calibration is None else windows(calibration, source, recipe.calibration)
    measured = measured and text is not None
    if measured or recipe.heal:
        tree = _whole(planned, text, progress, measured)
        yield from ((prefix, ir.get(tree, prefix)) for prefix in source.segments())
        return
    lanes = 1 if pipeline.turn(recipe) is None else 2
    feed = _feed(planned, text, *(rules for _, rules in recipe.steps()), lanes=lanes)
    kept = None if work is None else Work.at(work, recipe, source.origin, text or ())
    done = kept.done() if kept else 0
    if done:
        kept.restore(planned.records, feed)
    for i, prefix in enumerate(tqdm(source.segments(), desc="compile", unit="block", disable=not progress)):
        if i < done:
            yield prefix, kept.block(i, ir.get(planned.trees[-1], prefix))
            continue
        made = (prefix, recipe, planned.trees, planned.records, feed)
        block = pipeline.apply_block(source.block(prefix), *made)  # no name holds the dense block on
        if kept:
            kept.keep(i, block, planned.records, feed)
        yield prefix, block
    if kept:
        kept.remove()


def _check_text(recipe: Recipe, given: bool, measured: bool) -> None:
    how = "give calibration=TEXT or a path (--calibration FILE of optx compile)"
    if recipe.max_kl is not None and not (given and measured):
        missing = "there is none" if not given else "measured=False leaves the measurement out"
        raise RecipeError(
            f"recipe.max_kl: {recipe.max_kl} is a budget on calibration text, and {missing}; {how}, or take max_kl out"
        )
    for pass_, rules in recipe.steps():
        for where, options in rules:
            if options.unresolved:
                raise RecipeError(
                    f"{where}: {pass_.name} leaves something to be measured; optx.compile and optx heal measure it"
                )
            if options.needs and not given:
                what = ", ".join(sorted(options.needs))
                raise RecipeError(f"{where}: {pass_.name} reads its inputs ({what}) on calibration text; {how}")


def _feed(planned: Planned, text: Windows | None, *rules: pipeline.Rules, lanes: int = 1) -> Feed | None:
    """The text on its way through the blocks, where a rule reads it."""
    return Feed(planned.trees[-1], text, lanes) if any(pipeline.needs(each) for each in rules) else None


def windows(calibration: str | Path, source, cut: Calibration = MEASURED) -> Windows:
    """Calibration text as at most `cut.windows` windows of `cut.context` tokens (less where the model's context or the text is
    shorter), each behind the model's first token where it has one, as `optx.evaluate` cuts them.

    calibration: a text; or a file of UTF-8 text, as a Path or as a string that names one. A short string of one word is a
    path, whether a file is there or not.
    Raises: RequestError for a model without a tokenizer, a file that cannot be read, a text too short to score.
    """
    tokenizer, text = source.tokenizer, _text(calibration)
    if tokenizer is None:
        raise RequestError(f"calibration: {source.origin.name} has no tokenizer, so a text cannot be scored")
    first = tokenizer.bos_id if tokenizer.add_bos else None
    context, vocab = min(cut.context, source.tree.context), source.tree.embed.table.get_value().shape[0]
    room = context - (first is not None)
    ids = tokenizer.encode(text, add_special=False)
    if ids and max(ids) >= vocab:
        raise RequestError(f"calibration: the tokenizer gave the id {max(ids)}; the model has {vocab} ids")
    found = evaluate.windows_of(ids, context, room, first)[: cut.windows]
    if not found:
        raise RequestError(f"calibration: the text has {len(ids)} tokens; at least {1 + (first is None)} needed")
    return [np.asarray([window], np.int32) for window, _ in found]


def _text(calibration: str | Path) -> str:
    if isinstance(calibration, str) and not _is_path(calibration):
        return calibration
    try:
        return Path(calibration).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"calibration: {no_such_path(calibration)}") from None
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at {error.start:,}"
        raise RequestError(f"calibration: {calibration}: not UTF-8: {got}; convert it with iconv -t UTF-8") from None
    except OSError as error:
        raise RequestError(f"calibration: {calibration}: cannot be read: {error.strerror or error}") from None


def _is_path(text: str) -> bool:
    """Whether a string names a file or, being one word, can only be meant so."""
    short = len(text.encode(errors="replace")) < 1024 and "\0" not in text
    return short and (len(text.split()) == 1 or os.path.isfile(text))  # Path.is_file raises for a long name


def _steps(planned: Planned, text: Windows | None, progress: bool) -> Iterator[Step]:
    """The model through one pass after the other; records gain their seconds and weight errors."""
    base = before = planned.source.load()
    rows = list(zip(planned.recipe.steps(), planned.records, planned.trees[1:], strict=True))
    for rules, record, plan in tqdm(rows, desc="compile", unit="pass", disable=not progress):
        if rules[0].stage == Stage.HEAL:
            after = heal.applied(planned.source, base, before, rules, record, progress)
            yield Step(base=base, before=before, after=after, sites=(), record=record)
            before = after
            continue
        after, sites, feed = ir.shallow(plan), [], _feed(planned, text, rules[1])
        for prefix in planned.source.segments():
            block, paths = pipeline.apply_pass(ir.get(before, prefix), prefix, rules, plan, record, feed)
            if feed is not None:
                feed.advance(block, prefix)
            ir.put(after, prefix, block)
            sites += paths
        yield Step(base=base, before=before, after=after, sites=tuple(sites), record=record)
        before = after


def _whole(planned: Planned, text: Windows | None, progress: bool, measured: bool) -> nnx.Module:
    """The model after all passes. Raises QualityError after the first that breaks the budget, which counts from healing on."""
    budget, spent, tree = planned.recipe.max_kl, {}, None
    unseen = {r.name for r in planned.records if registry.PASSES[r.name].axis == Axis.DROP}
    if budget is not None and unseen:
        raise QualityError(
            f"recipe.max_kl: {', '.join(unseen)} throws cached tokens away, which one forward does not show; leave max_kl out, "
            "and measure with `optx eval --paged`"
        )
    unhealed = bool(planned.recipe.heal)
    for step in _steps(planned, text, progress):
        tree, unhealed = step.after, unhealed and step.record.stage != Stage.HEAL
        if not measured or step.record.exact or step.record.name in unseen:
            continue
        step = dataclasses.replace(step, sites=sites_called(step, text[0]))
        step.record.quality = measure(step, text[:WINDOWS])
        spent[step.record.name] = step.record.quality.kl
        if budget is not None and not unhealed and not step.record.quality.kl <= budget:  # also where it is no number
            raise _broken(budget, spent, step, _blame(step, text[:1], "applied"))
    return planned.source.load() if tree is None else tree


def _broken(budget: float, spent: dict[str, float], step: Step, sites: list[tuple[str, float]]) -> QualityError:
    name = step.record.name
    after = ", ".join(f"{pass_} {kl:.4g}" for pass_, kl in spent.items())
    more = f" and {len(sites) - SHOWN} more" if len(sites) > SHOWN else ""
    worst = ", ".join(f"{path} {kl:.4g}" for path, kl in sites[:SHOWN])
    message = (
        f"recipe.max_kl: {name} brings the KL to {spent[name]:.4g} nats a token; allowed: {budget:.4g}; "
        f"KL after each lossy pass: {after}; "
        f"sites by damage (KL with the change of that site alone, on the first window): {worst}{more}; "
        f"keep the first of them out of {name} with `match`, give them a rule that costs less, or raise max_kl"
    )
    return QualityError(message, kl=spent, sites=sites)


def measure(step: Step, text: Windows) -> Quality:
    """KL and top-1 agreement of `step.after` against `step.base`, and the relative output error of every site.

    Logits of one window of three models are in memory at a time, float32[T, V] each.
    """
    programs = [Program.of(tree) for tree in (step.base, step.before, step.after)]
    leaves = [program.leaves for program in programs]

    @jax.jit
    def run(leaves, tokens):
        base, before, after = (program.merge(x) for program, x in zip(programs, leaves, strict=True))
        sums: dict[str, jax.Array] = {}

        def compare(path, call, *args, **kwargs):
            y = call(*args, **kwargs)
            old, new = (_output(out).astype(jnp.float32) for out in (y, ir.get(after, path)(*args, **kwargs)))
            sums[path] = sums.get(path, 0) + jnp.stack([jnp.sum((new - old) ** 2), jnp.sum(old**2)])
            return y

        watch(before, step.sites, compare)
        before(tokens)
        return divergence(base(tokens)[0], after(tokens)[0], tokens), sums

    count, total, squares = 0, np.zeros(2), {path: np.zeros(2) for path in step.sites}
    for tokens in text:
        differs, sums = run(leaves, tokens)
        total += np.asarray(differs, np.float64)
        squares = {path: squares[path] + np.asarray(sums[path], np.float64) for path in squares}
        count += tokens.shape[1] - 1
    tiny = np.finfo(np.float64).tiny
    errors = {path: float(np.sqrt(changed / max(whole, tiny))) for path, (changed, whole) in sorted(squares.items())}
    return Quality(kl=float(total[0]) / count, top1=float(total[1]) / count, tokens=count, errors=errors)


def blame(
    planned: Planned,
    calibration: str | Path,
    *,
    step: str | None = None,
    how: Literal["applied", "undone"] = "applied",
) -> list[tuple[str, float]]:
    """Sites of one lossy pass as (path, KL against the uncompiled model in nats a token), the worst first.

    planned: `optx.plan(model, recipe)`. step: the pass; None where the recipe has one lossy pass only. how: "applied", the KL
    after the passes before it and the change of that site alone (the largest is the worst); "undone", the KL after the whole
    pass but for that site (the smallest is the worst). One program is compiled, and it runs once a site and window. A site
    that the forward does not call by itself is switched with the module that it lies in. What a switched mixer leaves in the
    cache for later layers is switched with it where both forms leave the same, else it is the old form's.
    Raises: QualityError for a pass that is not a lossy one of the recipe, and what `optx.compile` raises.
    """
    lossy = [record.name for record in planned.records if not record.exact]
    if how not in ("applied", "undone"):
        raise QualityError(f"blame: how={how!r}; allowed: 'applied', 'undone'")
    if step is None and len(lossy) != 1:
        raise QualityError(
            f"blame: the recipe has {len(lossy)} lossy passes; name one: step={' or '.join(lossy) or '...'}"
        )
    if step is not None and step not in lossy:
        raise QualityError(f"blame: step={step!r} is no lossy pass of the recipe{did_you_mean(step, lossy)}")
    fresh = [dataclasses.replace(record, errors={}) for record in planned.records]
    text = windows(calibration, planned.source, planned.recipe.calibration)
    found = next(s for s in _steps(_Again(planned, fresh), text, False) if s.record.name == (step or lossy[0]))
    return _blame(dataclasses.replace(found, sites=sites_called(found, text[0])), text[:WINDOWS], how)


class _Again:
    """A plan compiled once more: the records of the first time stay as they are."""

    def __init__(self, planned: Planned, records: Sequence[Record]):
        self.source, self.recipe, self.trees, self.records = planned.source, planned.recipe, planned.trees, records


def _blame(step: Step, text: Windows, how: Literal["applied", "undone"]) -> list[tuple[str, float]]:
    programs = [Program.of(tree) for tree in (step.base, step.before, step.after)]
    leaves = [program.leaves for program in programs]

    @jax.jit
    def run(leaves, chosen, tokens):
        """chosen: bool[sites], which have their new form."""
        base, before, after = (program.merge(x) for program, x in zip(programs, leaves, strict=True))
        forms = {path: (ir.get(after, path),) for path in step.sites}
        switch(before, forms, dict(zip(step.sites, chosen.astype(jnp.int32), strict=True)))
        return divergence(base(tokens)[0], before(tokens)[0], tokens)[0]

    one = np.eye(len(step.sites), dtype=bool)
    count = sum(tokens.shape[1] - 1 for tokens in text)
    kl = {
        path: sum(float(run(leaves, row, tokens)) for tokens in text) / count
        for path, row in zip(step.sites, one if how == "applied" else ~one, strict=True)
    }
    return sorted(kl.items(), key=lambda item: item[1], reverse=how == "applied")


def switch(model: nnx.Module, forms: Mapping[str, Sequence[nnx.Module]], chosen: Mapping[str, jax.Array]) -> None:
    """The module at each path runs as one of its forms, in place: for a tree that the caller owns, while it is traced.

    chosen: int32[] by path, 0 for the module as it is, i for form i - 1. One program then runs every combination. What a mixer
    leaves in the cache for later layers is switched with it where all forms leave the same, else it is the old form's.
    """

    def one(path, call, *args, **kwargs):
        runs = [functools.partial(run, *args, **kwargs) for run in (call, *forms[path])]
        if all(jax.eval_shape(run) == jax.eval_shape(runs[0]) for run in runs[1:]):
            return jax.lax.switch(chosen[path], runs)
        y = jax.lax.switch(chosen[path], [lambda run=run: _output(run()) for run in runs])
        return (y, *runs[0]()[1:])

    watch(model, list(forms), one)


def divergence(base: jax.Array, logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[sum of KL(base || logits), agreements of the most likely token] over tokens int32[1, T] but for the first, both logits
    float32[T, V]."""
    weight = jnp.ones(tokens.shape[1], jnp.float32)
    return jnp.stack(evaluate.compare(logits, base, tokens[0], weight)[1:])


def _output(y):
    """What a module says: a mixer's output without its pool."""
    return y[0] if isinstance(y, tuple) else y


def sites_called(step: Step, tokens: np.ndarray) -> tuple[str, ...]:
    """The step's sites that the forward calls; for one that it does not, the nearest module around it that it does. Without
    those of layers that only now read another's cache: called as before, they have nothing to read."""
    program, plans = Program.of(step.before), [tree.cache_plan() for tree in (step.before, step.after)]
    readers = {i for i in range(len(plans[0].specs)) if plans[0].owner(i) != plans[1].owner(i)}

    def called(paths: set[str]) -> set[str]:
        met = set()

        def note(path, call, *args, **kwargs):
            met.add(path)
            return call(*args, **kwargs)

        def forward(leaves, tokens):
            model = program.merge(leaves)
            watch(model, sorted(paths), note)
            return model(tokens)

        jax.eval_shape(forward, program.leaves, tokens)
        return met

    paths = {path for path in step.sites if Site(path=path, layers=len(step.before.layers)).layer not in readers}
    while paths - (met := called(paths)):
        paths = met | {path.rpartition("/")[0] for path in paths - met} - {""}
    order = {path: i for i, (path, _) in enumerate(ir.walk(step.before))}
    return tuple(sorted(paths, key=order.__getitem__))
