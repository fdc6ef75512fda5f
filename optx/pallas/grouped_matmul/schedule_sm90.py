"""What a persistent block of the Hopper kernels does next, and how it stores a ragged number of rows.

Which rows a work item has depends on `group_sizes`, so all warpgroups walk the list of experts as their items ascend: no
list is made before the kernel, and an expert without rows is stepped over. A last pseudo expert holds the rows past the
sum; it has no steps, so its items store zeros.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCKS = 132  # persistent blocks: the SMs of H100 SXM and H200; on a part with fewer some blocks wait their turn
WIDE = 64  # 16-bit numbers in a row of 128 bytes, the widest swizzle


def ceil(a, b):
    return lax.div(a + (b - 1), b)


class Walk:
    """The items of the experts in order; a state is (expert, its first item, its first row, its rows)."""

    def __init__(self, sizes, *, tokens, experts, tiles, columns):
        """tiles: sizes with `rows` of an item, `band` and `grid`; columns: column tiles of an expert."""
        self.sizes, self.tokens, self.experts, self.columns = sizes, tokens, experts, columns
        self.rows, self.band, self.blocks = tiles.rows, tiles.band, tiles.grid

    def _rows(self, expert, row):
        left = self.tokens - row
        listed = jnp.clip(self.sizes[jnp.minimum(expert, self.experts - 1)], 0, left)
        return jnp.where(expert < self.experts, listed, left)

    def _items(self, rows):
        return ceil(rows, self.rows) * self.columns

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

    def place(self, item, state):
        """-> (first row, rows, column tile) of the item."""
        _, first, row, rows = state
        here = item - first
        band = lax.div(here, self.band * self.columns)
        here = here - band * (self.band * self.columns)
        start = band * self.band
        height = jnp.minimum(self.band, ceil(rows, self.rows) - start)
        column = lax.div(here, height)
        tile = start + here - column * height
        return row + tile * self.rows, jnp.minimum(self.rows, rows - tile * self.rows), column

    def run(self, body, steps_of_item, registers, action):
        """state = body(item, step, steps, state) for the items of this block; -> steps in all, known to every warpgroup.

        step: steps of the items before; steps: of this one, 0 for rows that no expert has.
        """
        plgpu.set_max_registers(registers, action=action)
        item = lax.axis_index("sm")

        def turn(carry):
            item, step, *state = carry
            steps = jnp.where(state[0] < self.experts, steps_of_item, 0)
            state = body(item, step, steps, tuple(state))
            return item + self.blocks, step + steps, *state

        start = (item, jnp.int32(0), *self.to(item, self.start()))
        return lax.while_loop(lambda carry: carry[2] <= self.experts, turn, start)[1]


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
