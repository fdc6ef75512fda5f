"""Runs passes over a tree: match sites by path, rewrite out of place, verify, count, time, cost, dump.

The pipeline is `run` on shapes (a plan), then `apply_block` on each block of weights as it streams in; both go through
`rewrite`. Passes know nothing of matching, verification, dumps or cost.
"""

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from flax import nnx

from optx import ir, tensor, verify
from optx.errors import PassError, RecipeError, UsageError, VerifyError
from optx.recipe import Recipe
from optx.registry import Noted, Pass, PassOptions, Site, Skipped
from optx.tensor import is_qtensor

THREADS = 8  # of BLAS in a pass: decompositions of a head's size are slower on more
Rules = tuple[tuple[str, PassOptions], ...]  # (place in the recipe, options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """What the model lost up to and with a pass, on calibration text (quality.py measures it)."""

    kl: float  # mean KL(uncompiled || after the pass), nats a token
    top1: float  # share of tokens whose most likely next token is the uncompiled model's
    tokens: int  # scored
    errors: dict[str, float]  # site -> |y' - y| / |y| of its output, both on the inputs it has before the pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Healing:
    """What training has won back, on sequences that it did not see (heal.py measures it)."""

    kl: tuple[float, float]  # mean KL(uncompiled || converted), nats a token: before, after
    perplexity: tuple[float, float, float]  # of the uncompiled model; of the converted one before, after
    steps: int
    tokens: int  # trained on, repeated ones among them
    seconds: float  # of training
    moved: int  # numbers that were trained
    weight_bytes: tuple[int, int]  # of the uncompiled model, of the converted one
    kv_bytes: tuple[float, float]  # of one sequence of the model's context
    folder: str  # that holds log.jsonl and curves.png


@dataclasses.dataclass(kw_only=True)
class Record:
    """What one pass did: filled on shapes by the plan, `seconds` and `errors` added by the compile."""

    name: str
    stage: str
    axis: str
    exact: bool
    sites: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> reason
    weight_bytes: tuple[int, int] = (0, 0)  # before, after
    cache_bytes: tuple[float, float] = (0, 0)  # a token (plus a row for states), before, after
    seconds: float = 0.0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # path -> |W' - W| / |W|
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> what the pass has to say of the site
    quality: Quality | None = None  # of a lossy pass where the compile was given calibration text
    healing: Healing | None = None  # of a pass that trains
    needs_healing: bool = False
    # Before and after it, on shapes.
    trees: tuple[nnx.Module, nnx.Module] | None = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def diff(self) -> str:
        """What it changed, line by line; made when it is first read."""
        return "" if self.trees is None else ir.diff(*self.trees)


class Instrument:
    """Watches a plan; subclass what is needed."""

    def before_pass(self, pass_: Pass, rules: Rules, before: nnx.Module) -> None:
        """Called before a pass runs on shapes; what it raises stops the plan."""

    def after_pass(self, index: int, record: Record, before: nnx.Module, after: nnx.Module) -> None:
        """Called when a pass has run on shapes and was verified."""


class Dump(Instrument):
    """Writes `NN_<pass>.txt`, the tree after the pass with what changed on top, and `00_input.txt`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"dump: {folder}: cannot be written: {error.strerror}") from None

    def after_pass(self, index, record, before, after):
        if index == 1:
            (self.folder / "00_input.txt").write_text(ir.describe(before), encoding="utf-8")
        text = f"{record.diff}\n{ir.describe(after)}"
        (self.folder / f"{index:02d}_{record.name}.txt").write_text(text, encoding="utf-8")


@dataclasses.dataclass
class Tally:
    """What `rewrite` met: hits by rule, paths rewritten, paths skipped with reasons."""

    hits: dict[str, int]
    paths: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def matches(tree: nnx.Module, pass_: Pass, rules: Rules, prefix: str = "") -> list[tuple[str, str, PassOptions]]:
    """(path in `tree`, which stands at `prefix`; place in the recipe; options) of every site that a rule takes."""
    found = []
    for path in [path for path, module in ir.walk(tree) if isinstance(module, pass_.module)]:
        full = f"{prefix}/{path}".strip("/")
        rule = next(((where, o) for where, o in rules if o.match is None or re.fullmatch(o.match, full)), None)
        if rule is not None:
            found.append((path, *rule))
    return found


def rewrite(
    tree: nnx.Module, pass_: Pass, rules: Rules, *, prefix: str, layers: int, tally: Tally, seen: Mapping | None = None
) -> nnx.Module:
    """A copy of `tree` (standing at path `prefix`) with the pass applied at every site that a rule matches.

    seen: by full path what calibration text showed of a site's inputs.
    """
    out, seen = ir.shallow(tree), seen or {}
    for path, where, options in reversed(matches(tree, pass_, rules, prefix)):  # children before parents
        full = f"{prefix}/{path}".strip("/")
        new = pass_.apply(Site(path=full, layers=layers, seen=seen.get(full)), ir.get(out, path), options)
        tally.hits[where] += 1
        if isinstance(new, Noted):
            tally.notes[full], new = new.note, new.module
        if isinstance(new, Skipped):
            tally.skipped[full] = new.reason
            continue
        tally.paths.append(full)
        if path:
            ir.put(out, path, new)
        else:
            out = new
    return out


def run(
    model: nnx.Module,
    recipe: Recipe,
    instruments: Sequence[Instrument] = (),
    checks: Sequence[verify.Rule] = verify.RULES,
) -> tuple[list[nnx.Module], list[Record]]:
    """All passes on the abstract tree: the trees after each pass (the input first), and a record a pass.

    checks: what the verifier checks after each.

    Raises: RecipeError for a rule that matched nothing; PassError, VerifyError from the passes and the verifier.
    """
    trees, records = [model], []
    for index, (pass_, rules) in enumerate(recipe.steps(), start=1):
        before, start = trees[-1], time.perf_counter()
        _check_patterns(rules)
        for instrument in instruments:
            instrument.before_pass(pass_, rules, before)
        tally = Tally(hits={where: 0 for where, _ in rules})
        values = _values(before)
        after = rewrite(before, pass_, rules, prefix="", layers=len(model.layers), tally=tally)
        _check_untouched(pass_, values, before)
        _check_hits(pass_, rules, tally, before)
        verify.check(before, after, pass_.name, checks)
        record = Record(
            name=pass_.name,
            stage=pass_.stage,
            axis=pass_.axis,
            exact=pass_.exact,
            needs_healing=pass_.needs_healing,
            sites=len(tally.paths),
            skipped=tally.skipped,
            weight_bytes=(ir.weight_bytes(before), ir.weight_bytes(after)),
            cache_bytes=(before.cache_plan().unit_bytes, after.cache_plan().unit_bytes),
            trees=(before, after),
            seconds=time.perf_counter() - start,
        )
        for instrument in instruments:
            instrument.after_pass(index, record, before, after)
        trees.append(after)
        records.append(record)
    return trees, records


class Statistics(Protocol):
    """Calibration text on its way through the blocks (calibrate.py)."""

    def collect(
        self, block: nnx.Module, prefix: str, sites: Iterable[str], needs: frozenset[str], lane: int = 0
    ) -> Mapping:
        """What it shows of the inputs of the sites (paths in the block), by full path."""

    def advance(self, block: nnx.Module, prefix: str, lane: int = 0) -> None:
        """Runs the block, which has all passes of the lane behind it."""


def needs(rules: Rules) -> frozenset[str]:
    """What the rules read of their sites' inputs."""
    return frozenset().union(*(options.needs for _, options in rules))


def turn(recipe: Recipe) -> int | None:
    """Index of the step that turns the stream, where an earlier one reads calibration text: it must see the stream as it was."""
    steps = [rules for _, rules in recipe.steps()]
    at = next((i for i, rules in enumerate(steps) if any(o.turns_stream for _, o in rules)), None)
    return at if at is not None and any(map(needs, steps[:at])) else None


def apply_block(
    block: nnx.Module,
    prefix: str,
    recipe: Recipe,
    planned: Sequence[nnx.Module],
    records: Sequence[Record],
    feed: Statistics | None = None,
) -> nnx.Module:
    """All passes on one concrete block that stands at `prefix` (`layers/3`), checked against the plan after each. Those before a
    `turn` read lane 1 of the text, which runs through blocks as they were then."""
    turned = -1 if feed is None or (found := turn(recipe)) is None else found
    for i, (step, record, plan) in enumerate(zip(recipe.steps(), records, planned[1:], strict=True)):
        if i == turned:
            feed.advance(block, prefix, lane=1)
        block, _ = apply_pass(block, prefix, step, plan, record, feed, int(i < turned))
    if feed is not None:
        feed.advance(block, prefix)
    return block


def _few_threads():
    many = (os.cpu_count() or 1) > THREADS
    return threadpoolctl.threadpool_limits(THREADS, "blas") if many else contextlib.nullcontext()


def apply_pass(
    block: nnx.Module,
    prefix: str,
    step: tuple[Pass, Rules],
    plan: nnx.Module,
    record: Record,
    feed: Statistics | None = None,
    lane: int = 0,
) -> tuple[nnx.Module, list[str]]:
    """One pass on one concrete block -> (the block after it, full paths of the sites that it rewrote).

    plan: the whole abstract tree after the pass; seconds and weight errors are added to the record.
    Raises: PassError from the pass; VerifyError for a block that differs in form from the plan.
    """
    (pass_, rules), start = step, time.perf_counter()
    tally = Tally(hits={where: 0 for where, _ in rules})
    values = _values(block)
    sites = [path for path, _, options in matches(block, pass_, rules, prefix) if options.needs]
    seen = feed.collect(block, prefix, sites, needs(rules), lane) if sites else None
    with _few_threads():
        after = rewrite(block, pass_, rules, prefix=prefix, layers=len(plan.layers), tally=tally, seen=seen)
    record.notes |= tally.notes
    _check_untouched(pass_, values, block)
    verify.check(block, after, f"{pass_.name} at {prefix}", verify.LOCAL)
    if ir.signature(ir.abstract(after)) != ir.signature(ir.get(plan, prefix)):
        change = ir.diff(ir.get(plan, prefix), after)
        raise VerifyError(f"after {pass_.name} at {prefix}: weights differ in form from the plan:\n{change}")
    record.errors |= {f"{prefix}/{path}": e for path, e in relative_errors(block, after).items()}
    jax.block_until_ready(jax.tree.leaves(nnx.state(after)))
    record.seconds += time.perf_counter() - start
    return after, tally.paths


def relative_errors(before: nnx.Module, after: nnx.Module) -> dict[str, float]:
    """|W' - W| / |W| (Frobenius) of every weight whose stored form changed, by path."""
    old = ir.params(before)
    errors = {}
    for path, variable in ir.params(after).items():
        new = variable.get_value()
        was = old[path].get_value() if path in old else None
        if was is None or was.shape != new.shape or not (is_qtensor(was) or is_qtensor(new)) or _same(was, new):
            continue
        errors[path] = float(_relative_error(was, new))
    return errors


def _same(a, b) -> bool:
    """The same arrays, though a QTensor around them may have been rebuilt."""
    old, new = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(old) == len(new) and all(x is y for x, y in zip(old, new))


@jax.jit
def _relative_error(was, new):
    was, new = (tensor.dense(x).astype(jnp.float32) for x in (was, new))
    return jnp.linalg.norm(new - was) / jnp.maximum(jnp.linalg.norm(was), jnp.finfo(jnp.float32).tiny)


def _values(tree: nnx.Module) -> dict[str, list]:
    return {path: jax.tree.leaves(v.get_raw_value()) for path, v in ir.params(tree).items()}


def _check_untouched(pass_: Pass, values: dict[str, list], tree: nnx.Module) -> None:
    for path, leaves in _values(tree).items():
        old = values.get(path, [])
        if len(old) != len(leaves) or any(a is not b for a, b in zip(old, leaves, strict=True)):
            raise VerifyError(f"{pass_.name} wrote into its input at {path}; passes only construct (use ir.replace)")


def _check_patterns(rules: Rules) -> None:
    for where, options in rules:
        try:
            re.compile(options.match or "")
        except re.error as error:
            raise RecipeError(f"{where}.match: {options.match!r} is no regular expression: {error}") from None


def _check_hits(pass_: Pass, rules: Rules, tally: Tally, tree: nnx.Module) -> None:
    """A rule that matched nothing is an error that shows what it could have matched."""
    sites = [path for path, module in ir.walk(tree) if isinstance(module, pass_.module)]
    for where, options in rules:
        if tally.hits[where]:
            continue
        matched = [path for path in sites if options.match is None or re.fullmatch(options.match, path)]
        if matched:
            taken = f"earlier rules of {pass_.name} take all its sites ({matched[0]}, ...)"
            raise RecipeError(f"{where}: unused, {taken}; narrow their 'match', or take it out")
        if not sites:
            kinds = " or ".join(kind.__name__ for kind in getattr(pass_.module, "__args__", (pass_.module,)))
            raise RecipeError(f"{where}: {pass_.name} has no site in this model (it takes {kinds}); take it out")
        shown = ", ".join(dict.fromkeys(re.sub(r"\d+", "N", path) for path in sites))
        raise RecipeError(
            f"{where}.match: {options.match!r} matched no site of {pass_.name}; sites (N an index): {shown}"
        )
    if not tally.paths:
        reasons = ", ".join(sorted(set(tally.skipped.values())))
        raise PassError(f"{pass_.name} changed nothing: {reasons or 'no site'}")


def flat_errors(record: Record) -> tuple[float, float] | None:
    """(mean, largest) relative error over the record's sites, or None where nothing was rounded."""
    values = np.asarray(list(record.errors.values()))
    return (float(values.mean()), float(values.max())) if values.size else None
