"""What the Blackwell kernels reach at most, from their tile loops alone: `python -m optx.bench.estimate`, and `optx.bench.aot`.

Of one step of an item four times are compared, and the longest is taken: its bytes from memory, its products at the peak of the
tensor cores, bytes into shared memory and out of it (copies write, products and instructions read), instructions that widen
codes or make weights of logits. Nothing here was measured on the card: launches, waits, the clock under load and conflicts are
left out.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optx import formats, target, tensor
from optx.pallas.attention.page_formats import pages_of
from optx.pallas.flash_attention import mosaic_gpu_sm100 as flash
from optx.pallas.matmul import gemm_sm100 as gemm
from optx.pallas.quant_matmul import mosaic_gpu_sm100 as wide
from optx.pallas.quant_matmul import mosaic_gpu_sm100_fp4 as fp4
from optx.pallas.quant_matmul import mosaic_gpu_sm100_w8a8 as eight
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm100 as paged
from optx.report import table

CLOCK = 1.965e9  # Hz, the boost clock of a B200 (optx.bench.aot.CHIPS)
SHARED = 128  # bytes a clock that shared memory takes or gives an SM
READ = 0.9  # of the nominal bandwidth: what a read-only sum reached on an H100 (3.01 of 3.35 TB/s)
FILL = 1.5e-6  # s: the first bytes of a thread block, and its last out; measured on an H100
EXP2 = 16  # a clock and SM (CUDA programming guide, table of arithmetic throughput)
WIDEN = 2.2  # instructions a number widened from 4 or 8 bits, counted in the SASS of int4 and int8
WIDEN_PAGES = 5.0  # the same of pages, by a scale in float32 and into shared memory

PUBLISHED = {
    "flash_attention": "1,605 TFLOP/s of bf16, 71% (FlashAttention-4, arXiv:2603.05451)",
    "matmul": "69% of 2,250 TFLOP/s by pairs of blocks, cuBLAS 63% (jax docs/pallas/gpu/blackwell_matmul.md)",
    "packed": "about 6 TB/s, int4 by fp8, grouped (tokamax, commit ba1d63a)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One call."""

    name: str
    seconds: float
    bytes: float  # read once from memory
    flops: float
    binds: str  # what most of the time goes into
    of_bandwidth: float  # bytes / seconds / nominal bandwidth
    of_peak: float
    published: str = ""


def _estimate(name, seconds, size, flops, peak, binds, b200, published=""):
    return Estimate(
        name=name,
        seconds=seconds,
        bytes=size,
        flops=flops,
        binds=binds,
        of_bandwidth=size / seconds / b200.bandwidth,
        of_peak=flops / seconds / peak,
        published=PUBLISHED.get(published, ""),
    )


def of_product(name: str, plan: gemm.Plan, x_dtype, w_dtype, scale_dtype, unit: str, b200: target.Target) -> Estimate:
    """A call of `gemm_sm100.product`."""
    tiles, peak = plan.tiles, getattr(b200.peak, unit)
    scales = plan.groups * gemm.OUTPUTS * (jnp.dtype(scale_dtype).itemsize + 2 * plan.zero)
    once = gemm.OUTPUTS * gemm.row_bytes(w_dtype, tiles.depth) + scales
    weight = once * (1 + tiles.pair) * plan.columns * plan.steps * tiles.split  # the tiles of x come from the L2 cache
    held = plan.held * gemm.row_bytes(x_dtype, tiles.depth)
    parts = {
        "memory": once / min(plan.bands, gemm.BANDS) / (b200.bandwidth * READ / gemm.SMS),
        "products": 2 * gemm.OUTPUTS * tiles.rows * tiles.depth / (peak / gemm.SMS),
        "shared memory": 2 * (once + held) / (SHARED * CLOCK),  # each is written by a copy and read once
        "widening": WIDEN * tiles.depth / CLOCK if plan.kind == "packed" else 0.0,
    }
    turns = -(-plan.items // tiles.grid)
    busy = min(1.0, plan.items / tiles.grid)  # fewer thread blocks than SMs: each has more of the bandwidth
    parts["memory"] *= max(busy, 0.25)  # and no SM can take more than some four shares
    seconds = turns * plan.steps * max(parts.values()) + FILL
    flops = 2 * plan.depth * plan.outputs * plan.rows
    kind = "matmul" if plan.kind == "dense" and plan.rows > 64 else "packed" if plan.kind == "packed" else ""
    return _estimate(name, seconds, weight, flops, peak, max(parts, key=parts.get), b200, kind)


def of_flash(length: int, heads: int, head_dim: int, value_dim: int, b200: target.Target) -> Estimate:
    """A causal call of `flash_attention`: per step of a thread block both products of each tile, and its exponentials."""
    tiles = flash.tiles_for(head_dim, value_dim)
    rows, per_sm = tiles.tiles * flash.ROWS, b200.peak.bf16 / gemm.SMS
    call = flash.Call(mask=flash.Mask(), scale=1, softcap=None, tiles=tiles, length=length, group=1)
    steps = sum(int(flash.spans(call, row, rows)[-1][1]) for row in range(0, length, rows)) * heads
    pairs = rows * flash.BLOCK
    products = 2 * pairs * (head_dim + value_dim) / per_sm
    # Each tile reads Q and K from shared memory, of the second product V alone: P lies in tensor memory. Copies write K and V.
    shared = tiles.tiles * (2 * (flash.ROWS + flash.BLOCK) * head_dim + 2 * flash.BLOCK * value_dim)
    shared += 2 * flash.BLOCK * (head_dim + value_dim)
    parts = {
        "products": products,
        "shared memory": shared / (SHARED * CLOCK),
        "exponentials": pairs / (EXP2 * CLOCK),
    }
    # A tile's softmax waits for its own products: they overlap with those of the other tile, if there is one.
    step = max(parts.values()) if tiles.tiles == 2 else parts["exponentials"] + parts["products"]
    seconds = steps * step / gemm.SMS + FILL
    flops = heads * (head_dim + value_dim) * length * (length + 1)
    size = 2 * length * heads * (2 * head_dim + 2 * value_dim)
    name = f"flash_attention causal {length} x {heads} x {head_dim}"
    return _estimate(name, seconds, size, flops, b200.peak.bf16, max(parts, key=parts.get), b200, "flash_attention")


def of_pages(
    stored: str | None, rows: int, queries: int, context: int, b200: target.Target, head_dim: int = 128
) -> Estimate:
    """`queries` new tokens of `rows` sequences over `context` cached ones, 32 heads over 8 (Qwen3-8B): one, `paged_decode`."""
    heads, kv_heads = 32, 8
    pages, group, few = pages_of(formats.parse(stored) if stored else None), heads // kv_heads, queries == 1
    per = 1 if few else 2 * flash.ROWS // group  # tokens of a unit
    units = -(-queries // per)
    steps = [-(-(context + min(queries, (u + 1) * per)) // flash.BLOCK) for u in range(units)]
    tiles = paged.tiles_for(head_dim, pages, rows * units * kv_heads, max(steps), few)
    pairs = flash.ROWS * flash.BLOCK * (tiles.tiles if tiles.shared else 1)
    token = 2 * (head_dim * pages.bits / 8 + 4 * (pages.code != "dense"))  # bytes, with a scale
    met = flash.ROWS + flash.BLOCK + flash.BLOCK  # rows of operands from shared memory: Q and K, then V alone
    wide = 4 * flash.BLOCK * head_dim  # bytes of 16-bit keys and values, written once; codes are written and read
    codes = 2 * flash.BLOCK * token if pages.code != "dense" else 0
    parts = {
        "memory": flash.BLOCK
        * token
        / units
        / (b200.bandwidth * READ / gemm.SMS),  # units after the first read the L2 cache
        "products": 4 * pairs * head_dim / (b200.peak.bf16 / gemm.SMS),
        "shared memory": (pairs / flash.BLOCK / flash.ROWS * 2 * met * head_dim + wide + codes) / (SHARED * CLOCK),
        "exponentials": pairs / (EXP2 * CLOCK),
        "widening": WIDEN_PAGES * 2 * head_dim / CLOCK if pages.code != "dense" else 0.0,
    }
    blocks, mean = rows * units * kv_heads * tiles.parts, sum(steps) / len(steps) / tiles.parts
    seconds = -(-blocks // gemm.SMS) * mean * max(parts.values()) + FILL
    flops = 4 * rows * heads * head_dim * queries * (context + (queries + 1) / 2)
    size = rows * kv_heads * (context + queries) * token
    name = f"{'decode' if few else f'chunk of {queries}'} of {rows} over {context} in {stored or 'bf16'}"
    return _estimate(name, seconds, size, flops, b200.peak.bf16, max(parts, key=parts.get), b200)


def weight(stored: str | None, d: int, f: int):
    w = jax.ShapeDtypeStruct((d, f), jnp.bfloat16)
    return tensor.quantize(w, formats.parse(stored)) if stored else w


def of_weight(
    stored: str | None, rows: int, d: int, f: int, b200: target.Target, both: bool = False, alone: bool = False
) -> Estimate:
    """x [rows, d] by a weight in `stored`; both: x rounded to the same; alone: of bf16 with no pairs of thread blocks."""
    w, name = weight(stored, d, f), f"{stored or 'bf16'}{' by itself' if both else ''} {rows}x{d}x{f}"
    bf16 = jnp.bfloat16
    if stored is None:
        plan = gemm.plan_dense(rows, w)
        if alone:
            tiles = dataclasses.replace(plan.tiles, pair=False, grid=gemm.SMS)
            plan, name = dataclasses.replace(plan, tiles=tiles), f"{name}, no pairs"
        return of_product(name, plan, bf16, bf16, bf16, "bf16", b200)
    if not both:
        laid = jax.eval_shape(wide.relayout, w)
        scale = bf16 if laid.scale is None else laid.scale.dtype
        return of_product(name, wide.plan_for(rows, laid), bf16, laid.codes.dtype, scale, "bf16", b200)
    if stored in ("mxfp4", "nvfp4"):
        laid = jax.eval_shape(fp4.relayout, w)
        return of_product(name, fp4.plan_for(rows, laid), *(laid.codes.dtype,) * 2, laid.scale.dtype, "fp4", b200)
    return of_product(name, eight.plan_for(rows, w), *(w.data.dtype,) * 2, bf16, "fp8", b200)


SHAPES: tuple[Callable, ...] = (
    *(
        (lambda b, s=s: of_weight(s, 16, 4096, 24576, b))
        for s in (None, "int4_g128", "int8", "fp8_e4m3", "mxfp4", "nvfp4")
    ),
    lambda b: of_weight("int4_g128", 16, 4096, 4096, b),
    lambda b: of_weight(None, 4096, 4096, 24576, b),
    lambda b: of_weight(None, 4096, 4096, 24576, b, alone=True),
    lambda b: of_weight("int4_g128", 4096, 4096, 24576, b),
    lambda b: of_weight("fp8_e4m3", 4096, 4096, 24576, b, both=True),
    lambda b: of_weight("nvfp4", 16, 4096, 24576, b, both=True),
    lambda b: of_weight("nvfp4", 4096, 4096, 24576, b, both=True),
    *((lambda b, h=h, v=v: of_flash(8192, 32, h, v, b)) for h, v in flash.HEAD_DIMS),
    *((lambda b, s=s: of_pages(s, 32, 1, 8192, b)) for s in (None, "int8", "fp8_e4m3", "int4")),
    *((lambda b, s=s: of_pages(s, 1, 2048, 8192, b)) for s in (None, "int8")),
)


def estimates(name: str = "b200") -> list[Estimate]:
    return [shape(target.get(name)) for shape in SHAPES]


def text(found: list[Estimate]) -> str:
    header = ("call", "us", "binds", "% of bandwidth, at most", "% of peak, at most", "published, measured on the card")
    rows = [
        [
            e.name,
            f"{1e6 * e.seconds:.1f}",
            e.binds,
            f"{100 * e.of_bandwidth:.0f}",
            f"{100 * e.of_peak:.0f}",
            e.published,
        ]
        for e in found
    ]
    return f"Static estimates for a B200, from tile loops: at most this much. None was measured.\n{table(header, rows)}"


# Weights of a decode step of Qwen3-8B: (D, F) and how often a layer reads one.
DECODE = ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096))


def decode_shares(b200: target.Target, rows: int = 16) -> dict[str, float]:
    """`Efficiency.memory` by `target.key`, of decode steps of Qwen3-8B at `rows` sequences of 8192 tokens: bytes / bandwidth /
    time, without FILL, which `Decode.launch` holds."""

    def share(stored: str | None) -> float:
        calls = [of_weight(stored, rows, d, f, b200) for d, f in DECODE]
        least = sum(call.bytes for call in calls) / b200.bandwidth
        return least / sum(call.seconds - FILL for call in calls)

    stored = {
        "bfloat16": None,
        "int4": "int4_g128",
        "int8": "int8",
        "fp8_e4m3": "fp8_e4m3",
        "mxfp4": "mxfp4",
        "nvfp4": "nvfp4",
    }
    shares = {f"matmul/{name}": share(form) for name, form in stored.items()}
    for name in ("bfloat16", "fp8_e4m3", "int4", "int8"):
        call = of_pages(stored[name] and name, rows, 1, 8192, b200)
        shares[f"attention/{name}"] = call.bytes / b200.bandwidth / (call.seconds - FILL)
    return {name: round(value, 2) for name, value in shares.items()}


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(text(estimates()))
    print("\nShares of bandwidth in decode steps, as targets.yaml has them under b200:")
    print("\n".join(f"  {name}: {{memory: {share}}}" for name, share in decode_shares(target.get("b200")).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
