"""Attention over paged MLA latents on Hopper (sm90), in Pallas Mosaic GPU: `paged_decode` and `ragged_paged_attention`.

A program owns 64 rows (query token x head) and walks blocks of 64 cached tokens, in pairs. A float32 output of 64 x 512
fills 256 registers of each thread of one warpgroup, so two warpgroups own half of its columns each; a third one copies.
Warpgroup 0 computes the logits of the first block of a pair, warpgroup 1 those of the second; the weights cross through
shared memory, so that one softmax runs beside the other warpgroup's products:

    left    S0 = Q K0'   P0 = 2^(S0 - m0)   O_l += P0 V0_l                     O_l += P1 V1_l
    right                S1 = Q K1'         O_r += P0 V0_r   P1 = 2^(S1 - m1)  O_r += P1 V1_r

The first block's place is free before the second's, so it is full again when the next pair begins; the second's fills
while the left warpgroup multiplies.
Keys and values are the same tile in shared memory, read once. Programs of the same cached tokens (128 heads are two blocks
of 64 rows) form a cluster, whose copies each read half of a block from L2 and deliver it to both. Source of the schedule
("seesaw"): FlashMLA, "A Deep-Dive Into the New Flash MLA Kernel", 2025; of the online softmax: Milakov and Gimelshein
2018, arXiv:1805.02867.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.cache import Ragged
from optx.errors import LoweringError
from optx.pallas.attention.page_formats import cache_reason
from optx.pallas.attention.reference import Mask
from optx.pallas.late import by_row, by_token, dependent, plgpu
from optx.tensor import is_qtensor

ROWS = 64  # rows of a program: the M of a Hopper matmul
CORES = 132  # multiprocessors of an H100 or H200
SMEM = 227 * 1024 - 256  # bytes a program may plan with, barriers apart
PAGES = (16, 32, 64, 128)
QUERIES = 8  # most tokens a row of `paged_decode`
FLOOR = -1e30  # running maximum before the first key: finite, so that masked logits give 2^-inf = 0 and never NaN
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work is cut."""

    tokens: int  # query tokens a program
    heads: int  # heads a program; tokens * heads <= ROWS
    splits: int  # programs that share the cached tokens of a row
    block: int = 64  # cached tokens a step of one warpgroup: 64, or 32 where latents are wide
    cluster: bool = False  # two blocks of heads share their copies
    registers: bool = True  # weights as the left side of products from registers; False: what the interpreter can run


def tiles(
    *, heads: int, rank: int, width: int, queries: int, tokens: int, pages: int, page_size: int, extras: int = 0
) -> Tiles:
    """Tiles from abstract shapes. queries: most tokens a row; tokens: of the call; extras: numbers read beside a latent."""
    block = max(n for n in range(8, min(heads, ROWS) + 1, 8) if heads % n == 0)
    together = max(1, min(queries, ROWS // heads)) if block == heads else 1
    programs = -(-tokens // together) * (heads // block)
    wide = 64 if _bytes(rank, width, 64, extras) <= SMEM else 32
    pairs = -(-pages * page_size // (2 * wide))
    splits = max(1, min(CORES // programs, pairs // 2, 64)) if programs <= CORES // 2 else 1
    return Tiles(tokens=together, heads=block, splits=splits, block=wide, cluster=heads // block % 2 == 0)


def _bytes(rank: int, width: int, block: int, extras: int = 0) -> int:
    """Shared memory of a program; small arrays take 1 KiB each."""
    weights = 2 * ROWS * block * (1 if block == ROWS <= width - rank else 2)
    return 2 * width * (ROWS + 2 * block) + weights + 1024 * (1 + extras)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a kernel is assembled for."""

    heads: int
    width: int  # R + Hr
    rank: int  # R
    page: int
    tiles: Tiles
    items: int
    mask: Mask
    scale: float
    softcap: float | None
    scaled: int  # logit scales a token: 0, 1, or one for each of so many kv heads, whose queries are rows of their own
    sinks: bool  # a logit a head

    @property
    def unit(self) -> int:
        """Columns of a swizzled tile in shared memory."""
        return 64 if self.rank % 64 == self.width % 64 == 0 and self.rank > 64 == self.tiles.block else 32

    @property
    def cut(self) -> int:
        """Columns [0, cut) of the values belong to warpgroup 0."""
        return -(-self.rank // (2 * self.unit)) * self.unit

    @property
    def halves(self):
        """(side, first column, end) of what is copied at a time: a copy's place in shared memory must be contiguous."""
        return ("l", 0, self.cut), ("r", self.cut, self.width)

    @property
    def parts(self):
        """The same of queries; the place of the first two takes the output's halves."""
        rope = [("e", self.rank, self.width)] if self.width > self.rank else []
        return [("l", 0, self.cut), ("r", self.cut, self.rank), *rope]

    @property
    def windowed(self) -> bool:
        return self.mask.window is not None

    @property
    def head_blocks(self) -> int:
        return self.heads // self.tiles.heads

    @property
    def programs(self) -> int:
        return self.items * self.tiles.splits * self.head_blocks

    @property
    def piece(self) -> int:
        """Tokens a copy."""
        return min(self.page, self.tiles.block)

    @property
    def copies(self) -> int:
        """Copies a block: pages of it."""
        return self.tiles.block // self.piece

    @property
    def crosses_in_block(self) -> bool:
        """Once a block's logits are known, the place of its rope numbers is free: there the weights cross."""
        return self.tiles.block == ROWS <= self.width - self.rank

    def arrivals(self, side: str) -> int:
        """Copies that fill one half of a block; the right one brings positions and scales along."""
        return self.copies * (1 if side == "l" else 1 + self.windowed + bool(self.scaled))


# --- The kernel ------------------------------------------------------------------------------------------------------


def _kernel(plan: _Plan, *refs, **scratch):
    names = ["q", "pool", "table", "lengths", "items", "limits"]
    names += ["asked", "positions"] * plan.windowed + ["logit_scale"] * bool(plan.scaled) + ["sink"] * plan.sinks
    r = dict(zip([*names, "out", "lse"], refs, strict=True), **scratch)
    index = lax.axis_index("program")
    if plan.tiles.cluster:
        index = 2 * index + lax.axis_index("pair")
    head_block = lax.rem(index, jnp.int32(plan.head_blocks))
    rest = lax.div(index, jnp.int32(plan.head_blocks))
    split, item = lax.rem(rest, jnp.int32(plan.tiles.splits)), lax.div(rest, jnp.int32(plan.tiles.splits))
    row, token, count, end, low = (r["items"][item, i] for i in range(5))

    @pl.when(count > 0)
    def _():
        length = r["lengths"][row]
        blocks = _Blocks.of(plan, length, end, low, split)
        where = {"row": row, "token": token, "count": count, "head_block": head_block, "program": index}
        wg = lax.axis_index("wg")
        pl.when(wg == 0)(lambda: _consume(plan, r, blocks, where, left=True))
        pl.when(wg == 1)(lambda: _consume(plan, r, blocks, where, left=False))
        pl.when(wg == 2)(lambda: _produce(plan, r, blocks, where, length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Which blocks a program reads: the first `head` ones (attention sinks), then those from `first` on."""

    size: int
    head: int
    first: jax.Array | None
    start: jax.Array  # first pair of this split
    pairs: jax.Array
    plain: jax.Array  # of these pairs, how many at the front need no mask

    @classmethod
    def of(cls, plan, length, end, low, split):
        """end: slots past it are seen by none of the rows; low: slot of the oldest query."""
        size, splits = plan.tiles.block, plan.tiles.splits
        end = jnp.minimum(end, length)
        head, first = 0, None
        if plan.windowed:
            # Positions ascend and are distinct, so a window holds no slot older than its number of slots.
            head = -(-plan.mask.sinks // size)
            oldest = jnp.maximum(low - (min(plan.mask.window, 2**30) - 1), 0)
            first = jnp.maximum(lax.div(oldest, jnp.int32(size)), head)
        last = lax.div(end + (size - 1), jnp.int32(size))
        total = jnp.minimum(head, last) + jnp.maximum(last - first, 0) if plan.windowed else last
        pairs = lax.div(total + 1, jnp.int32(2))
        share = lax.div(pairs + (splits - 1), jnp.int32(splits))
        start = split * share
        mine = jnp.clip(pairs - start, 0, share)
        plain = jnp.int32(0)
        if not plan.windowed:
            whole = jnp.minimum(low + 1, length) if plan.mask.causal else length
            plain = jnp.clip(lax.div(whole, jnp.int32(2 * size)) - start, 0, mine)
        return cls(size=size, head=head, first=first, start=start, pairs=mine, plain=plain)

    def at(self, pair, slot: int):
        """First cached token of the block that `slot` of the program's pair holds."""
        block = 2 * (self.start + pair) + slot
        if self.first is not None:
            block = jnp.where(block < self.head, block, block - self.head + self.first)
        return block * self.size


def _produce(plan, r, blocks, where, length):
    """The copying warpgroup: pages into shared memory, by halves of columns, as soon as both uses of a half are over."""
    plgpu.set_max_registers(40, action="decrease")
    page, piece, size = plan.page, plan.piece, plan.tiles.block
    rows = plan.tiles.tokens * plan.tiles.heads
    first_row = where["token"] * plan.heads + where["head_block"] * plan.tiles.heads
    for side, low, high in plan.parts:
        source = r["q"].at[pl.ds(first_row, rows), pl.ds(low, high - low)]
        plgpu.copy_gmem_to_smem(source, r["q_" + side].at[0, pl.ds(0, rows)], r["q_full"])
    last_page = jnp.maximum(lax.div(length - 1, jnp.int32(page)), 0)
    both = {"collective_axes": "pair"} if plan.tiles.cluster else {}
    beside = [("positions", "at")] * plan.windowed + [("logit_scale", "scales")] * bool(plan.scaled)

    def copy(half, slot, listed, inner, barrier):
        side, low, high = half
        for i, at in enumerate(listed):
            token = at * page + inner
            source = r["pool"].at[pl.ds(token, piece), pl.ds(low, high - low)]
            plgpu.copy_gmem_to_smem(source, r["kv_" + side].at[slot, pl.ds(i * piece, piece)], barrier, **both)
            for name, to in beside if side == "r" else ():
                tokens = max(
                    piece, 32
                )  # a copy is 128 bytes at least; of pages of 16 the second half is another page's
                if name == "logit_scale" and plan.scaled > 1:
                    token = (at * plan.scaled + lax.rem(where["row"], jnp.int32(plan.scaled))) * page + inner
                plgpu.copy_gmem_to_smem(r[name].at[pl.ds(token, tokens)], r[to].at[slot, i], barrier)

    def clear(half, slot, valid):
        """Zeros where nothing is stored: NaN there would survive a weight of 0."""
        side, low, high = half
        layout = plgpu.Layout.WGMMA if size == 64 else plgpu.Layout.MMA_ACC(jnp.float32, m_warps=size // 16)
        for column in range(0, high - low, plan.unit):
            ref = r["kv_" + side].at[slot, :, pl.ds(column, plan.unit)]
            held = plgpu.load(ref, layout=layout, optimized=False)
            line = plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=layout)
            ref[...] = jnp.where(line < valid, held, jnp.zeros_like(held))

    def load(half, slot, pair, listed, inner, valid):
        side = half[0]
        full, free = r["full_" + side].at[slot], r["free_" + side].at[slot]
        pl.when(pair > 0)(lambda: plgpu.barrier_wait(free))

        @pl.when(valid >= size)
        def _():
            copy(half, slot, listed, inner, full)

        @pl.when(valid < size)
        def _():
            @pl.when(valid > 0)
            def _():
                copy(half, slot, listed, inner, r["tail_" + side])
                plgpu.barrier_wait(r["tail_" + side])

            clear(half, slot, valid)
            plgpu.commit_smem()
            for _ in range(plan.arrivals(side)):
                plgpu.barrier_arrive(full)

    def find(pair):
        """Of both blocks of a pair: pages, first token inside the first of them, tokens up to the row's end."""
        found = []
        for slot in range(2):
            token = blocks.at(pair, slot)
            at = lax.div(token, jnp.int32(page))
            listed = [r["table"][where["row"], jnp.minimum(at + i, last_page)] for i in range(plan.copies)]
            found.append((listed, lax.rem(token, jnp.int32(page)) if page > size else 0, length - token))
        return found

    def step(pair, found):
        ahead = find(pair + 1)
        left, right = plan.halves
        load(left, 0, pair, *found[0])
        load(right, 0, pair, *found[0])
        load(right, 1, pair, *found[1])
        load(left, 1, pair, *found[1])
        return ahead

    lax.fori_loop(0, blocks.pairs, step, find(jnp.int32(0)))

    @pl.when(blocks.pairs > 0)
    def _():  # a program must not leave while its neighbour may still arrive at its barriers
        for side, _, _ in plan.halves:
            for slot in range(2):
                plgpu.barrier_wait(r["free_" + side].at[slot])


def _consume(plan, r, blocks, where, *, left: bool):
    """A computing warpgroup: logits of its block of each pair, and its half of the output's columns."""
    plgpu.set_max_registers(232, action="increase")
    own, size = (0 if left else 1), plan.tiles.block
    wide = plan.cut if left else plan.rank - plan.cut
    dtype, registers = r["p1"].dtype, plan.tiles.registers
    over = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])  # noqa: E731
    across = lambda x: lax.broadcast_in_dim(x, (ROWS, size), [1])  # noqa: E731
    limit, asked = _by_row(plan, r, where, "limits"), _by_row(plan, r, where, "asked") if plan.windowed else None

    def p0():
        if plan.crosses_in_block:
            return r["kv_r"].at[0, :, pl.ds(plan.rank - plan.cut, size)]
        return r["p0"]

    def values(slot):
        return r["kv_l"].at[slot] if left else r["kv_r"].at[slot, :, pl.ds(0, wide)]

    def vector(ref):
        """The numbers of a block's tokens, [block]."""
        parts = [
            plgpu.load(ref.at[own, i, pl.ds(0, plan.piece)], layout=by_token(), optimized=False)
            for i in range(plan.copies)
        ]
        return parts[0] if plan.copies == 1 else jnp.concatenate(parts)

    def logits(pair, masked: bool, meanwhile=lambda: None):
        """(float32[ROWS, block] in units of log 2, masked; what `meanwhile` returned beside the product)."""

        def product(acc):
            zero = _opaque_zero()
            for side in "lr" if left else "rl":
                plgpu.barrier_wait(r["full_" + side].at[own])
                for part, low, high in plan.parts:
                    if (side == "l") == (part == "l"):
                        columns = pl.ds(low - (0 if part == "l" else plan.cut), high - low)
                        plgpu.wgmma(acc, r["q_" + part].at[zero], r["kv_" + side].at[own + zero, :, columns].T)
            found = meanwhile()
            return acc[...], found

        s, found = pl.run_scoped(product, plgpu.ACC((ROWS, size), jnp.float32))
        if plan.scaled:
            s = s * across(vector(r["scales"]))
        if plan.softcap is None:
            s = s * (plan.scale * LOG2E)
        else:  # c tanh(x / c) = c - 2c / (1 + e^(2x / c)); the chip's own tanh is good to 11 bits only
            s = jnp.exp2(s * (2 * LOG2E * plan.scale / plan.softcap))
            s = (plan.softcap * LOG2E) - (2 * plan.softcap * LOG2E) / (1 + s)
        if not masked:
            return s, found
        slots = plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=plgpu.Layout.WGMMA) + blocks.at(pair, own)
        seen = slots < over(limit, size)
        if plan.windowed:
            key, query = across(vector(r["at"])), over(asked, size)
            near = key > query - plan.mask.window
            seen = seen & (near | (key < plan.mask.sinks) if plan.mask.sinks else near)
        return jnp.where(seen, s, -jnp.inf), found

    def multiply(acc, a, b, meanwhile=lambda: ()):
        """(acc + a b, what `meanwhile` returned beside the product)."""
        if not registers:
            product = pl.run_scoped(lambda ref: _product(ref, a, b), plgpu.ACC(acc.shape, jnp.float32))
            return acc + product, meanwhile()
        kinds = jax.eval_shape(meanwhile)

        def body(refs):
            plgpu.wgmma(refs[0], a, b)
            for ref, x in zip(refs[1:], meanwhile(), strict=True):
                ref[...] = x

        places = [jnp.zeros(x.shape, x.dtype) for x in kinds]
        places = [plgpu.layout_cast(x, plgpu.Layout.WGMMA if x.ndim == 2 else by_row()) for x in places]
        acc, *found = pl.run_state(body)((plgpu.ACC.init(acc), *places))
        return acc, found

    def stat(i):
        return plgpu.load(r["stats"].at[i], layout=by_row(), optimized=False)

    def weights(s, m, place):
        """2^(s - m) in 16 bits, also in shared memory, and its sum by row."""
        p = jnp.exp2(s - over(m, size))
        p16 = p.astype(dtype)
        place[...] = p16
        r["stats"][own] = m
        plgpu.commit_smem()
        return p16, p

    def step_left(pair, carry, *, masked):
        acc, m, total = carry
        s, _ = logits(pair, masked)
        m0 = jnp.maximum(m, jnp.max(s, axis=1))
        p16, p = weights(s, m0, p0())
        plgpu.barrier_arrive(r["p0_ready"])
        decay = jnp.exp2(m - m0)
        acc = acc * over(decay, wide)
        acc, _ = multiply(acc, p16 if registers else p0(), values(0))
        total = total * decay + jnp.sum(p, axis=1)
        plgpu.barrier_arrive(r["free_l"].at[0])
        plgpu.barrier_wait(r["p1_ready"])
        m1 = stat(1)
        decay = jnp.exp2(m0 - m1)
        acc = acc * over(decay, wide)
        plgpu.barrier_wait(r["full_l"].at[1])
        acc, _ = multiply(acc, r["p1"], values(1))
        plgpu.barrier_arrive(r["free_l"].at[1])
        return acc, m1, total * decay

    def step_right(pair, carry, *, masked):
        acc, m, total = carry

        def rescaled():
            plgpu.barrier_wait(r["p0_ready"])
            m0 = stat(0)
            return m0, lax.optimization_barrier(acc * over(jnp.exp2(m - m0), wide))

        s, (m0, acc) = logits(pair, masked, rescaled)

        def softmax():
            m1 = jnp.maximum(m0, jnp.max(s, axis=1))
            p16, p = weights(s, m1, r["p1"])
            plgpu.barrier_arrive(r["p1_ready"])
            return p16, m1, total * jnp.exp2(m - m1) + jnp.sum(p, axis=1)

        plgpu.barrier_wait(r["full_r"].at[0])
        acc, (p16, m1, total) = multiply(acc, p0(), values(0), softmax)
        plgpu.barrier_arrive(r["free_r"].at[0])
        acc = acc * over(jnp.exp2(m0 - m1), wide)
        acc, _ = multiply(acc, p16 if registers else r["p1"], values(1))
        plgpu.barrier_arrive(r["free_r"].at[1])
        return acc, m1, total

    plgpu.barrier_wait(r["q_full"])
    carry = (
        plgpu.layout_cast(jnp.zeros((ROWS, wide), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), by_row()),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row()),
    )
    step = step_left if left else step_right
    if not plan.windowed:
        carry = lax.fori_loop(0, blocks.plain, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(blocks.plain, blocks.pairs, functools.partial(step, masked=True), carry)
    _finish(plan, r, where, limit > 0, carry, left=left)


def _opaque_zero():
    """0, but computed anew: descriptors that hang on it are not hoisted out of the loop, where they would spill."""
    return lax.optimization_barrier(jnp.int32(0))


def _product(ref, a, b):
    plgpu.wgmma(ref, a, b)
    return ref[...]


def _by_row(plan, r, where, name: str):
    """int32[ROWS] of a number a query token; 0 where a row has none."""
    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row())
    out = plgpu.layout_cast(jnp.full((ROWS,), r[name][where["token"]], jnp.int32), by_row())
    for i in range(1, plan.tiles.tokens):
        here = where["count"] > i
        value = jnp.where(here, r[name][where["token"] + jnp.where(here, i, 0)], 0)
        out = jnp.where(rows >= i * plan.tiles.heads, value, out)
    return out


def _finish(plan, r, where, real, carry, *, left: bool):
    """Normalises and stores one half of the columns; warpgroup 0 stores the log of the sum as well."""
    acc, m, total = carry
    low, high = (0, plan.cut) if left else (plan.cut, plan.rank)
    columns = pl.ds(low, high - low)
    # Each has summed the weights of its own blocks. Rows 0 and 2 are free: their last readers have passed a later barrier.
    r["stats"][0 if left else 2] = total
    plgpu.barrier_arrive(r["sums"])
    plgpu.barrier_wait(r["sums"])
    total = total + plgpu.load(r["stats"].at[2 if left else 0], layout=by_row(), optimized=False)
    total = jnp.where(real, total, 0.0)
    m = jnp.where(total > 0, m, FLOOR)
    if plan.sinks:
        sink = plgpu.load(r["sink"].at[where["head_block"]], layout=by_row(), optimized=False)
        top = jnp.maximum(m, sink)
        decay = jnp.exp2(m - top)
        m, total = top, total * decay + jnp.exp2(sink - top)
        acc = acc * lax.broadcast_in_dim(jnp.where(real, decay, 0.0), acc.shape, [0])
    factor = jnp.where(real, 1 / jnp.where(total > 0, total, 1.0), 0.0)
    out = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    log = jnp.where(total > 0, m + jnp.log2(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    if plan.tiles.splits > 1:
        r["out"].at[where["program"], :, columns][...] = out
        if left:
            r["lse"].at[where["program"]][...] = log
    else:
        # Both warpgroups have read the queries for the last time: their place takes the output.
        place = (r["q_l"] if left else r["q_r"]).at[0]
        place[...] = out.astype(place.dtype)
        if left:
            r["stats"][1] = log / LOG2E
        plgpu.commit_smem()
        heads = plan.tiles.heads

        def store(i):
            to = pl.ds((where["token"] + i) * plan.heads + where["head_block"] * heads, heads)
            at = pl.ds(i * heads, heads)
            plgpu.copy_smem_to_gmem(place.at[at], r["out"].at[to, columns])
            if left:
                plgpu.copy_smem_to_gmem(r["stats"].at[1, at], r["lse"].at[to])

        store(0)
        for i in range(1, plan.tiles.tokens):
            pl.when(where["count"] > i)(functools.partial(store, i))
        plgpu.wait_smem_to_gmem(0)


def _scratch(plan: _Plan, dtype):
    size = plan.tiles.block
    tile = (plgpu.TilingTransform((8, plan.unit)), plgpu.SwizzleTransform(2 * plan.unit))
    weights = plgpu.SMEM((ROWS, size), dtype, transforms=tile)
    lined = lambda dtype: plgpu.SMEM((2, plan.copies, max(plan.piece, 32)), dtype)  # noqa: E731 - 128-byte aligned
    found = {
        "p1": weights,
        "stats": plgpu.SMEM((3, ROWS), jnp.float32),
    }
    if not plan.crosses_in_block:
        found["p0"] = weights
    if plan.windowed:
        found["at"] = lined(jnp.int32)
    if plan.scaled:
        found["scales"] = lined(jnp.float32)
    for part, low, high in plan.parts:
        found["q_" + part] = plgpu.SMEM((1, ROWS, high - low), dtype, transforms=tile)
    for side, low, high in plan.halves:
        found["kv_" + side] = plgpu.SMEM((2, size, high - low), dtype, transforms=tile)
        found["full_" + side] = plgpu.Barrier(num_barriers=2, num_arrivals=plan.arrivals(side))
        found["tail_" + side] = plgpu.Barrier(num_arrivals=plan.arrivals(side))
        if plan.tiles.cluster:
            found["free_" + side] = plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=2)
        else:
            found["free_" + side] = plgpu.Barrier(num_barriers=2)
    found |= {name: plgpu.Barrier() for name in ("p0_ready", "p1_ready")}
    found["sums"] = plgpu.Barrier(num_arrivals=2)
    found["q_full"] = plgpu.Barrier(num_arrivals=len(plan.parts))
    return found


def _attend(plan: _Plan, q, pool, table, lengths, items, limits, *extra):
    """q [T * N, H], pool [slots, H] -> out [T * N, R], lse float32[T * N], or the parts of splits."""
    if plan.tiles.splits > 1:
        wide = -(-plan.rank // 128) * 128  # what the threads of a warpgroup load evenly
        shapes = ((plan.programs, ROWS, wide), jnp.float32), ((plan.programs, ROWS), jnp.float32)
    else:
        shapes = ((q.shape[0], plan.rank), q.dtype), ((q.shape[0],), jnp.float32)
    cluster = {"cluster": (2,), "cluster_names": ("pair",)} if plan.tiles.cluster else {}
    kernel = dependent(
        functools.partial(_kernel, plan),
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        scratch_types=_scratch(plan, q.dtype),
        grid=(plan.programs // (2 if plan.tiles.cluster else 1),),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        kernel_name="mla",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # between warpgroups: barriers that all threads arrive at; inside: commit_smem
        ),
        **cluster,
    )
    return kernel(q, pool, table, lengths, items, limits, *extra)


# --- Around it -------------------------------------------------------------------------------------------------------


def _merge(plan: _Plan, tokens: int, dtype, parts, sums, items, sink):
    """Parts of splits (values, log2 of the sum) -> (out [T * N, R], lse float32[T * N]); sink logits join here."""
    t, wide = plan.tiles, parts.shape[-1]
    rows = t.tokens * t.heads
    each = max(n for n in (1, 2, 4, 8) if n * t.splits <= 32 or n == 1)  # rows a program

    def body(parts_g, sums_g, items_g, *refs):
        out_g, lse_g = refs[-2:]
        item, index = lax.axis_index("item"), lax.axis_index("row") * each
        head_block, row = lax.div(index, jnp.int32(rows)), lax.rem(index, jnp.int32(rows))
        token, count = items_g[item, 1], items_g[item, 2]

        # Nothing waits for the item's numbers before the last stores.
        at = [(item * t.splits + split) * plan.head_blocks + head_block for split in range(t.splits)]
        values = [[parts_g.at[i, row + n][...] for i in at] for n in range(each)]
        logs = [[sums_g[i, row + n] for i in at] for n in range(each)]
        values = lax.optimization_barrier(values)

        def combine(row, values, logs):
            head = head_block * t.heads + lax.rem(row, jnp.int32(t.heads))
            known = [*logs, refs[0][head]] if sink is not None else logs
            top = jnp.maximum(functools.reduce(jnp.maximum, known), FLOOR)
            weights = [jnp.exp2(x - top) for x in known]
            total = functools.reduce(jnp.add, weights)
            factor = 1 / jnp.where(total > 0, total, 1.0)
            out = functools.reduce(jnp.add, (w * x for w, x in zip(weights, values, strict=False)))
            lse = jnp.where(total > 0, (top + jnp.log2(jnp.where(total > 0, total, 1.0))) / LOG2E, -jnp.inf)
            return (out * factor).astype(dtype), lse

        found = [combine(row + n, *x) for n, x in enumerate(zip(values, logs, strict=True))]

        @pl.when(lax.div(row, jnp.int32(t.heads)) < count)
        def _():
            for n, (out, lse) in enumerate(found):
                offset, head = lax.div(row + n, jnp.int32(t.heads)), lax.rem(row + n, jnp.int32(t.heads))
                to = (token + offset) * plan.heads + head_block * t.heads + head
                out_g.at[to][...] = out
                lse_g[to] = lse

    logits = [] if sink is None else [sink.astype(jnp.float32) * LOG2E]
    out, lse = dependent(
        body,
        out_type=[
            jax.ShapeDtypeStruct((tokens * plan.heads, wide), dtype),
            jax.ShapeDtypeStruct((tokens * plan.heads,), jnp.float32),
        ],
        grid=(plan.items, plan.head_blocks * rows // each),
        grid_names=("item", "row"),
        num_threads=1,
        thread_name="wg",
        kernel_name="mla_merge",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(parts, sums, items, *logits)
    return out[:, : plan.rank], lse


def _call(plan: _Plan, q, pool, table, lengths, items, limits, asked, positions, sink, logit_scale):
    """-> (out [T, N, R], lse float32[T, N])."""
    tokens = q.shape[0] // plan.heads
    inner = dataclasses.replace(plan, sinks=plan.sinks and plan.tiles.splits == 1)
    extra = []
    if plan.windowed:
        extra += [asked, positions.reshape(-1)]
    if plan.scaled:
        extra.append(logit_scale.astype(jnp.float32).reshape(-1))
    if inner.sinks:
        row = jnp.arange(ROWS) % plan.tiles.heads
        extra.append(sink.astype(jnp.float32).reshape(plan.head_blocks, -1)[:, row] * LOG2E)
    flat = pool.reshape(-1, plan.width)
    out, lse = _attend(inner, q, flat, table, lengths, items, limits, *extra)
    if plan.tiles.splits > 1:
        out, lse = _merge(plan, tokens, q.dtype, out, lse, items, sink)
    return out.reshape(tokens, plan.heads, plan.rank), lse.reshape(tokens, plan.heads)


@functools.partial(jax.jit, static_argnums=0)
def _decode(plan: _Plan, q, pool, positions, table, lengths, q_positions, sink, logit_scale):
    b, queries, n, h = q.shape
    size = plan.tiles.tokens
    each = -(-queries // size)
    lengths = jnp.minimum(lengths[0], table.shape[2] * plan.page).astype(jnp.int32)
    real = q_positions >= 0
    # A row's queries are its newest slots.
    later = jnp.sum(real[:, None, :] & jnp.tri(queries, k=-1, dtype=bool).T, axis=2)
    slot = lengths[:, None] - 1 - later
    limit = jnp.where(real, slot + 1 if plan.mask.causal else lengths[:, None], 0)
    pad = ((0, 0), (0, each * size - queries))
    blocked = lambda x, value: jnp.pad(x, pad, constant_values=value).reshape(b, each, size)  # noqa: E731
    token = jnp.arange(b)[:, None] * queries + jnp.arange(each) * size
    count = jnp.broadcast_to(jnp.minimum(queries - jnp.arange(each) * size, size), (b, each))
    end = jnp.max(blocked(limit, 0), axis=2)
    low = jnp.maximum(jnp.min(blocked(jnp.where(real, slot, 2**30), 2**30), axis=2), 0)
    row = jnp.broadcast_to(jnp.arange(b)[:, None], (b, each))
    items = jnp.stack([row, token, count, end, low], axis=-1).reshape(-1, 5).astype(jnp.int32)
    args = (table[0], lengths, items, limit.reshape(-1).astype(jnp.int32), q_positions.reshape(-1), positions)
    out, lse = _call(plan, q.reshape(-1, h), pool, *args, sink, logit_scale)
    return out.reshape(b, queries, n, plan.rank), lse.reshape(b, queries, n)


@functools.partial(jax.jit, static_argnums=0)
def _ragged(plan: _Plan, q, pool, ragged: Ragged, positions, table, lengths, sink, logit_scale):
    tokens, n, h = q.shape
    size, batch = plan.tiles.tokens, ragged.batch
    lengths = jnp.minimum(lengths[0], table.shape[2] * plan.page).astype(jnp.int32)
    count = -(-ragged.counts // size)  # items a row
    stop = jnp.cumsum(count)
    index = jnp.arange(plan.items, dtype=jnp.int32)
    row = jnp.sum(index[:, None] >= stop[None, :], axis=1, dtype=jnp.int32)
    real = row < batch
    row = jnp.minimum(row, batch - 1)
    offset = (stop[row] - 1 - index) * size  # a row's last tokens first: they see most
    number = jnp.clip(ragged.counts[row] - offset, 0, size)
    low = jnp.maximum(lengths[row] - ragged.counts[row] + offset, 0)
    end = low + number if plan.mask.causal else lengths[row]
    # The items that are left give zeros to the padding at the end.
    rest = jnp.sum(ragged.counts) + (index - stop[-1]) * size
    given = [row, ragged.starts[row] + offset, number, end, low]
    padded = [row, rest, jnp.clip(tokens - rest, 0, size), 0 * row, 0 * row]
    items = jnp.where(real[:, None], jnp.stack(given, axis=-1), jnp.stack(padded, axis=-1)).astype(jnp.int32)
    mine = jnp.minimum(ragged.rows, batch - 1)
    within = jnp.arange(tokens, dtype=jnp.int32) - ragged.starts[mine]
    limit = lengths[mine] - ragged.counts[mine] + within + 1 if plan.mask.causal else lengths[mine]
    limit = jnp.where(ragged.rows < batch, limit, 0).astype(jnp.int32)
    args = (table[0], lengths, items, limit, ragged.positions, positions)
    out, lse = _call(plan, q.reshape(-1, h), pool, *args, sink, logit_scale)
    return out, lse


def paged_decode(
    q,
    k_pool,
    v_pool=None,
    *,
    positions,
    table,
    lengths,
    q_positions,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    logit_scale=None,
    value_dim=None,
    want_scores=False,
    tiles: Tiles | None = None,
):
    """Attention of Q = 1 .. 8 new tokens a row over its cached latents, their own included.

    q [B, Q, N, R + Hr]; k_pool [pages + 1, 1, P, R + Hr] in q's dtype, v_pool None, value_dim R; positions
    int32[pages + 1, P]; table int32[1, B, pages]; lengths int32[1, B]; q_positions int32[B, Q], -1 where there is no query:
    a row's queries are its newest slots; logit_scale [pages + 1, S, P], of which row b takes those of b mod S; sink_logits [N].
    -> (out [B, Q, N, R], lse float32[B, Q, N], None).
    Raises: LoweringError for what the kernel does not take.
    """
    op = "paged_decode"
    if q.ndim != 4 or not 1 <= q.shape[1] <= QUERIES:
        _refuse(op, "q", f"{q.dtype}{list(q.shape)}", f"[B, 1 to {QUERIES}, N, R + Hr]")
    b, queries = q.shape[:2]
    _check(op, q, k_pool, v_pool, table, lengths, b, sink_logits, logit_scale, value_dim, want_scores)
    if q_positions.shape != (b, queries):
        _refuse(op, "q_positions", list(q_positions.shape), [b, queries])
    site = (q, k_pool, table, mask, scale, softcap, sink_logits, logit_scale, value_dim)
    plan = _plan(*site, queries, b * queries, tiles)
    plan = dataclasses.replace(plan, items=b * -(-queries // plan.tiles.tokens))
    return (*_decode(plan, q, k_pool, positions, table, lengths, q_positions, sink_logits, logit_scale), None)


def ragged_paged_attention(
    q,
    k_pool,
    v_pool=None,
    *,
    ragged: Ragged,
    positions,
    table,
    lengths,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    logit_scale=None,
    value_dim=None,
    want_scores=False,
    tiles: Tiles | None = None,
):
    """`paged_decode` for T ragged tokens q [T, N, R + Hr], prefill chunks and decodes mixed, causal inside a chunk.

    -> (out [T, N, R], lse float32[T, N], None); what padding tokens get is unspecified.
    Raises: LoweringError for what the kernel does not take.
    """
    op = "ragged_paged_attention"
    if q.ndim != 3:
        _refuse(op, "q", f"{q.dtype}{list(q.shape)}", "[T, N, R + Hr]")
    _check(op, q, k_pool, v_pool, table, lengths, ragged.batch, sink_logits, logit_scale, value_dim, want_scores)
    tokens, batch = q.shape[0], ragged.batch
    site = (q, k_pool, table, mask, scale, softcap, sink_logits, logit_scale, value_dim)
    plan = _plan(*site, ragged.longest, tokens, tiles)
    size = plan.tiles.tokens
    plan = dataclasses.replace(plan, items=min(tokens, (tokens + batch * (size - 1)) // size + 1))
    return (*_ragged(plan, q, k_pool, ragged, positions, table, lengths, sink_logits, logit_scale), None)


def _refuse(op: str, argument: str, got, allowed):
    raise LoweringError(f"{op} (mla, mosaic_gpu/sm90): {argument} {got}; allowed: {allowed}")


def _dims(width: int, rank: int) -> str | None:
    """None, or why latents of these sizes are refused."""
    if rank % 32 or width % 32 or not 64 <= rank <= 512 or width < rank:
        return f"latents of {rank} + {width - rank} numbers; allowed: multiples of 32, rank 64 to 512"
    if _bytes(rank, width, 32, 2) > SMEM:
        return f"latents of {rank} + {width - rank} numbers; at most 768 in all"
    return None


def _check(op, q, pool, v_pool, table, lengths, batch, sink_logits, logit_scale, value_dim, want_scores):
    if v_pool is not None:
        _refuse(op, "v_pool", "given", "None: values are the first value_dim numbers of the keys")
    if want_scores:
        _refuse(op, "want_scores", True, "False")
    if is_qtensor(pool):
        _refuse(op, "k_pool", f"packed as {pool.format}", "a dense pool")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or pool.dtype != q.dtype:
        _refuse(op, "dtypes", f"q {q.dtype}, k_pool {pool.dtype}", "both bfloat16 or both float16")
    heads, width = q.shape[-2:]
    if pool.ndim != 4 or pool.shape[1] != 1 or pool.shape[3] != width or pool.shape[2] not in PAGES:
        _refuse(op, "k_pool", list(pool.shape), f"[pages + 1, 1, {PAGES}, {width}]")
    if value_dim is None or not isinstance(value_dim, int):
        _refuse(op, "value_dim", value_dim, "the rank of the latents")
    if _dims(width, value_dim):
        _refuse(op, "q and value_dim", *_dims(width, value_dim).split("; "))
    if heads % 8:
        _refuse(op, "heads", heads, "multiples of 8")
    if table.ndim != 3 or table.shape[:2] != (1, batch):
        _refuse(op, "table", list(table.shape), f"[1, {batch}, pages]")
    if lengths.shape != (1, batch):
        _refuse(op, "lengths", list(lengths.shape), [1, batch])
    if sink_logits is not None and sink_logits.shape != (heads,):
        _refuse(op, "sink_logits", list(sink_logits.shape), [heads])
    if logit_scale is None:
        return
    scales = logit_scale.shape[1] if logit_scale.ndim == 3 and op == "paged_decode" else 1
    if logit_scale.shape != (pool.shape[0], scales, pool.shape[2]):
        _refuse(op, "logit_scale", list(logit_scale.shape), list(pool.shape[:3]))
    if scales > 1 and sink_logits is not None:
        _refuse(op, "sink_logits", list(sink_logits.shape), "None with a logit scale by head")


_tiles = tiles


def _plan(q, pool, table, mask, scale, softcap, sink_logits, logit_scale, rank, queries, tokens, chosen) -> _Plan:
    heads, width = q.shape[-2:]
    page, pages = pool.shape[2], table.shape[2]
    extras = (mask.window is not None) + (logit_scale is not None)
    sizes = {"heads": heads, "rank": rank, "width": width, "queries": queries, "tokens": tokens, "extras": extras}
    return _Plan(
        heads=heads,
        width=width,
        rank=rank,
        page=page,
        tiles=chosen or _tiles(**sizes, pages=pages, page_size=page),
        items=tokens,
        mask=mask,
        scale=float(1 / math.sqrt(width) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        scaled=0 if logit_scale is None else logit_scale.shape[1],
        sinks=sink_logits is not None,
    )


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why these kernels do not take the call site."""
    if (getattr(target, "platform", None), getattr(target, "arch", None)) != ("gpu", "sm90"):
        return "needs a Hopper GPU (sm90)"
    cache = args["cache"]
    if cache is None or cache.kind != "latent":
        return f"reads MLA latents, not {'no' if cache is None else f'a {cache.kind}'} cache"
    if reason := cache_reason(cache):
        return reason
    if cache.format is not None:
        return f"reads latents without a format, not {cache.format}"
    if cache.dtype not in ("bfloat16", "float16"):
        return f"latents of {cache.dtype}; allowed: bfloat16, float16"
    if args.get("value_dim") is None:
        return "needs value_dim, the rank of the latents"
    if args["kv_heads"] != 1:
        return f"one latent head, not {args['kv_heads']}"
    if args["heads"] % 8:
        return f"{args['heads']} heads; allowed: multiples of 8"
    page = args.get("page_size")
    if page is not None and page not in PAGES:
        return f"page size {page}; allowed: 16, 32, 64, 128"
    if args.get("want_scores"):
        return "does not return scores"
    if args.get("logit_scales", 0) > 1:
        return f"one scale of logits a token, not {args['logit_scales']}"
    return _dims(args["head_dim"], args["value_dim"])
