"""`grouped_matmul` on Hopper: one persistent kernel over (expert, rows, columns), empty experts cost nothing.

Every block takes each 132nd work item of the schedule. One warpgroup loads, two compute. Dense weights are the columns of
the matrix units, tokens their rows; for packed weights, see `packed_sm90`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.errors import LoweringError
from optx.formats import Int
from optx.pallas.grouped_matmul import packed_sm90, reference
from optx.pallas.grouped_matmul.packed_sm90 import Experts, PackedTiles, packed_tiles_for, relayout
from optx.pallas.grouped_matmul.schedule_sm90 import BLOCKS, WIDE, Schedule, store_rows, table, table_bytes
from optx.pallas.late import dependent, plgpu
from optx.tensor import QTensor

DTYPES = (jnp.bfloat16, jnp.float16)
SHARED = 231936  # bytes of the 227 KB of a block that tiles may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a work item. Two compute warpgroups share it, 64 rows of 16-bit matrix units each."""

    rows: int  # tokens of an item: 128 (a warpgroup takes 64) or 64 (a warpgroup takes half of the columns)
    cols: int  # output columns of an item
    short: int  # rows that are loaded when an item has no more than these
    stages: int  # tiles in flight
    band: int = 16  # row tiles that pass over the columns together: x then stays in the L2 cache
    alias: bool = True  # see `_dense`; False is for the interpreter, where refs of a union share no bytes
    grid: int = BLOCKS  # persistent thread blocks

    @property
    def width(self) -> int:
        """Output columns of a warpgroup."""
        return self.cols if self.rows == 128 else self.cols // 2


def tiles_for(tokens: int, experts: int, d: int, f: int) -> Tiles:
    """Decode (few rows an expert) streams weights in small tiles, prefill takes the largest that registers hold."""
    if tokens <= 32 * experts:
        return Tiles(rows=64, cols=128, short=16, stages=7)
    left = SHARED - 2 * 2 * 64 * WIDE * 2 - table_bytes(experts)  # less results on their way
    return Tiles(rows=128, cols=256, short=64, stages=min(4, left // ((128 + 256) * WIDE * 2)))


def _dense_body(sizes, x, w, out, entries, x_smem, w_smem, out_smem, full, empty, *, tiles: Tiles):
    tokens, d = x.shape
    experts, _, f = w.shape
    steps_of_item, stages = d // WIDE, tiles.stages
    x_rows, x_tiles = x_smem if tiles.alias else (x_smem, x_smem)
    wg = lax.axis_index("wg")
    columns = -(-f // tiles.cols)
    schedule = Schedule(
        sizes, entries, tokens=tokens, experts=experts, tiles=tiles, columns=columns, interpreted=not tiles.alias
    )

    def produce(step, steps, place, after):
        expert, row, rows, column = place

        def load(k, _):
            slot = lax.rem(step + k, stages)

            @pl.when(step + k >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            depth = pl.ds(k * WIDE, WIDE)
            plgpu.copy_gmem_to_smem(
                w.at[expert, depth, pl.ds(column * tiles.cols, tiles.cols)], w_smem.at[slot], full.at[slot]
            )
            for size, fits in ((tiles.short, rows <= tiles.short), (tiles.rows, rows > tiles.short)):

                @pl.when(fits)
                def _(size=size):
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(row, size), depth], x_rows.at[slot, pl.ds(0, size)], full.at[slot]
                    )

        lax.fori_loop(0, steps, load, None)
        return after()

    def consume(step, steps, place, after):
        _, row, rows, column = place
        by_rows = tiles.rows == 128
        mine = jnp.clip(rows - wg * 64, 0, 64) if by_rows else rows
        busy = jnp.where(mine > 0, steps, 0)
        x_at = pl.ds(wg * 64, 64) if by_rows else pl.ds(0, 64)
        w_at = pl.ds(0, tiles.cols) if by_rows else pl.ds(wg * tiles.width, tiles.width)

        def accumulate(acc):
            def multiply(k, _):
                slot = lax.rem(step + k, stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, x_tiles.at[slot, x_at], w_smem.at[slot, :, w_at])
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)  # the step before is through: its tiles may be overwritten
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, stages)])

            lax.fori_loop(0, busy, multiply, None)
            following = after()  # while the matrix units finish
            return acc[...], *following

        acc, *following = pl.run_scoped(accumulate, plgpu.ACC((64, tiles.width)))

        @pl.when(busy > 0)
        def _():
            plgpu.barrier_arrive(empty.at[lax.rem(step + busy - 1, stages)])

        def skip(k, _):
            slot = lax.rem(step + k, stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_arrive(empty.at[slot])

        lax.fori_loop(busy, steps, skip, None)

        @pl.when(mine > 0)
        def _():
            first = row + wg * 64 if by_rows else row
            left = column * tiles.cols + (0 if by_rows else wg * tiles.width)
            for part in range(tiles.width // WIDE):
                slot = out_smem.at[wg, part % 2]
                plgpu.wait_smem_to_gmem(min(part, 1), wait_read_only=True)  # the slot's own store before
                slot[...] = acc[:, part * WIDE : (part + 1) * WIDE].astype(out.dtype)
                plgpu.commit_smem()
                store_rows(slot, out, first, mine, left + part * WIDE)

        return tuple(following)

    @pl.when(wg < 2)
    def _():
        schedule.run(consume, steps_of_item, 232, "increase")

    @pl.when(wg == 2)
    def _():
        total = schedule.run(produce, steps_of_item, 40, "decrease")

        def drain(step, _):  # every arrival is awaited: barriers end in a known phase
            plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@functools.partial(jax.jit, static_argnames="tiles")
def _dense(x, w, sizes, *, tiles: Tiles):
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, WIDE)), swizzle)
    shape = (tiles.stages, tiles.rows, WIDE)
    x_smem = plgpu.SMEM(shape, x.dtype, transforms=tiled)
    if tiles.alias:  # the same bytes as rows, which copies take at any offset of x, and as the tiles of matrix units
        x_smem = plgpu.RefUnion(plgpu.SMEM(shape, x.dtype, transforms=(swizzle,)), x_smem)
    kernel = dependent(
        functools.partial(_dense_body, tiles=tiles),
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype),
        grid=(tiles.grid,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            table(w.shape[0]),
            x_smem,
            plgpu.SMEM((tiles.stages, WIDE, tiles.cols), w.dtype, transforms=tiled),
            plgpu.SMEM((2, 2, 64, WIDE), x.dtype, transforms=(swizzle,)),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="grouped_matmul",
    )
    return kernel(sizes, x, w)


def supports(args, target) -> str | None:
    """args: weight ([E, D, F], dense or QTensor, may be abstract), dtype of x (bfloat16 when left out)."""
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    return _declines(args["weight"], jnp.dtype(args.get("dtype", jnp.bfloat16)))


def _declines(w, dtype) -> str | None:
    _, d, f = w.shape
    if dtype not in DTYPES:
        return f"x of {dtype.name}; allowed: bfloat16, float16"
    if packed(w):
        if dtype != jnp.bfloat16:
            return f"x of {dtype.name} with packed w; allowed: bfloat16"
        if reason := packed_sm90.declines(w.format, d):
            return reason
    elif w.dtype != dtype:
        return f"x of {dtype.name} with w of {w.dtype.name}; allowed: one type"
    if d % WIDE or f % WIDE or not d or not f:
        return f"D {d}, F {f}; allowed: multiples of {WIDE}"
    return None


def packed(w) -> bool:
    return isinstance(w, QTensor | Experts)


def tiles_of(x, w) -> Tiles | PackedTiles:
    """The cut of a call; x, w may be abstract."""
    tokens, (experts, d, f) = x.shape[0], w.shape
    if not packed(w):
        return tiles_for(tokens, experts, d, f)
    bits = w.format.width if isinstance(w.format, Int) else 8
    return packed_tiles_for(tokens, experts, d, bits, w.format.group or d)


def grouped_matmul(x, w, group_sizes, *, tiles: Tiles | PackedTiles | None = None):
    """`reference.grouped_matmul` on Hopper; w dense, `Experts`, or a QTensor, which is re-laid on the way (slow).

    Raises: OptxError where shapes do not fit, LoweringError for what the kernel does not take.
    """
    reference.check(x, w, group_sizes)
    reason = _declines(w, x.dtype)
    if reason:
        raise LoweringError(f"grouped_matmul: {reason}")
    wanted = PackedTiles if packed(w) else Tiles
    if tiles is not None and not isinstance(tiles, wanted):
        raise LoweringError(f"grouped_matmul: tiles {type(tiles).__name__}; this w needs {wanted.__name__}")
    if not x.shape[0] or not w.shape[0]:
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    tiles, sizes = tiles or tiles_of(x, w), group_sizes.astype(jnp.int32)
    if packed(w):
        return packed_sm90.packed(x, w if isinstance(w, Experts) else relayout(w), sizes, tiles=tiles)
    return _dense(x, w, sizes, tiles=tiles)
