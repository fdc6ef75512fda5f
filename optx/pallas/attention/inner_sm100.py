"""The inside of attention on Blackwell, wherever keys and values come from: both products by tcgen05, S and O in tensor memory.

One warp issues the products; a warpgroup a tile of 128 query rows has the softmax, a row a thread, and puts its weights P over
the scores S that they come from:

    keys, values --> S = Q K^T --scored--> softmax (O rescaled) --weighed--> O += P V --summed--> next S

Scores are read twice, WIDE columns at a time, for their maximum and for the weights: a whole row does not fit registers.
Sums are rescaled only when a row's largest logit has grown by 2^GROWTH (FlashAttention-4, arXiv:2603.05451, section 3; its
polynomial exp2 and its correction warpgroup are left out).
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.pallas.late import plgpu

ROWS = 128  # query rows of a tile: lanes of tensor memory
BLOCK = 128  # keys of a step
COLUMNS = 512  # of tensor memory
SHARED = 226 << 10  # bytes of a thread block, barriers apart
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2E = math.log2(math.e)
WIDE = 16  # columns of tensor memory that pass through registers at once: with 32 the softmax spills
WORD = 32  # keys of a step that a row's word tells of
GROWTH = 8.0  # log2 of how large weights may become before sums are rescaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """What is static."""

    tiles: int  # sums of 128 rows each that a thread block has at once
    stages: int  # steps whose keys and values are in shared memory
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    wide: int = WIDE  # scores of a row that pass through registers at once
    # True: tiles are other rows and meet the same keys; False: the same rows, and steps are dealt to tiles in turn.
    shared: bool = True
    # True: what `seen` tells is asked once a step and kept as bits of words, as it reads memory.
    noted: bool = False
    # True: P has columns of its own, as the interpreter lets no part of a union of refs live beside another part of it, and
    # strips are wider, as each costs it as much time as another.
    interpreted: bool = False

    @property
    def strip(self) -> int:
        """Numbers of a query, and of a result, that are copied at once."""
        return math.gcd(self.head_dim, 128)

    @property
    def strips(self) -> int:
        return self.head_dim // self.strip

    @property
    def sign(self) -> int:
        """Scores times it are in the order of logits."""
        return 1 if self.scale > 0 else -1

    @property
    def unit(self) -> float:
        """Makes log2 of `logits`."""
        return LOG2E * (abs(self.scale) if self.softcap is None else 1)

    def logits(self, scores):
        """Of scores times sign, what the softmax compares: a growing function."""
        return scores if self.softcap is None else jnp.tanh(scores * (abs(self.scale) / self.softcap)) * self.softcap

    def step(self, i, t: int):
        """Of all steps the one that is tile t's step i."""
        return i if self.shared else i * self.tiles + t

    def steps(self, steps, t: int):
        """How many of all steps are tile t's."""
        return steps if self.shared else lax.div(steps - t + self.tiles - 1, self.tiles)

    def first(self, t: int) -> bool:
        """Whether tile t meets the keys of its step before all others."""
        return not self.shared or t == 0

    def last(self, t: int) -> bool:
        return not self.shared or t == self.tiles - 1


def shared_of(dtype, *shape):
    """Shared memory [..., rows, numbers] that the copy engine fills and the MMA reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def scratch(inner: Inner, dtype, copies: int = 1) -> dict[str, Any]:
    """By name. copies: arrivals that fill a stage's keys, and its values."""
    tiles, stages, value_dim = inner.tiles, inner.stages, inner.value_dim
    plain = lambda arrivals, n: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)  # noqa: E731
    tensor = lambda n: plgpu.Barrier(num_arrivals=1, num_barriers=n, orders_tensor_core=True)  # noqa: E731
    rows = tiles if inner.shared else 1
    both = [plgpu.TMEM((ROWS, tiles * BLOCK), jnp.float32), plgpu.TMEM((ROWS, tiles * 2 * BLOCK), dtype, packed=True)]
    return {
        "q": shared_of(dtype, rows, inner.strips, ROWS, inner.strip),
        "k": shared_of(dtype, stages, BLOCK, inner.head_dim),
        "v": shared_of(dtype, stages, BLOCK, value_dim),
        "logits": both if inner.interpreted else plgpu.RefUnion(*both),
        "sums": plgpu.TMEM((ROWS, tiles * value_dim), jnp.float32),
        "loaded": plain(inner.strips, rows),
        "k_full": plain(copies, stages),
        "v_full": plain(copies, stages),
        **{name: tensor(stages) for name in ("k_empty", "v_empty")},
        **{name: tensor(tiles) for name in ("scored", "weighed", "summed", "ended")},
    }


def shared_bytes(inner: Inner) -> int:
    """What `scratch` takes of shared memory, barriers apart, of 16-bit numbers."""
    rows = ROWS * inner.head_dim * (inner.tiles if inner.shared else 1)
    return 2 * (rows + inner.stages * BLOCK * (inner.head_dim + inner.value_dim))


def columns(inner: Inner) -> int:
    """Of tensor memory."""
    return inner.tiles * (BLOCK + inner.value_dim)


def scores_of(refs, t, c=0, size=BLOCK):
    return refs.logits[0].at[:, pl.ds(t * BLOCK + c, size)]


def weights_of(refs, t, c=0, size=BLOCK):
    """In 16 bits, over the scores of t."""
    return refs.logits[1].at[:, pl.ds(t * 2 * BLOCK + c, size)]


def sums_of(refs, inner: Inner, t, c=0, size=None):
    return refs.sums.at[:, pl.ds(t * inner.value_dim + c, size or inner.value_dim)]


def drain(slots: int, steps, barrier):
    """Awaits the last arrivals, so that barriers end in a known phase."""
    await_ = lambda i, _: plgpu.barrier_wait(barrier.at[lax.rem(i, slots)])  # noqa: E731
    lax.fori_loop(lax.max(steps - slots, 0), steps, await_, None)


def multiply(refs, inner: Inner, steps, live=None):
    """The products of all steps, by one warp. live: how many tiles have rows; None: all."""
    tiles, stages = range(inner.tiles), inner.stages
    slot = lambda step: lax.rem(step, stages)  # noqa: E731
    mine = [steps if live is None else jnp.where(t < live, steps, 0) for t in tiles]

    def score(i, t):
        step = inner.step(i, t)
        if inner.first(t):
            pl.when(step < steps)(lambda: plgpu.barrier_wait(refs.k_full.at[slot(step)]))

        @pl.when(step < mine[t])
        def _():
            for c in range(inner.strips):
                keys = refs.k.at[slot(step), :, pl.ds(c * inner.strip, inner.strip)].T
                done = [refs.scored.at[t]] if c == inner.strips - 1 else []
                rows = refs.q.at[t if inner.shared else 0, c]
                plgpu.tcgen05_mma(scores_of(refs, t), rows, keys, *done, accumulate=c > 0)

        if inner.last(t):
            pl.when(step < steps)(lambda: plgpu.tcgen05_commit_arrive(refs.k_empty.at[slot(step)]))

    def add(i, t):
        step = inner.step(i, t)
        if inner.first(t):
            pl.when(step < steps)(lambda: plgpu.barrier_wait(refs.v_full.at[slot(step)]))

        @pl.when(step < mine[t])
        def _():
            plgpu.barrier_wait(refs.weighed.at[t])
            values = refs.v.at[slot(step)]
            plgpu.tcgen05_mma(sums_of(refs, inner, t), weights_of(refs, t), values, refs.summed.at[t], accumulate=i > 0)

        if inner.last(t):
            pl.when(step < steps)(lambda: plgpu.tcgen05_commit_arrive(refs.v_empty.at[slot(step)]))
        # S of the next step takes the place of this one's P.
        pl.when(step < mine[t])(lambda: plgpu.barrier_wait(refs.summed.at[t]))

    for t in range(inner.tiles if inner.shared else 1):
        plgpu.barrier_wait(refs.loaded.at[t])
    for t in tiles:
        score(0, t)

    def turn(i, _):
        for t in tiles:
            add(i, t)
            score(i + 1, t)

    lax.fori_loop(0, inner.steps(steps, 0), turn, None)
    for t in tiles:
        plgpu.tcgen05_commit_arrive(refs.ended.at[t])


def noted(seen, i):
    """`seen` of step i, asked at once: a word a row tells of WORD keys."""

    def bits(size: int, first: int = 0):
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=plgpu.Layout.TCGEN05_TMEM_NATIVE)
        return jnp.int32(1) << (column + first)

    told = lambda c: jnp.sum(jnp.where(seen(i, c, WORD), bits(WORD), 0), axis=1, dtype=jnp.int32)  # noqa: E731
    words = [told(c) for c in range(0, BLOCK, WORD)]

    def there(c, size):
        word = lax.broadcast_in_dim(words[c // WORD], (ROWS, size), (0,))
        return (word & bits(size, c % WORD)) != 0

    return there


def softmax(refs, inner: Inner, t, carry, runs, seen, after=lambda i: None):
    """Of tile t, by its warpgroup -> (largest logit, sum of weights) float32[ROWS].

    carry: the same before any step; runs: (first of the tile's steps, step behind the last, whether `seen` is asked) in order;
    seen(i, c, size) -> bool[ROWS, size], of keys c .. c + size of the tile's step i; after(i): called before its weights are
    handed on.
    """
    native, wide = plgpu.Layout.TCGEN05_TMEM_NATIVE, inner.wide
    if inner.interpreted:
        wide = WORD if inner.noted else 64
    spread = lambda x, size: lax.broadcast_in_dim(x, (ROWS, size), (0,))  # noqa: E731

    def step(i, carry, masked: bool):
        largest, total = carry
        plgpu.barrier_wait(refs.scored.at[t])

        def scores(c):
            found = plgpu.async_load_tmem(scores_of(refs, t, c, wide), layout=native)
            plgpu.wait_load_tmem()
            return found if inner.sign > 0 else -found

        there = noted(seen, i) if masked and inner.noted else functools.partial(seen, i)

        highest = None
        for c in range(0, BLOCK, wide):
            part = jnp.where(there(c, wide), scores(c), LOWEST) if masked else scores(c)
            part = jnp.max(part, axis=1)
            highest = part if highest is None else jnp.maximum(highest, part)
        top = jnp.maximum(largest, inner.logits(highest))
        grown = jnp.max((top - largest) * inner.unit) > GROWTH  # of any row: all are rescaled then
        top = jnp.where(grown, top, largest)
        shrink = jnp.exp2((largest - top) * inner.unit)

        @pl.when(grown & (i > 0))
        def _():
            for c in range(0, inner.value_dim, wide):
                part = sums_of(refs, inner, t, c, wide)
                old = plgpu.async_load_tmem(part, layout=native)
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(part, old * spread(shrink, wide))

        base, total = top * inner.unit, total * shrink
        for c in range(0, BLOCK, wide):
            part = jnp.exp2(inner.logits(scores(c)) * inner.unit - spread(base, wide))
            part = jnp.where(there(c, wide), part, 0.0) if masked else part
            total = total + jnp.sum(part, axis=1)
            plgpu.async_store_tmem(weights_of(refs, t, c, wide), part.astype(refs.q.dtype))
        after(i)
        plgpu.commit_tmem()
        plgpu.barrier_arrive(refs.weighed.at[t])
        return top, total

    for begin, end, masked in runs:
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=masked), carry)
    return carry


def full(x):
    """float32[ROWS] of one number, a row a thread."""
    return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), plgpu.Layout.TCGEN05_TMEM_NATIVE.reduce(1))


def store(refs, inner: Inner, t, carry, out, lse):
    """The results of tile t: out [rows, Hv], its first rows, by the copy engine; lse [ROWS].

    They pass through the place of its Q, or of keys and values where tiles have one Q: none is read any more.
    """
    native = plgpu.Layout.TCGEN05_TMEM_NATIVE
    largest, total = carry
    plgpu.barrier_wait(refs.ended.at[t])
    some = total > 0
    lse[...] = jnp.where(some, largest * (inner.unit / LOG2E) + jnp.log(total), -jnp.inf)
    share = 1 / jnp.where(some, total, 1.0)

    def leave(place):
        """place(c, size): shared memory [ROWS, size] for columns c .. c + size."""
        for c in range(0, inner.value_dim, 64):
            done = plgpu.async_load_tmem(sums_of(refs, inner, t, c, 64), layout=native)
            done = jnp.where(lax.broadcast_in_dim(some, done.shape, (0,)), done, 0.0)
            done = done * lax.broadcast_in_dim(share, done.shape, (0,))
            place(c, 64)[...] = plgpu.layout_cast(done.astype(refs.q.dtype), native(8))
        plgpu.commit_smem()
        width = math.gcd(inner.value_dim, inner.strip)
        for c in range(0, inner.value_dim, width):
            plgpu.copy_smem_to_gmem(place(c, width).at[pl.ds(0, out.shape[0])], out.at[:, pl.ds(c, width)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if inner.shared:
        leave(lambda c, size: refs.q.at[t, c // inner.strip, :, pl.ds(c % inner.strip, size)])
        return
    for each, ref in zip(range(inner.tiles), (refs.k, refs.v), strict=False):
        pl.when(t == each)(functools.partial(leave, lambda c, size, ref=ref: ref.at[0, :, pl.ds(c, size)]))
