"""`grouped_matmul` on Hopper: one persistent kernel over (expert, rows, columns), empty experts cost nothing.

Every block takes each 132nd work item. Which rows an item has depends on `group_sizes`, so producer and consumers walk
the list of experts together as the items ascend: no list is made before the kernel, no expert without rows is read. A
last pseudo expert holds the rows past the sum; it has no steps, so its items store zeros.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCKS = 132  # persistent blocks: the SMs of H100 SXM and H200; on a part with fewer some blocks wait their turn
WIDE = 64  # 16-bit numbers in a row of 128 bytes, the widest swizzle
PIECES = (64, 32, 16, 8, 4, 2, 1)  # rows of one store: any number of rows is a sum of these


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a work item. Two compute warpgroups share it, 64 rows of 16-bit matrix units each."""

    rows: int  # tokens of an item: 128 (a warpgroup takes 64) or 64 (a warpgroup takes half of the columns)
    cols: int  # output columns of an item
    short: int  # rows that are loaded when an item has no more than these
    stages: int  # tiles in flight
    band: int = 16  # row tiles that pass over the columns together: x then stays in the L2 cache

    @property
    def width(self) -> int:
        """Output columns of a warpgroup."""
        return self.cols if self.rows == 128 else self.cols // 2


def tiles_for(tokens: int, experts: int, d: int, f: int) -> Tiles:
    """Decode (few rows an expert) streams weights in small tiles, prefill takes the largest that registers hold."""
    if tokens <= 32 * experts:
        return Tiles(rows=64, cols=128, short=16, stages=7)
    return Tiles(rows=128, cols=256, short=64, stages=4)


def _ceil(a, b):
    return lax.div(a + (b - 1), b)


class Walk:
    """The items of the experts in order; a state is (expert, its first item, its first row, its rows)."""

    def __init__(self, sizes, tokens, experts, tiles, columns):
        self.sizes, self.tokens, self.experts, self.tiles, self.columns = sizes, tokens, experts, tiles, columns

    def _rows(self, expert, row):
        left = self.tokens - row
        listed = jnp.clip(self.sizes[jnp.minimum(expert, self.experts - 1)], 0, left)
        return jnp.where(expert < self.experts, listed, left)

    def _items(self, rows):
        return _ceil(rows, self.tiles.rows) * self.columns

    def start(self):
        zero = jnp.int32(0)
        return zero, zero, zero, self._rows(zero, zero)

    def to(self, item, state):
        """On to the expert of `item`; past the last one the state's expert is experts + 1."""

        def behind(state):
            expert, first, _, rows = state
            return (expert <= self.experts) & (item >= first + self._items(rows))

        def step(state):
            expert, first, row, rows = state
            return expert + 1, first + self._items(rows), row + rows, self._rows(expert + 1, row + rows)

        return lax.while_loop(behind, step, state)

    def goes_on(self, state):
        return state[0] <= self.experts

    def place(self, item, state):
        """-> (first row, rows, column tile) of the item."""
        _, first, row, rows = state
        here = item - first
        band = lax.div(here, self.tiles.band * self.columns)
        here = here - band * (self.tiles.band * self.columns)
        start = band * self.tiles.band
        height = jnp.minimum(self.tiles.band, _ceil(rows, self.tiles.rows) - start)
        column = lax.div(here, height)
        tile = start + here - column * height
        return row + tile * self.tiles.rows, jnp.minimum(self.tiles.rows, rows - tile * self.tiles.rows), column


def _dense_body(sizes, x, w, out, x_smem, w_smem, out_smem, full, empty, *, tiles: Tiles):
    tokens, d = x.shape
    experts, _, f = w.shape
    steps_of_item, stages = d // WIDE, tiles.stages
    x_rows, x_tiles = x_smem  # the same bytes: rows at any offset for copies, tiles of 8 rows for the matrix units
    wg = lax.axis_index("wg")
    walk = Walk(sizes, tokens, experts, tiles, -(-f // tiles.cols))

    def items(body, registers, action):
        plgpu.set_max_registers(registers, action=action)
        item = lax.axis_index("sm")

        def turn(carry):
            item, step, *state = carry
            steps = jnp.where(state[0] < experts, steps_of_item, 0)
            state = body(item, step, steps, tuple(state))
            return item + BLOCKS, step + steps, *state

        start = (item, jnp.int32(0), *walk.to(item, walk.start()))
        return lax.while_loop(lambda carry: walk.goes_on(carry[2:]), turn, start)[1]

    def produce(item, step, steps, state):
        row, rows, column = walk.place(item, state)

        def load(k, _):
            slot = lax.rem(step + k, stages)

            @pl.when(step + k >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            depth = pl.ds(k * WIDE, WIDE)
            plgpu.copy_gmem_to_smem(
                w.at[state[0], depth, pl.ds(column * tiles.cols, tiles.cols)], w_smem.at[slot], full.at[slot]
            )
            for size, fits in ((tiles.short, rows <= tiles.short), (tiles.rows, rows > tiles.short)):

                @pl.when(fits)
                def _(size=size):
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(row, size), depth], x_rows.at[slot, pl.ds(0, size)], full.at[slot]
                    )

        lax.fori_loop(0, steps, load, None)
        return walk.to(item + BLOCKS, state)

    def consume(item, step, steps, state):
        row, rows, column = walk.place(item, state)
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
            after = walk.to(item + BLOCKS, state)  # while the matrix units finish
            return acc[...], *after

        acc, *after = pl.run_scoped(accumulate, plgpu.ACC((64, tiles.width)))

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
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                slot[...] = acc[:, part * WIDE : (part + 1) * WIDE].astype(out.dtype)
                plgpu.commit_smem()
                _store_rows(slot, out, first, mine, left + part * WIDE)

        return tuple(after)

    @pl.when(wg < 2)
    def _():
        items(consume, 232, "increase")

    @pl.when(wg == 2)
    def _():
        total = items(produce, 40, "decrease")

        def drain(step, _):  # every arrival is awaited: barriers end in a known phase
            plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_rows(smem, out, row, rows, column):
    """The first `rows` rows of smem [64, 64] to out[row:, column:], as one group of copies."""
    for size in PIECES:
        start = rows - lax.rem(rows, 2 * size)  # the larger pieces come first

        @pl.when(lax.rem(lax.div(rows, size), 2) == 1)
        def _(size=size, start=start):
            plgpu.copy_smem_to_gmem(
                smem.at[pl.ds(start, size)], out.at[pl.ds(row + start, size), pl.ds(column, WIDE)], commit_group=False
            )

    plgpu.commit_smem_to_gmem_group()


@functools.partial(jax.jit, static_argnames="tiles")
def _dense(x, w, sizes, *, tiles: Tiles):
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, WIDE)), swizzle)
    shape = (tiles.stages, tiles.rows, WIDE)
    kernel = plgpu.kernel(
        functools.partial(_dense_body, tiles=tiles),
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype),
        grid=(BLOCKS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.RefUnion(
                plgpu.SMEM(shape, x.dtype, transforms=(swizzle,)), plgpu.SMEM(shape, x.dtype, transforms=tiled)
            ),
            plgpu.SMEM((tiles.stages, WIDE, tiles.cols), w.dtype, transforms=tiled),
            plgpu.SMEM((2, 2, 64, WIDE), x.dtype, transforms=(swizzle,)),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="grouped_matmul",
    )
    return kernel(sizes, x, w)


def grouped_matmul(x, w, group_sizes):
    tokens, (experts, d, f) = x.shape[0], w.shape
    return _dense(x, w, group_sizes, tiles=tiles_for(tokens, experts, d, f))
