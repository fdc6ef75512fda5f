"""The table: op -> rows of (backend, arch, supports, function). Lowering asks every row once and records the answer.

A choice is never made at run time and never falls back silently: a call site that was lowered carries its `OpChoice`;
one that was not (a tree between two passes) runs the reference row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from optx.errors import LoweringError, did_you_mean
from optx.pallas.attention import reference as attention
from optx.pallas.quant_matmul import reference as quant_matmul
from optx.pallas.quant_matmul import xla_cpu as quant_matmul_cpu
from optx.pallas.ssm_scan import reference as ssm_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSite:
    """One call site before lowering: the op and what is known of its arguments without running it."""

    op: str
    args: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpChoice:
    """The row that lowering chose for a call site, with what the others said. `backend`, `arch` identify the row."""

    op: str
    backend: str
    arch: str = "any"
    declined: tuple[tuple[str, str], ...] = ()  # (row, reason)

    def __str__(self):
        return f"{self.backend}" + ("" if self.arch == "any" else f"/{self.arch}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation. `supports(site args, target)` returns None or the reason it declines."""

    op: str
    backend: str
    run: Callable
    arch: str = "any"
    supports: Callable[[Mapping[str, Any], Any], str | None] = lambda args, target: None

    @property
    def name(self) -> str:
        return self.backend if self.arch == "any" else f"{self.backend}/{self.arch}"


# Best first; the last row of an op is its reference and takes everything.
ROWS: tuple[Row, ...] = (
    Row(op="flash_attention", backend="xla", run=attention.flash_attention),
    Row(op="ragged_paged_attention", backend="xla", run=attention.ragged_paged_attention),
    Row(
        op="quant_matmul",
        backend="xla",
        arch="cpu",
        supports=quant_matmul_cpu.supports,
        run=quant_matmul_cpu.quant_matmul,
    ),
    Row(op="quant_matmul", backend="xla", run=quant_matmul.quant_matmul),
    Row(op="ssm_scan", backend="xla", run=ssm_scan.ssm_scan),
)


def rows(op: str) -> tuple[Row, ...]:
    found = tuple(row for row in ROWS if row.op == op)
    if not found:
        raise LoweringError(f"op {op!r} is not in the table{did_you_mean(op, {row.op for row in ROWS})}")
    return found


def select(site: OpSite, target: Any, require: str | None = None) -> OpChoice:
    """The first row that takes the site, with the reasons of all rows that declined.

    require: a backend that must be used where the op has it.
    Raises: LoweringError with every reason when no row takes the site.
    """
    declined: list[tuple[str, str]] = []
    chosen = None
    for row in rows(site.op):
        if require and row.backend != require:
            reason = f"the recipe requires {require}"
        elif chosen is not None:
            reason = f"{chosen.name} comes first"
        else:
            reason = row.supports(site.args, target)
        if reason is None:
            chosen = row
        else:
            declined.append((row.name, reason))
    if chosen is None:
        said = "; ".join(f"{name}: {reason}" for name, reason in declined)
        backends = ", ".join(sorted({row.backend for row in rows(site.op)}))
        raise LoweringError(f"{site.op}: no kernel takes this call ({said}); allowed in 'require': {backends}")
    return OpChoice(op=site.op, backend=chosen.backend, arch=chosen.arch, declined=tuple(declined))


def call(op: str, choices: tuple[OpChoice, ...], *args, **kwargs):
    """Runs the op by the row recorded in `choices`, or by its reference when the site was not lowered."""
    candidates = rows(op)
    for choice in choices:
        if choice.op == op:
            row = next(r for r in candidates if (r.backend, r.arch) == (choice.backend, choice.arch))
            return row.run(*args, **kwargs)
    return candidates[-1].run(*args, **kwargs)
