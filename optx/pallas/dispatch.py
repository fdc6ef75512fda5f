"""Which row of the table (`rows`) runs an op: lowering asks every row once and records the answer.

A choice is never made at run time and never falls back silently: a call site that was lowered carries its `OpChoice`;
one that was not (a tree between two passes) runs the reference row.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optx import tensor
from optx.errors import LoweringError, did_you_mean
from optx.pallas import tiles
from optx.pallas.attention import checks
from optx.pallas.rows import PLATFORMS, ROWS, Row, name_of

NEVER_RUN = "never run on hardware: `require: xla` takes the reference instead"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSite:
    """One call site before lowering: the op and what is known of its arguments without running it."""

    op: str
    args: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpChoice:
    """The row that lowering chose for a call site, with what the others said."""

    op: str
    backend: str
    arch: str = "any"
    variant: str = ""
    note: str = ""  # what else the report should say
    declined: tuple[tuple[str, str], ...] = ()  # (row, reason)

    def __str__(self):
        return name_of(self)


def rows(op: str) -> tuple[Row, ...]:
    found = tuple(row for row in ROWS if row.op == op)
    if not found:
        raise LoweringError(f"op {op!r} is not in the table{did_you_mean(op, {row.op for row in ROWS})}")
    return found


def select(site: OpSite, target: Any, require: str | None = None, invariant: bool = False) -> OpChoice:
    """The first row that takes the site, with the reasons of all rows that declined.

    require: a backend that must be used where the op has it. invariant: only rows whose sums do not depend on the batch.
    Raises: LoweringError with every reason when no row takes the site.
    """
    backends = {row.backend for row in ROWS}
    if require and require not in backends:
        raise LoweringError(f"no backend {require!r}{did_you_mean(require, backends)}")
    declined: list[tuple[str, str]] = []
    chosen = None
    candidates = rows(site.op)
    asked = require
    if require not in {row.backend for row in candidates if not row.optional}:
        require = None
    for row in candidates:
        if require and row.backend != require:
            reason = f"the recipe requires {require}"
        elif row.order == ("batch" if invariant else "own"):
            reason = "its sums depend on the batch" if invariant else "is for batch_invariant: slower"
        elif chosen is not None:
            reason = f"{chosen.name} comes first"
        else:
            reason = row.supports(site.args, target)
            if reason is None and asked != row.backend:
                reason = _unasked(row, site)
        if reason is None:
            chosen = row
        else:
            declined.append((row.name, reason))
    if chosen is None:
        said = "; ".join(f"{name}: {reason}" for name, reason in declined)
        raise LoweringError(f"{site.op}: no kernel takes this call ({said}); leave out 'require' for the reference")
    untuned = chosen.backend in PLATFORMS and not tiles.table(target.like or target.name)
    return OpChoice(
        op=site.op,
        backend=chosen.backend,
        arch=chosen.arch,
        variant=chosen.variant,
        note="; ".join(
            said
            for said, holds in ((NEVER_RUN, not chosen.ran), (f"tiles by rule: not tuned on {target.name}", untuned))
            if holds
        ),
        declined=tuple(declined),
    )


def _unasked(row: Row, site: OpSite) -> str | None:
    """Why a row that takes the site is left out unless a recipe requires its backend."""
    if not row.verified:
        return f"not verified on the device yet; a recipe may say require: {row.backend}"
    if row.least and (size := tensor.nbytes(site.args["weight"])) < row.least:
        return f"the weight is {size:,} bytes; no faster below {row.least:,} (a recipe may say require: {row.backend})"
    return None


def row_of(choice: OpChoice) -> Row:
    return next(row for row in rows(choice.op) if row.name == name_of(choice))


def running(op: str, choices: tuple[OpChoice, ...]) -> Row:
    """The row recorded in `choices`, or the op's reference when the site was not lowered."""
    return next((row_of(choice) for choice in choices if choice.op == op), None) or rows(op)[-1]


def lowered(op: str, choices: tuple[OpChoice, ...]) -> bool:
    """Whether a kernel is recorded for the op, and not its reference."""
    return any(choice.op == op and row_of(choice) is not rows(op)[-1] for choice in choices)


def call(op: str, choices: tuple[OpChoice, ...], *args, **kwargs):
    """Runs the op by its row (`running`)."""
    if check := getattr(checks, op, None):
        check(*args, **kwargs)
    row = running(op, choices)
    if (run := _through.get()) is not None:
        return run(row.run, *args, **kwargs)
    return row.run(*args, **kwargs)


_through: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("calls of ops go through", default=None)


@contextlib.contextmanager
def through(run: Callable) -> Iterator[None]:
    """Calls of ops made inside go through run(function, *args, **kwargs), which returns what the function does or what
    stands for it."""
    before = _through.set(run)
    try:
        yield
    finally:
        _through.reset(before)
