"""What a persistent block of the Hopper kernels does next, and how it stores a ragged number of rows.

Which rows a work item has depends on `group_sizes`: every warp of a block sums them up once, into a table in shared memory,
and finds its items there. No list is made before the kernel, and an expert without rows has no items. A last pseudo expert
holds the rows past the sum; it has no steps, so its items store zeros.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxlib.mlir import ir

from optx.pallas.late import arith, memref, nvvm, plgpu, utils

BLOCKS = 132  # persistent blocks: the SMs of H100 SXM and H200; on a part with fewer some blocks wait their turn
WIDE = 64  # 16-bit numbers in a row of 128 bytes, the widest swizzle
RADIX = 8  # entries of the table that a step of a search reads at once


def ceil(a, b):
    return lax.div(a + (b - 1), b)


def table(experts: int):
    """Shared memory of a `Schedule`: first item and first row of each expert, of the rows past the sum, and their ends."""
    return plgpu.SMEM((2, experts + 2), jnp.int32)


def table_bytes(experts: int) -> int:
    return -(-8 * (experts + 2) // 1024) * 1024


class Schedule:
    """Work items in the order of experts; a place is (expert, its row where the item starts, rows, column tile)."""

    def __init__(self, sizes, table, *, tokens, experts, tiles, columns, interpreted):
        """tiles: with `rows` of an item, `band` and `grid`; columns: column tiles of an expert. Fills the table."""
        self.table, self.tokens, self.experts, self.columns = table, tokens, experts, columns
        self.rows, self.band, self.grid = tiles.rows, tiles.band, tiles.grid
        (self._sum_plainly if interpreted else self._sum)(sizes)

    def _sum_plainly(self, sizes):
        listed = jnp.clip(sizes[...], 0, self.tokens)
        ends = jnp.minimum(jnp.cumsum(listed), self.tokens)
        rows = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, self.tokens, jnp.int32)])
        items = jnp.cumsum(ceil(jnp.diff(rows), self.rows) * self.columns)
        self.table[0] = jnp.concatenate([jnp.zeros(1, jnp.int32), items])
        self.table[1] = rows

    def _sum(self, sizes):
        """Each lane of a warp takes a run of experts. All warps write the same numbers: none waits for another."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=())
        def fill(_, sizes, table):
            i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
            const = lambda x: utils.c(x, i32)  # noqa: E731
            cast = lambda x: arith.index_cast(index, x)  # noqa: E731
            lane = arith.andi(utils.thread_idx(), const(31))
            run = -(-(self.experts + 2) // 32)
            first = arith.muli(lane, const(run))

            def exclusive(values):
                """Sums of all values before each; values: of this lane's run."""
                own = values[0]
                for value in values[1:]:
                    own = arith.addi(own, value)
                before = own
                for distance in (1, 2, 4, 8, 16):
                    mask, clamp = const(0xFFFFFFFF - (1 << 32)), const(0)
                    other = nvvm.shfl_sync(mask, before, const(distance), clamp, nvvm.ShflKind.up)
                    inside = arith.cmpi(arith.CmpIPredicate.sge, lane, const(distance))
                    before = arith.select(inside, arith.addi(before, other), before)
                sums = [arith.subi(before, own)]
                for value in values[:-1]:
                    sums.append(arith.addi(sums[-1], value))
                return sums

            places = [arith.addi(first, const(i)) for i in range(run)]
            listed = []
            for place in places:
                real = arith.cmpi(arith.CmpIPredicate.slt, place, const(self.experts))
                at = arith.minsi(place, const(self.experts - 1))
                size = arith.minsi(arith.maxsi(memref.load(sizes, [cast(at)]), const(0)), const(self.tokens))
                last = arith.cmpi(arith.CmpIPredicate.eq, place, const(self.experts))
                rest = arith.select(last, const(self.tokens), const(0))  # as many as are left
                listed.append(arith.select(real, size, rest))
            starts = [arith.minsi(start, const(self.tokens)) for start in exclusive(listed)]
            items = []
            for start, size in zip(starts, listed, strict=True):
                rows = arith.minsi(size, arith.subi(const(self.tokens), start))
                tiles = arith.divui(arith.addi(rows, const(self.rows - 1)), const(self.rows))
                items.append(arith.muli(tiles, const(self.columns)))
            for place, item, start in zip(places, exclusive(items), starts, strict=True):
                at = cast(arith.minsi(place, const(self.experts + 1)))  # past the end: the same numbers as at the end
                memref.store(item, table, [arith.constant(index, 0), at])
                memref.store(start, table, [arith.constant(index, 1), at])
            utils.warp_barrier()
            return ()

        fill(sizes, self.table)

    def place(self, item):
        """-> (expert, first row, rows, column tile) of an item; anything for one that there is not."""
        expert, stride = jnp.int32(0), 1
        while stride * RADIX <= self.experts:
            stride *= RADIX
        while stride:  # the last expert whose first item is not past this one
            probes = [expert + i * stride for i in range(1, RADIX) if i * stride <= self.experts]
            passed = [(p <= self.experts) & (self.table[0, jnp.minimum(p, self.experts)] <= item) for p in probes]
            expert, stride = expert + stride * sum(p.astype(jnp.int32) for p in passed), stride // RADIX
        here = item - self.table[0, expert]
        row = self.table[1, expert]
        rows = self.table[1, expert + 1] - row
        band = lax.div(here, self.band * self.columns)
        here = here - band * (self.band * self.columns)
        height = jnp.clip(ceil(rows, self.rows) - band * self.band, 1, self.band)
        column = lax.div(here, height)
        tile = band * self.band + here - column * height
        return expert, row + tile * self.rows, jnp.minimum(self.rows, rows - tile * self.rows), column

    def run(self, body, steps_of_item, registers, action):
        """body(step, steps, place, after) -> after() for the items of this block; -> steps in all.

        step: steps of the items before; steps: of this one, 0 for rows that no expert has; after: finds the next place.
        """
        plgpu.set_max_registers(registers, action=action)
        items = self.table[0, self.experts + 1]

        def turn(carry):
            item, step, *place = carry
            steps = jnp.where(place[0] < self.experts, steps_of_item, 0)
            following = body(step, steps, tuple(place), lambda: self.place(item + self.grid))
            return item + self.grid, step + steps, *following

        item = lax.axis_index("sm")
        return lax.while_loop(lambda carry: carry[0] < items, turn, (item, jnp.int32(0), *self.place(item)))[1]


def store_rows(smem, out, row, rows, column):
    """The first `rows` rows of smem [R, 64] to out[row:, column:], as one group of copies."""
    for size in (1 << i for i in reversed(range(smem.shape[0].bit_length()))):  # any number is a sum of these
        start = rows - lax.rem(rows, 2 * size)  # the larger pieces come first

        @pl.when(lax.rem(lax.div(rows, size), 2) == 1)
        def _(size=size, start=start):
            plgpu.copy_smem_to_gmem(
                smem.at[pl.ds(start, size)], out.at[pl.ds(row + start, size), pl.ds(column, WIDE)], commit_group=False
            )

    plgpu.commit_smem_to_gmem_group()
