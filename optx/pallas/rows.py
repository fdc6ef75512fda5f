"""The table of kernels: for each op its implementations, best first, and the reference last."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}  # of a backend; xla runs anywhere


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
        return name_of(self)

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


def name_of(row) -> str:
    """Of a row, or of a choice of it."""
    return "/".join(part for part in (row.backend, row.arch, row.variant) if part not in ("", "any"))


_GPU, _TPU = "mosaic_gpu", "mosaic_tpu"
_MMA = ("sm80", "sm89", "sm90", "sm100", "sm120")  # what rows of a warp's matrix instructions are for

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
        variant="scored",
        module="ragged_paged_attention.scored_sm90",
        order="batch",
        verified=False,
        lacks=("key_rope", "head_pages", "chosen"),
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
    Row(
        op="chained_matmul",
        backend=_GPU,
        arch="sm90",
        module="chained_matmul.mosaic_gpu_sm90",
        order="batch",
        optional=True,
    ),
    Row(op="chained_matmul", backend="xla", module="chained_matmul.reference"),
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
