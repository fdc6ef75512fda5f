"""What a pass is: one pure function over matched sites, with typed options and declared facts."""

import dataclasses
import enum
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from optx.errors import RecipeError, did_you_mean


class Stage(enum.StrEnum):
    """Stages in the order in which they run."""

    STRUCTURE = "structure"
    ATTENTION = "attention"
    HEAL = "heal"
    FOLD = "fold"
    WEIGHTS = "weights"
    CACHE = "cache"
    LOWER = "lower"


class Axis(enum.StrEnum):
    """What a technique makes smaller; decides what stacks with what (legality.py)."""

    STATE = "state"  # what a token leaves behind: GQA, MLA, cross-layer sharing
    BITS = "bits"  # bits a number: weights, KV
    READS = "reads"  # what a step reads: windows, sparse attention
    DROP = "drop"  # what is thrown away: eviction, compaction
    WEIGHTS = "weights"  # which weights a token touches: MoE
    REPLACE = "replace"  # attention replaced by a state: SSM
    LAYOUT = "layout"  # the same numbers, arranged for the kernels
    QUALITY = "quality"  # nothing: what other passes have cost is won back


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassOptions:
    """Base of every pass's options. A recipe lists options objects; the first whose `match` fits a site wins."""

    match: str | None = None  # regex that the whole path must match; None: every site of the pass's module type

    @property
    def needs(self) -> frozenset[str]:
        """What the pass reads of the site's inputs, by its name in STATISTICS; empty: it works without calibration text."""
        return frozenset()

    @property
    def turns_stream(self) -> bool:
        """Whether blocks behind the pass exchange other numbers than those before it, which stand for the same."""
        return False

    @property
    def unresolved(self) -> bool:
        """Whether something is left to be measured on the whole model before the pass can run on weights."""
        return False

    def resolved(self, model: nnx.Module, windows: Sequence[np.ndarray]) -> "PassOptions":
        """With that measured on the uncompiled model and calibration text, int32[1, T] each."""
        return self


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Returned by a pass in place of a module: the site stays as it is, for this reason (shown on the report)."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Noted:
    """Returned by a pass around its module: what the report should say of the site."""

    module: nnx.Module
    note: str


STATISTICS = ("absmax", "absmean", "square", "gram", "inputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What calibration text showed of the inputs x [tokens, D] of a projection; of experts, each by its own tokens: [E, ...].

    Only what the pass's options name in `needs` is there. float32.
    """

    tokens: jax.Array  # int32[] or [E]
    absmax: jax.Array | None = None  # [D], largest |x|
    absmean: jax.Array | None = None  # [D], mean |x|
    square: jax.Array | None = None  # [D], mean x^2
    gram: jax.Array | None = None  # [D, D], mean of x x^T


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenBlock:
    """The same of the projections inside a larger part, by path in it; where `inputs` is needed, what enters the part."""

    parts: Mapping[str, Seen]
    # Arguments of calls of the part, a chunk of windows each; in place of a view what the layer whose cache it reads left there.
    inputs: tuple = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where a pass stands: the path of the module and the number of layers of the model.

    seen: of a calibrated pass on weights, never on shapes.
    """

    path: str
    layers: int
    seen: Seen | SeenBlock | None = None

    @property
    def layer(self) -> int | None:
        """Index of the layer that the site lies in; None outside the layers."""
        parts = self.path.split("/")
        return int(parts[1]) if parts[0] == "layers" and len(parts) > 1 else None


Rewrite = Callable[[Site, Any, Any], nnx.Module | Skipped | Noted]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A registered pass: `apply(site, module, options)` constructs the new module and never writes into the old one."""

    name: str
    apply: Rewrite
    module: type | types.UnionType
    options: type[PassOptions]
    axis: Axis
    stage: Stage
    exact: bool
    doc: str
    needs_healing: bool = False  # its start is training-free, and distillation (stage heal) is meant to follow


PASSES: dict[str, Pass] = {}


def register(
    name: str, *, axis: Axis, stage: Stage, options: type[PassOptions], exact: bool, needs_healing: bool = False
) -> Callable:
    """Declares a pass. The annotation of the function's second parameter is the module type that it matches."""

    def wrap(function: Rewrite) -> Rewrite:
        if name in PASSES:
            raise RecipeError(
                f"pass {name!r} is registered twice: {PASSES[name].apply.__module__}, {function.__module__}"
            )
        second = list(inspect.signature(function, eval_str=True).parameters.values())[1]
        assert isinstance(second.annotation, type | types.UnionType), f"pass {name}: annotate the module with its type"
        PASSES[name] = Pass(
            name=name,
            apply=function,
            module=second.annotation,
            options=options,
            axis=axis,
            stage=stage,
            exact=exact,
            doc=inspect.cleandoc(function.__doc__ or ""),
            needs_healing=needs_healing,
        )
        return function

    return wrap


def by_name(name: str, where: str) -> Pass:
    """The pass registered as `name`. Raises RecipeError at `where` naming the nearest."""
    if not isinstance(name, str) or name not in PASSES:
        raise RecipeError(f"{where}: no pass is called {name!r}{did_you_mean(str(name), PASSES)}")
    return PASSES[name]


def by_options(options: PassOptions, where: str) -> Pass:
    """The pass whose options class this is."""
    for pass_ in PASSES.values():
        if pass_.options is type(options):
            return pass_
    raise RecipeError(f"{where}: {type(options).__name__} belongs to no registered pass; allowed: {', '.join(PASSES)}")
