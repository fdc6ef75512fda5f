"""Attention over paged MLA latents on Hopper (sm90), in Pallas Mosaic GPU: `paged_decode` and `ragged_paged_attention`.

A program owns 64 rows (query token x head) and walks blocks of 64 cached tokens, in pairs. A float32 output of 64 x 512
fills 256 registers of each thread of one warpgroup, so two warpgroups own half of its columns each; a third one copies.
Warpgroup 0 computes the logits of the first block of a pair, warpgroup 1 those of the second; the weights cross through
shared memory, so that one softmax runs beside the other warpgroup's products:

    left    S0 = Q K0'   m0 = max(m1, S0)   O_l += P0 V0_l    P0 *= 2^(m0 - m1)    O_l += P1 V1_l
    right   S1 = Q K1'   m1 = max(m0, S1)   O_r += P1 V1_r                         O_r += P0 V0_r

Keys and values are the same tile in shared memory, read once. Source of the schedule ("seesaw"): FlashMLA, "A Deep-Dive
Into the New Flash MLA Kernel", 2025; of the online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optx.cache import Ragged
from optx.errors import LoweringError
from optx.pallas.attention.reference import Mask
from optx.tensor import is_qtensor

ROWS = 64  # rows of a program: the M of a Hopper matmul
BLOCK = 64  # cached tokens a block
CORES = 132  # multiprocessors of an H100 or H200
FLOOR = -1e30  # running maximum before the first key: finite, so that masked logits give 2^-inf = 0 and never NaN
FAR = 2**31 - 1  # position of a slot that holds nothing
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work is cut."""

    tokens: int  # query tokens a program
    heads: int  # heads a program; tokens * heads <= ROWS
    splits: int  # programs that share the cached tokens of a row


def tiles(*, heads: int, queries: int, items: int, pages: int, page_size: int) -> Tiles:
    """Tiles from abstract shapes. queries: most tokens a row; items: blocks of query tokens if each had one token."""
    block = max(n for n in range(8, min(heads, ROWS) + 1, 8) if heads % n == 0)
    tokens = min(queries, ROWS // heads) if block == heads else 1
    programs = -(-items // tokens) * (heads // block)
    pairs = -(-pages * page_size // (2 * BLOCK))
    splits = max(1, min(CORES // programs, pairs // 2, 64)) if programs <= CORES // 2 else 1
    return Tiles(tokens=tokens, heads=block, splits=splits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a kernel is assembled for."""

    heads: int
    width: int  # R + Hr
    rank: int  # R
    page: int
    tiles: Tiles
    items: int
    queries: int  # most query tokens a row
    mask: Mask
    scale: float
    softcap: float | None
    scaled: bool  # a logit scale a token
    sinks: bool  # a logit a head

    @property
    def cut(self) -> int:
        """Columns [0, cut) of the values belong to warpgroup 0."""
        return -(-self.rank // 128) * 64

    @property
    def head_blocks(self) -> int:
        return self.heads // self.tiles.heads

    @property
    def programs(self) -> int:
        return self.items * self.tiles.splits * self.head_blocks

    @property
    def copies(self) -> int:
        """Copies a block: pages of it."""
        return max(1, BLOCK // self.page)


def _kernel(plan: _Plan, *refs):
    names = ["q", "pool", "positions", "table", "lengths", "items", "asked"]
    names += ["logit_scale"] * plan.scaled + ["sink"] * plan.sinks + ["out", "lse"]
    names += ["q_smem", "kv", "p1", "stats", "at"] + ["p0"] * (plan.width == plan.rank)
    names += [
        "full_l",
        "full_r",
        "free_l",
        "free_r",
        "m0_ready",
        "p0_ready",
        "p1_ready",
        "sums",
        "q_full",
        "tail_l",
        "tail_r",
    ]
    r = dict(zip(names, refs, strict=True))
    # Once the first block's logits are known, the place of its rope numbers is free: there the weights cross.
    own_p0 = r.get("p0")
    r["p0"] = lambda: r["kv"].at[0, :, pl.ds(plan.rank, BLOCK)] if own_p0 is None else own_p0

    index = lax.axis_index("program")
    head_block = lax.rem(index, plan.head_blocks)
    split = lax.rem(lax.div(index, plan.head_blocks), plan.tiles.splits)
    item = lax.div(index, plan.head_blocks * plan.tiles.splits)
    row, token, count, newer = (r["items"][item, i] for i in range(4))

    @pl.when(count > 0)
    def _():
        length = r["lengths"][row]
        blocks = _Blocks.of(plan, length, count, newer, split)
        where = {"row": row, "token": token, "count": count, "head_block": head_block, "program": index}
        wg = lax.axis_index("wg")
        pl.when(wg == 0)(lambda: _consume(plan, r, blocks, where, left=True))
        pl.when(wg == 1)(lambda: _consume(plan, r, blocks, where, left=False))
        pl.when(wg == 2)(lambda: _produce(plan, r, blocks, where, length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Which blocks a program reads: the first `head` ones (attention sinks), then those from `first` on."""

    head: int
    first: jax.Array
    start: jax.Array  # first pair of this split
    pairs: jax.Array
    end: jax.Array  # slots past it are seen by none of the rows
    whole: jax.Array  # blocks that end at or before this slot need no mask

    @classmethod
    def of(cls, plan, length, count, newer, split):
        """newer: tokens of the row after this program's; -1: unknown (rows whose queries are fewer than their places)."""
        exact = newer >= 0
        end = length - jnp.where(exact, newer, 0) if plan.mask.causal else length
        span = jnp.where(exact, count, plan.queries)
        head, first, whole = 0, jnp.int32(0), end
        if plan.mask.causal:
            whole = jnp.maximum(length - jnp.where(exact, newer, 0) - span, 0)
        if plan.mask.window is not None:
            # Positions are distinct, so only the last window + span - 1 slots can lie inside a window.
            head = -(-plan.mask.sinks // BLOCK)
            oldest = jnp.maximum(end - min(plan.mask.window, 2**30) - span + 1, 0) if plan.mask.causal else jnp.int32(0)
            first = jnp.maximum(lax.div(oldest, jnp.int32(BLOCK)), head)
            whole = jnp.int32(0)
        last = lax.div(end + (BLOCK - 1), jnp.int32(BLOCK))
        total = jnp.minimum(head, last) + jnp.maximum(last - first, 0)
        pairs = lax.div(total + 1, jnp.int32(2))
        share = lax.div(pairs + (plan.tiles.splits - 1), jnp.int32(plan.tiles.splits))
        start = split * share
        return cls(
            head=head,
            first=first,
            start=start,
            pairs=jnp.clip(pairs - start, 0, share),
            end=end,
            whole=whole,
        )

    def at(self, pair, slot: int):
        """Block of the row's listing that `slot` of the program's pair holds."""
        block = 2 * (self.start + pair) + slot
        return block if not self.head else jnp.where(block < self.head, block, block - self.head + self.first)


def _produce(plan, r, blocks, where, length):
    """The copying warpgroup: pages into shared memory, by halves of columns, as soon as both uses of a half are over."""
    plgpu.set_max_registers(40, action="decrease")
    kv, cut, page = r["kv"], plan.cut, plan.page
    rows = plan.tiles.tokens * plan.tiles.heads
    first_row = where["token"] * plan.heads + where["head_block"] * plan.tiles.heads
    plgpu.copy_gmem_to_smem(r["q"].at[pl.ds(first_row, rows)], r["q_smem"].at[pl.ds(0, rows)], r["q_full"])
    last_page = jnp.maximum(lax.div(length - 1, jnp.int32(page)), 0)
    halves = {"l": (0, cut), "r": (cut, plan.width)}

    def copy(side, slot, listed, inner, barrier):
        low, high = halves[side]
        for i, at in enumerate(listed):
            size = min(page, BLOCK)
            token = at * page + inner
            dst = pl.ds(i * size, size)
            columns = pl.ds(low, high - low)
            plgpu.copy_gmem_to_smem(r["pool"].at[pl.ds(token, size), columns], kv.at[slot, dst, columns], barrier)
            if side == "r":
                plgpu.copy_gmem_to_smem(r["positions"].at[pl.ds(token, size)], r["at"].at[slot, dst], barrier)
                if plan.scaled:
                    scale = r["stats"].at[2 + slot, dst]
                    plgpu.copy_gmem_to_smem(r["logit_scale"].at[pl.ds(token, size)], scale, barrier)

    def clear(side, slot, valid):
        """Zeros where nothing is stored: NaN there would survive a weight of 0."""
        low, high = halves[side]
        line = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        for column in range(low, high, 64):
            ref = kv.at[slot, :, pl.ds(column, 64)]
            held = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
            keep = lax.broadcast_in_dim(line, held.shape, [0]) < valid
            ref[...] = jnp.where(keep, held, jnp.zeros_like(held))

    def load(side, slot, pair, listed, inner, valid):
        full, free = r["full_" + side].at[slot], r["free_" + side].at[slot]
        pl.when(pair > 0)(lambda: plgpu.barrier_wait(free))

        @pl.when(valid >= BLOCK)
        def _():
            copy(side, slot, listed, inner, full)

        @pl.when(valid < BLOCK)
        def _():
            @pl.when(valid > 0)
            def _():
                copy(side, slot, listed, inner, r["tail_" + side])
                plgpu.barrier_wait(r["tail_" + side])

            clear(side, slot, valid)
            plgpu.commit_smem()
            for _ in range(_arrivals(plan, side)):
                plgpu.barrier_arrive(full)

    @pl.loop(0, blocks.pairs)
    def _(pair):
        found = []
        for slot in range(2):
            token = blocks.at(pair, slot) * BLOCK
            at = lax.div(token, jnp.int32(page))
            listed = [r["table"][where["row"], jnp.minimum(at + i, last_page)] for i in range(plan.copies)]
            found.append((listed, lax.rem(token, jnp.int32(page)) if page > BLOCK else 0, length - token))
        # In the order in which the consumers let go of them.
        for side, slot in (("l", 0), ("r", 0), ("r", 1), ("l", 1)):
            load(side, slot, pair, *found[slot])


def _arrivals(plan: _Plan, side: str) -> int:
    """Copies that fill one half of a block; the right one brings positions and scales along."""
    return plan.copies * (1 if side == "l" else 2 + plan.scaled)


def _consume(plan, r, blocks, where, *, left: bool):
    """A computing warpgroup: logits of its block of each pair, and its half of the output's columns."""
    plgpu.set_max_registers(232, action="increase")
    kv, cut, own = r["kv"], plan.cut, 0 if left else 1
    columns = pl.ds(0, cut) if left else pl.ds(cut, plan.rank - cut)
    wide = cut if left else plan.rank - cut
    line = plgpu.Layout.WGMMA.reduce(1)
    dtype = kv.dtype
    over = lambda x, size: lax.broadcast_in_dim(x, (ROWS, size), [0])  # noqa: E731
    asked = _asked(plan, r, where)

    def logits(block):
        """float32[ROWS, BLOCK] in units of log 2, masked."""

        def product(acc):
            halves = [("full_l", 0, cut), ("full_r", cut, plan.width)]
            for name, low, high in halves if left else halves[::-1]:
                plgpu.barrier_wait(r[name].at[own])
                part = pl.ds(low, high - low)
                plgpu.wgmma(acc, r["q_smem"].at[:, part], kv.at[own, :, part].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        if plan.scaled:
            by_token = plgpu.load(r["stats"].at[2 + own], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            s = s * lax.broadcast_in_dim(by_token, s.shape, [1])
        if plan.softcap is None:
            s = s * (plan.scale * LOG2E)
        else:  # c tanh(x / c) = c - 2c / (1 + e^(2x / c)); the chip's own tanh is good to 11 bits only
            s = jnp.exp2(s * (2 * LOG2E * plan.scale / plan.softcap))
            s = (plan.softcap * LOG2E) - (2 * plan.softcap * LOG2E) / (1 + s)
        return lax.cond(block * BLOCK + BLOCK > blocks.whole, lambda s: masked(s, block), lambda s: s, s)

    def masked(s, block):
        slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
        at = plgpu.load(r["at"].at[own], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        at = jnp.where(slots + block * BLOCK < blocks.end, at, FAR)
        key, query = lax.broadcast_in_dim(at, s.shape, [1]), over(asked, BLOCK)
        seen = key <= query if plan.mask.causal else key < FAR
        if plan.mask.window is not None:
            near = key > query - plan.mask.window
            seen = seen & (near | (key < plan.mask.sinks) if plan.mask.sinks else near)
        return jnp.where(seen, s, -jnp.inf)

    def multiply(acc, body):
        return pl.run_state(body)(plgpu.ACC.init(acc))

    def step_left(pair, carry):
        acc, m, total = carry
        s = logits(blocks.at(pair, 0))
        m0 = jnp.maximum(m, jnp.max(s, axis=1))
        r["stats"][0] = m0
        plgpu.barrier_arrive(r["m0_ready"])
        decay = jnp.exp2(m - m0)
        p = jnp.exp2(s - over(m0, BLOCK))
        total = total * decay + jnp.sum(p, axis=1)
        p16 = p.astype(dtype)
        acc = acc * over(decay, wide)

        def first(acc):
            plgpu.wgmma(acc, p16, kv.at[0, :, columns])
            plgpu.barrier_wait(r["p1_ready"])
            m1 = plgpu.load(r["stats"].at[1], layout=line, optimized=False)
            r["p0"]()[...] = (p * over(jnp.exp2(m0 - m1), BLOCK)).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(r["p0_ready"])

        acc = multiply(acc, first)
        plgpu.barrier_arrive(r["free_l"].at[0])
        m1 = plgpu.load(r["stats"].at[1], layout=line, optimized=False)
        decay = jnp.exp2(m0 - m1)
        acc = acc * over(decay, wide)
        plgpu.barrier_wait(r["full_l"].at[1])
        acc = multiply(acc, lambda acc: plgpu.wgmma(acc, r["p1"], kv.at[1, :, columns]))
        plgpu.barrier_arrive(r["free_l"].at[1])
        return acc, m1, total * decay

    def step_right(pair, carry):
        acc, m, total = carry
        s = logits(blocks.at(pair, 1))
        top = jnp.max(s, axis=1)
        plgpu.barrier_wait(r["m0_ready"])
        m1 = jnp.maximum(plgpu.load(r["stats"].at[0], layout=line, optimized=False), top)
        p = jnp.exp2(s - over(m1, BLOCK))
        p16 = p.astype(dtype)
        r["p1"][...] = p16
        r["stats"][1] = m1
        plgpu.commit_smem()
        plgpu.barrier_arrive(r["p1_ready"])
        decay = jnp.exp2(m - m1)
        total = total * decay + jnp.sum(p, axis=1)
        acc = acc * over(decay, wide)
        plgpu.barrier_wait(r["full_r"].at[0])

        def both(acc):
            plgpu.wgmma(acc, p16, kv.at[1, :, columns])
            plgpu.barrier_wait(r["p0_ready"])
            plgpu.wgmma(acc, r["p0"](), kv.at[0, :, columns])
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(r["free_r"].at[1])

        acc = multiply(acc, both)
        plgpu.barrier_arrive(r["free_r"].at[0])
        return acc, m1, total

    plgpu.barrier_wait(r["q_full"])
    acc = plgpu.layout_cast(jnp.zeros((ROWS, wide), jnp.float32), plgpu.Layout.WGMMA)
    m = plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), line)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), line)
    carry = lax.fori_loop(0, blocks.pairs, step_left if left else step_right, (acc, m, total))
    _finish(plan, r, where, asked, carry, left=left)


def _asked(plan, r, where):
    """int32[ROWS]: position of each row's query, -1 where there is none."""
    line = plgpu.Layout.WGMMA.reduce(1)
    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=line)
    asked = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.int32), line) + r["asked"][where["token"]]
    for i in range(1, plan.tiles.tokens):
        here = where["count"] > i
        position = jnp.where(here, r["asked"][where["token"] + jnp.where(here, i, 0)], -1)
        asked = jnp.where(rows >= i * plan.tiles.heads, position, asked)
    return asked


def _finish(plan, r, where, asked, carry, *, left: bool):
    """Normalises and stores one half of the columns; warpgroup 0 stores the log of the sum as well."""
    acc, m, total = carry
    line = plgpu.Layout.WGMMA.reduce(1)
    low, high = (0, plan.cut) if left else (plan.cut, plan.rank)
    # Each has summed the weights of its own blocks. Rows 0 and 2 are free: their last readers have passed a later barrier.
    r["stats"][0 if left else 2] = total
    plgpu.barrier_arrive(r["sums"])
    plgpu.barrier_wait(r["sums"])
    total = total + plgpu.load(r["stats"].at[2 if left else 0], layout=line, optimized=False)
    total = jnp.where(asked >= 0, total, 0.0)
    factor = 1 / jnp.where(total > 0, total, 1.0)
    if plan.sinks:
        sink = plgpu.load(r["sink"].at[where["head_block"]], layout=line, optimized=False)
        m = jnp.where(total > 0, m, FLOOR)
        top = jnp.maximum(m, sink)
        total = total * jnp.exp2(m - top)
        whole = total + jnp.exp2(sink - top)
        factor = jnp.exp2(m - top) / whole
        m, total = top, whole
    factor = jnp.where(asked >= 0, factor, 0.0)
    out = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    lse = jnp.where(total > 0, (m + jnp.log2(jnp.where(total > 0, total, 1.0))) / LOG2E, -jnp.inf)
    columns = pl.ds(low, high - low)
    if plan.tiles.splits > 1:
        r["out"].at[where["program"], :, columns][...] = out
        if left:
            r["lse"].at[where["program"]][...] = lse
        return
    # Both warpgroups have read the queries for the last time: their place takes the output.
    r["q_smem"].at[:, columns][...] = out.astype(r["q_smem"].dtype)
    if left:
        r["stats"][1] = lse
    plgpu.commit_smem()
    heads = plan.tiles.heads
    for i in range(plan.tiles.tokens):
        to = pl.ds((where["token"] + i) * plan.heads + where["head_block"] * heads, heads)
        here = None if plan.tiles.tokens == 1 else where["count"] > i
        at = pl.ds(i * heads, heads)
        plgpu.copy_smem_to_gmem(r["q_smem"].at[at, columns], r["out"].at[to, columns], here)
        if left:
            plgpu.copy_smem_to_gmem(r["stats"].at[1, at], r["lse"].at[to], here)
    plgpu.wait_smem_to_gmem(0)


def _scratch(plan: _Plan, dtype):
    tile = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    weights = plgpu.SMEM((ROWS, BLOCK), dtype, transforms=tile)
    return [
        plgpu.SMEM((ROWS, plan.width), dtype, transforms=tile),
        plgpu.SMEM((2, BLOCK, plan.width), dtype, transforms=tile),
        weights,
        plgpu.SMEM((4, BLOCK), jnp.float32),
        plgpu.SMEM((2, BLOCK), jnp.int32),
        *([weights] if plan.width == plan.rank else []),
        plgpu.Barrier(num_barriers=2, num_arrivals=_arrivals(plan, "l")),
        plgpu.Barrier(num_barriers=2, num_arrivals=_arrivals(plan, "r")),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(),
        plgpu.Barrier(),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=_arrivals(plan, "l")),
        plgpu.Barrier(num_arrivals=_arrivals(plan, "r")),
    ]


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: _Plan, q, pool, positions, table, lengths, items, asked, *extra):
    """q [T * N, H], pool [slots, H], positions int32[slots] -> out [T * N, R], lse float32[T * N], or the splits' parts."""
    if plan.tiles.splits > 1:
        shapes = ((plan.programs, ROWS, plan.rank), jnp.float32), ((plan.programs, ROWS), jnp.float32)
    else:
        shapes = ((q.shape[0], plan.rank), q.dtype), ((q.shape[0],), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        scratch_types=_scratch(plan, q.dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    return kernel(q, pool, positions, table, lengths, items, asked, *extra)
