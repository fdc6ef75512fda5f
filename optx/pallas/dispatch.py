"""The table: op -> rows of (backend, arch, supports, function). Lowering asks every row once and records the answer.

A choice is never made at run time and never falls back silently: a call site that was lowered carries its `OpChoice`;
one that was not (a tree between two passes) runs the reference row.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from optx import tensor
from optx.errors import LoweringError, did_you_mean
from optx.pallas import tiles
from optx.pallas.attention import checks

PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}  # of a backend; xla runs anywhere


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
        return _name(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of an op: a module that holds a function of the op's name, imported when it is first asked.

    The module may also hold `supports(site args, target) -> None or the reason it declines`, and `relayout(QTensor) ->
    Arranged`: the weight in the order that the kernel reads, made once at lowering.
    """

    op: str
    backend: str  # xla, mosaic_gpu, mosaic_tpu
    module: str  # below optx.pallas
    arch: str = "any"  # sm90, ...; or a platform
    variant: str = ""  # tells rows of one backend and arch apart
    function: str | None = None  # None: the op's name
    order: str = "any"  # of sums: "batch", it depends on other sequences; "own", never, and slower: for batch_invariant
    optional: bool = False  # True: `require` does not insist on it, as the rows after it are as good where it declines
    verified: bool = True  # False: its cases have not all run on the device; chosen only where a recipe requires it
    ran: bool = True  # False: compiled by the assembler and interpreted, never run on its hardware; the report says so
    first: bool = False  # takes exact copies of the first tokens in the call for packed ones (`reference.with_first`)
    lacks: tuple[str, ...] = ()  # facts of a site, keys of LACKS, that it declines
    least: int = (
        0  # bytes of the smallest weight that it is faster for (measured); smaller ones only where a recipe requires it
    )

    @property
    def name(self) -> str:
        return _name(self)

    @functools.cached_property
    def code(self) -> ModuleType:
        return importlib.import_module(f"optx.pallas.{self.module}")

    @property
    def run(self) -> Callable:
        return getattr(self.code, self.function or self.op)

    @property
    def relayout(self) -> Callable | None:
        return getattr(self.code, "relayout", None)

    def supports(self, args: Mapping[str, Any], target: Any) -> str | None:
        """None, or why the row does not take a call with these facts on the target."""
        platform = PLATFORMS.get(self.backend, target.platform)
        if platform != target.platform or self.arch not in ("any", target.arch, target.platform):
            mine = self.arch if platform == target.platform or self.arch != "any" else platform
            return f"is for {mine}, not {target.platform if target.arch == 'any' else target.arch}"
        if missing := [LACKS[fact] for fact in self.lacks if args.get(fact)]:
            return missing[0]
        if args.get("first") and not self.first:
            return "takes no exact first tokens beside packed ones in one call"
        asked = getattr(self.code, "supports", None)
        return asked(args, target) if asked else None


def _name(row: Row | OpChoice) -> str:
    return "/".join(part for part in (row.backend, row.arch, row.variant) if part not in ("", "any"))


_GPU, _TPU = "mosaic_gpu", "mosaic_tpu"
_MMA = ("sm80", "sm89", "sm90", "sm100", "sm120")  # what rows of a warp's matrix instructions are for

NEVER_RUN = "never run on hardware: `require: xla` takes the reference instead"

# What eviction and selection ask of attention, and what a row says that does not do it.
LACKS = {
    "want_scores": "returns no attention by slot, which the policy of eviction records",
    "score_rule": "sums the attention of all queries by slot, and the policy of eviction counts some or takes the largest",
    "key_rope": "reads keys as they are stored, and these are rotated by their slot when they are read",
    "head_pages": "writes and masks tokens by one page table, and heads that compete for a budget have one each",
    "chosen": "lets all heads see the same blocks, and here each kv head chooses its own",
}
_PLAIN, _SUMS = tuple(LACKS), ("score_rule", "key_rope", "chosen")
_LISTS = ("want_scores", *_SUMS)

# Best first; the last row of an op is its reference and takes everything.
ROWS: tuple[Row, ...] = (
    Row(op="flash_attention", backend=_GPU, arch="sm90", module="flash_attention.mosaic_gpu_sm90", lacks=("chosen",)),
    Row(
        op="flash_attention",
        backend=_GPU,
        arch="sm100",
        module="flash_attention.mosaic_gpu_sm100",
        ran=False,
        lacks=("chosen",),
    ),
    *(
        Row(
            op="flash_attention",
            backend=_GPU,
            arch=arch,
            variant="mma",
            module="flash_attention.mosaic_gpu_mma",
            verified=arch != "sm90",  # on Hopper only where a recipe asks, or to be compared
            ran=arch == "sm90",
            lacks=("chosen",),
        )
        for arch in _MMA
        if arch != "sm100"
    ),
    Row(op="flash_attention", backend=_TPU, module="flash_attention.mosaic_tpu", lacks=("chosen",)),
    Row(op="flash_attention", backend="xla", module="attention.reference"),
    Row(
        op="ragged_paged_attention",
        backend=_GPU,
        arch="sm90",
        module="ragged_paged_attention.mosaic_gpu_sm90",
        order="batch",
        lacks=_PLAIN,
    ),
    Row(
        op="ragged_paged_attention",
        backend=_GPU,
        arch="sm90",
        variant="whole",
        module="ragged_paged_attention.whole_sm90",
        order="own",
        lacks=_PLAIN,
    ),
    Row(
        op="ragged_paged_attention",
        backend=_GPU,
        arch="sm90",
        variant="latent",
        module="mla.mosaic_gpu_sm90",
        order="batch",
        lacks=_PLAIN,
    ),
    Row(
        op="ragged_paged_attention",
        backend=_GPU,
        arch="sm100",
        module="ragged_paged_attention.mosaic_gpu_sm100",
        order="batch",
        ran=False,
        lacks=_LISTS,
    ),
    Row(op="ragged_paged_attention", backend=_TPU, module="ragged_paged_attention.mosaic_tpu", lacks=_PLAIN),
    Row(op="ragged_paged_attention", backend="xla", module="attention.reference"),
    Row(
        op="paged_decode",
        backend=_GPU,
        arch="sm90",
        module="paged_decode.mosaic_gpu_sm90",
        order="batch",
        first=True,
        lacks=_SUMS,
    ),
    Row(
        op="paged_decode",
        backend=_GPU,
        arch="sm90",
        variant="whole",
        module="ragged_paged_attention.whole_sm90",
        order="own",
        lacks=_PLAIN,
    ),
    Row(
        op="paged_decode",
        backend=_GPU,
        arch="sm90",
        variant="latent",
        module="mla.mosaic_gpu_sm90",
        order="batch",
        lacks=_PLAIN,
    ),
    Row(
        op="paged_decode",
        backend=_GPU,
        arch="sm90",
        variant="latent_lists",
        module="mla.lists_sm90",
        order="batch",
        lacks=_PLAIN,
    ),
    Row(
        op="paged_decode",
        backend=_GPU,
        arch="sm100",
        module="ragged_paged_attention.mosaic_gpu_sm100",
        order="batch",
        ran=False,
        lacks=_LISTS,
    ),
    *(
        # On Hopper after its own rows, and only where a recipe asks: there it is run to be compared.
        Row(
            op="paged_decode",
            backend=_GPU,
            arch=arch,
            variant="mma",
            module="paged_decode.mosaic_gpu_mma",
            order="batch",
            verified=arch != "sm90",
            ran=arch == "sm90",
            lacks=_PLAIN,
        )
        for arch in _MMA
    ),
    Row(op="paged_decode", backend=_TPU, module="paged_decode.mosaic_tpu", lacks=_PLAIN),
    Row(op="paged_decode", backend="xla", module="attention.reference", first=True),
    Row(
        op="compressed_attention",
        backend=_GPU,
        arch="sm90",
        module="compressed_attention.mosaic_gpu_sm90",
        order="batch",
        optional=True,
    ),
    Row(op="compressed_attention", backend="xla", module="compressed_attention.reference"),
    Row(
        op="top_blocks",
        backend=_GPU,
        arch="sm90",
        module="top_blocks.mosaic_gpu_sm90",
        optional=True,
    ),
    Row(op="top_blocks", backend="xla", module="top_blocks.reference"),
    Row(op="indexed_attention", backend="xla", module="indexed_attention.reference"),
    Row(op="matmul", backend=_GPU, arch="sm90", module="matmul.mosaic_gpu_sm90", optional=True),
    Row(op="matmul", backend=_GPU, arch="sm100", module="matmul.mosaic_gpu_sm100", optional=True, ran=False),
    Row(op="matmul", backend="xla", arch="gpu", module="matmul.xla_gpu"),
    Row(op="matmul", backend="xla", module="matmul.reference"),
    Row(
        op="rotate_append",
        backend=_GPU,
        arch="sm90",
        module="rotate_append.mosaic_gpu_sm90",
        optional=True,
        lacks=("head_pages",),
    ),
    Row(op="rotate_append", backend="xla", module="rotate_append.reference"),
    Row(op="add_norm", backend=_GPU, arch="sm90", module="add_norm.mosaic_gpu_sm90", optional=True),
    Row(op="add_norm", backend="xla", module="add_norm.reference"),
    Row(op="gated_act", backend=_GPU, arch="sm90", module="gated_act.mosaic_gpu_sm90", optional=True),
    Row(op="gated_act", backend="xla", module="gated_act.reference"),
    *(
        row
        for op, least in (("norm_matmul", 16 << 20), ("gated_matmul", 40 << 20))  # two ops in one kernel
        for row in (
            Row(op=op, backend=_GPU, arch="sm90", module=f"{op}.mosaic_gpu_sm90", optional=True, least=least),
            Row(op=op, backend="xla", module=f"{op}.reference"),
        )
    ),
    Row(op="quant_matmul", backend=_GPU, arch="sm90", module="quant_matmul.mosaic_gpu_sm90"),
    Row(op="quant_matmul", backend=_GPU, arch="sm90", variant="w8a8", module="quant_matmul.mosaic_gpu_sm90_w8a8"),
    Row(op="quant_matmul", backend=_GPU, arch="sm100", module="quant_matmul.mosaic_gpu_sm100", ran=False),
    Row(
        op="quant_matmul",
        backend=_GPU,
        arch="sm100",
        variant="w8a8",
        module="quant_matmul.mosaic_gpu_sm100_w8a8",
        ran=False,
    ),
    Row(
        op="quant_matmul",
        backend=_GPU,
        arch="sm100",
        variant="fp4",
        module="quant_matmul.mosaic_gpu_sm100_fp4",
        ran=False,
    ),
    Row(op="quant_matmul", backend=_TPU, module="quant_matmul.mosaic_tpu"),
    Row(op="quant_matmul", backend="xla", arch="cpu", module="quant_matmul.xla_cpu"),
    Row(op="quant_matmul", backend="xla", module="quant_matmul.reference"),
    Row(op="grouped_matmul", backend=_GPU, arch="sm90", module="grouped_matmul.mosaic_gpu_sm90"),
    Row(op="grouped_matmul", backend=_GPU, arch="sm100", module="grouped_matmul.mosaic_gpu_sm100", ran=False),
    Row(op="grouped_matmul", backend=_TPU, module="grouped_matmul.mosaic_tpu"),
    Row(op="grouped_matmul", backend="xla", module="grouped_matmul.reference"),
    Row(op="ssm_scan", backend="xla", module="ssm_scan.reference"),
    Row(op="selective_scan", backend="xla", module="selective_scan.reference"),
    Row(op="linear_attention", backend="xla", module="linear_attention.reference"),
    Row(op="gated_delta", backend="xla", module="gated_delta.reference"),
)


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
    return next(row for row in rows(choice.op) if row.name == _name(choice))


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
