"""`flash_attention` for Hopper: Pallas Mosaic GPU, one warpgroup that loads and two or three that compute.

A block of 64 query rows per computing warpgroup meets the blocks of keys that its mask reaches, last block first. The
warpgroups take turns at the tensor cores, and inside one the softmax of a block runs beside the P V product of the block
before. Sources: FlashAttention-3 (arXiv:2407.08608) for the schedule, FlashAttention-2 (arXiv:2307.08691) for the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask

ROWS = 64  # query rows of a warpgroup: the M of a wgmma
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # (query and key width, value width)
DTYPES = (jnp.bfloat16, jnp.float16)
L2_BYTES = 24 << 20  # keys and values that tiles in flight may share: half of the L2 cache
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2E = math.log2(math.e)
NOT_REAL = -(2**31)  # the segment of keys that nobody sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    block_kv: int = 128  # keys a step
    stages: int = 2  # steps whose keys and values are in flight
    warpgroups: int = 2  # that compute, ROWS query rows each
    registers: int = 240  # a thread of theirs
    overlap: bool = True  # softmax beside the P V product of the step before; costs block_kv / 2 registers
    turns: bool = True  # warpgroups alternate at the tensor cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call."""

    mask: Mask
    scale: float
    softcap: float | None
    tiles: Tiles
    registers: bool = True  # P enters the second product from registers; False: from shared memory, for the interpreter


def tiles(length: int, head_dim: int, value_dim: int) -> Tiles:
    """The cut of a call over sequences of `length`."""
    if head_dim == 256:
        return Tiles(block_kv=64)
    if head_dim == 64:
        return Tiles(warpgroups=3, registers=160)
    return Tiles()


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why this kernel declines the call site. Reads head_dim, value_dim and dtype where they are given."""
    if target.platform != "gpu" or target.arch != "sm90":
        return f"built for sm90, the target is {target.platform}/{target.arch}"
    widths = (args["head_dim"], args.get("value_dim") or args["head_dim"])
    if widths not in HEAD_DIMS:
        return f"head dims (keys, values) {widths}; it has {', '.join(map(str, HEAD_DIMS))}"
    dtype = jnp.dtype(args.get("dtype", "bfloat16"))
    if dtype not in DTYPES:
        return f"activations in {dtype.name}; it has {', '.join(jnp.dtype(d).name for d in DTYPES)}"
    return None


def flash_attention(
    q, k, v, *, mask: Mask = Mask(), scale=None, softcap=None, sink_logits=None, valid=None, segments=None
):
    """Attention inside self-contained sequences: `reference.flash_attention`, whose gradient it has too.

    q [B, S, N, H], k [B, S, K, H], v [B, S, K, Hv] in bfloat16 or float16, (H, Hv) one of HEAD_DIMS; scale a number;
    valid bool[B, S]; segments int32[B, S], above -2**31. -> (out [B, S, N, Hv], lse float32[B, S, N], None).
    Raises: ValueError naming the argument for shapes and dtypes that it does not take.
    """
    _check(q, k, v, sink_logits, valid, segments)
    scale = float(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    cut = tiles(q.shape[1], q.shape[-1], v.shape[-1])
    call = _Call(mask=mask, scale=scale, softcap=None if softcap is None else float(softcap), tiles=cut)
    out, lse = _differentiable(call, q, k, v, sink_logits, valid, segments)
    return out, lse, None


def _check(q, k, v, sink_logits, valid, segments):
    def refuse(name, got, allowed):
        raise ValueError(f"flash_attention (mosaic_gpu/sm90): {name} is {got}; allowed: {allowed}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            refuse(name, x.shape, "[B, S, heads, width]")
        if x.dtype not in DTYPES:
            refuse(f"{name}'s dtype", x.dtype, "bfloat16, float16")
        if x.dtype != q.dtype:
            refuse(f"{name}'s dtype", x.dtype, f"q's, {q.dtype}")
    b, s, n, h = q.shape
    kv_heads, value_dim = v.shape[2:]
    if k.shape != (b, s, kv_heads, h) or v.shape[:2] != (b, s):
        refuse("k, v", f"{k.shape}, {v.shape}", f"k [{b}, {s}, K, {h}] and v [{b}, {s}, K, Hv] for q {q.shape}")
    if (h, value_dim) not in HEAD_DIMS:
        refuse("(H, Hv)", (h, value_dim), ", ".join(map(str, HEAD_DIMS)))
    if min(b, s, kv_heads) < 1 or n % kv_heads:
        refuse("q", q.shape, f"at least one token, and heads in groups for K = {kv_heads}")
    if sink_logits is not None and sink_logits.shape != (n,):
        refuse("sink_logits", sink_logits.shape, f"[{n}]")
    for name, x, kind in (("valid", valid, jnp.bool_), ("segments", segments, jnp.int32)):
        if x is not None and (x.shape != (b, s) or x.dtype != kind):
            refuse(name, f"{x.dtype}{x.shape}", f"{jnp.dtype(kind).name}[{b}, {s}]")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call, q, k, v, sink_logits, valid, segments):
    return _run(call, q, k, v, sink_logits, valid, segments)


def _forward(call, q, k, v, sink_logits, valid, segments):
    return _run(call, q, k, v, sink_logits, valid, segments), (q, k, v, sink_logits, valid, segments)


def _backward(call, kept, cotangents):
    q, k, v, sink_logits, valid, segments = kept

    def defined(q, k, v, sink_logits):
        kwargs = {"mask": call.mask, "scale": call.scale, "softcap": call.softcap, "sink_logits": sink_logits}
        return reference.flash_attention(q, k, v, valid=valid, segments=segments, **kwargs)[:2]

    _, pull = jax.vjp(defined, q, k, v, sink_logits)
    return *pull(cotangents), None, None


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _run(call: _Call, q, k, v, sink_logits, valid, segments):
    """The kernel's call, alike for all layers of a model: assembled once."""
    tile = call.tiles
    b, s, n, h = q.shape
    kv_heads, value_dim = v.shape[2:]
    rows = ROWS * tile.warpgroups
    row_tiles, blocks = pl.cdiv(s, rows), pl.cdiv(s, tile.block_kv)
    kernel = _Kernel(call, b, s, n, kv_heads, row_tiles, blocks, _sharing(b * n, n // kv_heads, s, h + value_dim))
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def shared(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=tiled)

    scratch = {
        "q_smem": shared(tile.warpgroups, ROWS, max(h, value_dim)),
        "k_smem": shared(tile.stages, tile.block_kv, h),
        "v_smem": shared(tile.stages, tile.block_kv, value_dim),
        "lse_smem": plgpu.SMEM((tile.warpgroups, ROWS), jnp.float32),
        "q_here": plgpu.Barrier(num_barriers=tile.warpgroups),
        "k_here": plgpu.Barrier(num_barriers=tile.stages),
        "v_here": plgpu.Barrier(num_barriers=tile.stages),
        "k_free": plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        "v_free": plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        "turn": plgpu.Barrier(num_barriers=tile.warpgroups),
    }
    if not call.registers:
        scratch["p_smem"] = shared(tile.warpgroups, ROWS, tile.block_kv)
    ids = _ids(valid, segments, row_tiles, rows, blocks, tile.block_kv)
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((b, s, n, value_dim), q.dtype),
            jax.ShapeDtypeStruct((b, n, row_tiles * rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(row_tiles * b * n,),
        grid_names=("tile",),
        num_threads=tile.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="flash_attention",
    )(q, k, v, sink, ids)
    return out, jnp.moveaxis(lse[..., :s], 1, 2)


def _sharing(heads: int, group: int, length: int, widths: int) -> int:
    """Query heads whose tiles run side by side, so that the keys and values they read stay in the L2 cache."""
    most = max(1, L2_BYTES // (length * widths * 2)) * group
    return max(x for x in range(1, heads + 1) if heads % x == 0 and x <= most)


def _ids(valid, segments, row_tiles, rows, blocks, block_kv):
    """Segments of queries and of keys, and by tile of queries the blocks [first, last) that it can see at all and those
    [first, last) that it sees whole, as far as segments go: int32[B, tiles, 4]. None where all tokens see each other."""
    if valid is None and segments is None:
        return None
    given = valid if segments is None else segments
    segments = jnp.zeros(given.shape, jnp.int32) if segments is None else segments
    keys = segments if valid is None else jnp.where(valid, segments, NOT_REAL)
    length = given.shape[1]

    def pad(x, to):
        return jnp.pad(x, ((0, 0), (0, to - length)), constant_values=NOT_REAL)

    # Rows past the end repeat the last real row's segment: they must not widen what a tile reads.
    queries = jnp.pad(segments, ((0, 0), (0, row_tiles * rows - length)), mode="edge")
    keys = pad(keys, blocks * block_kv)
    by_tile = queries.reshape(len(keys), row_tiles, 1, rows)
    by_block = keys.reshape(len(keys), 1, blocks, block_kv)
    real = by_block != NOT_REAL
    low, high = by_tile.min(-1), by_tile.max(-1)
    floor = jnp.where(real, by_block, 2**31 - 1).min(-1)
    touched = real.any(-1) & (floor <= high) & (by_block.max(-1) >= low)
    whole = real.all(-1) & (floor == by_block.max(-1)) & (low == high) & (floor == low)

    def run(flags):
        """The first run of true: [first, last), empty where there is none."""
        first = jnp.argmax(flags, -1)
        at = jnp.arange(blocks)
        stop = jnp.where(~flags & (at >= first[..., None]), at, blocks).min(-1)
        return first, jnp.where(flags.any(-1), stop, first)

    last = blocks - jnp.argmax(touched[..., ::-1], -1)
    first = jnp.argmax(touched, -1)
    bounds = (first, jnp.where(touched.any(-1), last, first), *run(whole))
    return queries, keys, jnp.stack(bounds, -1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The body of the kernel; a fresh object a trace, its fields are Python numbers."""

    call: _Call
    batch: int
    length: int
    heads: int
    kv_heads: int
    row_tiles: int
    blocks: int
    sharing: int

    @property
    def __name__(self):
        return "flash_attention"

    def __call__(self, q, k, v, sink, ids, out, lse, **scratch):
        wg = lax.axis_index("wg")
        where = _Where.of(self, ids)
        last = self.call.tiles.warpgroups

        @pl.when(wg < last)
        def _():
            plgpu.set_max_registers(self.call.tiles.registers, action="increase")
            self.compute(where, wg, q, sink, ids, out, lse, **scratch)

        @pl.when(wg == last)
        def _():
            plgpu.set_max_registers(24 if last == 3 else 40, action="decrease")
            self.load(where, k, v, **scratch)

    def load(self, where, k, v, *, k_smem, v_smem, k_here, v_here, k_free, v_free, **_):
        """Keys of step t, then values of step t - 1: the order in which they are used."""
        tile = self.call.tiles

        def fetch(step, source, target, here, free):
            slot = lax.rem(step, tile.stages)

            @pl.when(step >= tile.stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            at = pl.ds(where.block(step) * tile.block_kv, tile.block_kv)
            plgpu.copy_gmem_to_smem(source.at[where.b, at, where.kv_head], target.at[slot], here.at[slot])

        @pl.loop(0, where.steps + 1)
        def _(step):
            pl.when(step < where.steps)(lambda: fetch(step, k, k_smem, k_here, k_free))
            pl.when(step > 0)(lambda: fetch(step - 1, v, v_smem, v_here, v_free))

    def compute(self, where, wg, q, sink, ids, out, lse, *, q_smem, lse_smem, q_here, **scratch):
        h, value_dim = q.shape[-1], out.shape[-1]
        row = where.row + wg * ROWS
        qo = q_smem.at[wg]
        rows = pl.ds(row, ROWS)
        q_at = qo if h == q_smem.shape[-1] else qo.at[:, pl.ds(0, h)]
        plgpu.copy_gmem_to_smem(q.at[where.b, rows, where.head], q_at, q_here.at[wg])
        by_row = plgpu.Layout.WGMMA.reduce(1)
        if sink is None:
            top = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), by_row)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
        else:
            top = plgpu.layout_cast(jnp.full((ROWS,), sink[where.head] * LOG2E, jnp.float32), by_row)
            total = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), by_row)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, value_dim), jnp.float32), plgpu.Layout.WGMMA)
        mine = None if ids is None else plgpu.load(ids[0].at[where.b, rows], layout=by_row)
        logits = functools.partial(self.logits, where, row, mine, ids)
        plgpu.barrier_wait(q_here.at[wg])
        run = self.overlapped if self.call.tiles.overlap and self.call.registers else self.plain
        acc, top, total = run(where, wg, q_at, logits, (acc, top, total), **scratch)

        empty = total == 0.0
        scale = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
        acc = acc * lax.broadcast_in_dim(scale, acc.shape, [0])
        o_at = qo if value_dim == q_smem.shape[-1] else qo.at[:, pl.ds(0, value_dim)]
        o_at[...] = acc.astype(out.dtype)
        lse_smem.at[wg][...] = jnp.where(empty, -jnp.inf, top * (1 / LOG2E) + jnp.log(jnp.where(empty, 1.0, total)))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_at, out.at[where.b, rows, where.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[where.b, where.head, rows])
        plgpu.wait_smem_to_gmem(0)

    def overlapped(self, where, wg, q, logits, state, *, k_smem, v_smem, k_here, v_here, k_free, v_free, turn, **_):
        """Q K of step t and P V of step t - 1 are in flight together; the softmax of t waits for the first of them only."""
        tile = self.call.tiles
        acc, top, total = state
        next_wg = lax.rem(wg + 1, tile.warpgroups)

        def take():
            if tile.turns:
                plgpu.barrier_wait(turn.at[wg])

        def pass_on():
            if tile.turns:
                plgpu.barrier_arrive(turn.at[next_wg])

        if tile.turns:
            pl.when(wg == tile.warpgroups - 1)(pass_on)
        first = lax.rem(where.steps, 1)
        plgpu.barrier_wait(k_here.at[first])
        take()

        def only_qk(s_ref):
            plgpu.wgmma(s_ref, q, k_smem.at[first].transpose((1, 0)))
            pass_on()
            return s_ref[...]

        s = pl.run_scoped(only_qk, plgpu.ACC((ROWS, tile.block_kv), jnp.float32))
        plgpu.barrier_arrive(k_free.at[first])
        p, _, top, total = self.softmax(logits(s, first), top, total)
        p = p.astype(v_smem.dtype)

        def step(t, carry):
            acc, p, top, total = carry
            slot, before = lax.rem(t, tile.stages), lax.rem(t - 1, tile.stages)

            def products(refs):
                s_ref, acc_ref, alpha_ref, next_ref, top_ref, total_ref = refs
                plgpu.barrier_wait(k_here.at[slot])
                take()
                plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                plgpu.barrier_wait(v_here.at[before])
                plgpu.wgmma(acc_ref, p, v_smem.at[before])
                pass_on()
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                s = lax.optimization_barrier(s)
                plgpu.barrier_arrive(k_free.at[slot])
                new, alpha, top_ref[...], total_ref[...] = self.softmax(logits(s, t), top_ref[...], total_ref[...])
                next_ref[...], alpha_ref[...] = lax.optimization_barrier((new, alpha))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(v_free.at[before])

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile.block_kv), jnp.float32), plgpu.Layout.WGMMA)
            _, acc, alpha, new, top, total = pl.run_state(products)(
                (plgpu.ACC.init(zeros), plgpu.ACC.init(acc), top, zeros, top, total)
            )
            acc = lax.optimization_barrier(acc)
            acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
            return acc, new.astype(p.dtype), top, total

        acc, p, top, total = lax.fori_loop(1, where.steps, step, (acc, p, top, total))
        slot = lax.rem(where.steps - 1, tile.stages)
        plgpu.barrier_wait(v_here.at[slot])
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_smem.at[slot]))(plgpu.ACC.init(acc))
        return acc, top, total

    def plain(self, where, wg, q, logits, state, *, k_smem, v_smem, k_here, v_here, k_free, v_free, turn, **scratch):
        """One product after the other; the warpgroups' turns alone keep the tensor cores busy."""
        tile = self.call.tiles

        def step(t, carry):
            acc, top, total = carry
            slot = lax.rem(t, tile.stages)
            plgpu.barrier_wait(k_here.at[slot])

            def qk(s_ref):
                plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                return s_ref[...]

            s = pl.run_scoped(qk, plgpu.ACC((ROWS, tile.block_kv), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            p, alpha, top, total = self.softmax(logits(s, t), top, total)
            acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
            p = p.astype(v_smem.dtype)
            plgpu.barrier_wait(v_here.at[slot])
            if self.call.registers:
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_smem.at[slot]))(plgpu.ACC.init(acc))
            else:
                p_smem = scratch["p_smem"].at[wg]
                p_smem[...] = p
                plgpu.commit_smem()

                def pv(ref):
                    plgpu.wgmma(ref, p_smem, v_smem.at[slot])
                    return ref[...]

                acc = acc + pl.run_scoped(pv, plgpu.ACC(acc.shape, jnp.float32))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, top, total

        return lax.fori_loop(0, where.steps, step, state)

    def logits(self, where, row, mine, ids, s, step):
        """Products of one step -> masked logits in units that `softmax` scales by `rate`."""
        call = self.call
        if call.softcap is not None:
            # 1 - 2 / (e^2x + 1): the hardware's own tanh is good to 2^-11 only.
            power = jnp.exp2(s * (2 * call.scale / call.softcap * LOG2E))
            s = call.softcap * LOG2E * (1.0 - 2.0 / (power + 1.0))
        elif call.scale <= 0:
            s = s * (call.scale * LOG2E)
        block = where.block(step)
        key = block * call.tiles.block_kv
        edge = self.edge(where, row, key, block)
        return lax.cond(edge, lambda s: self.masked(where, row, key, mine, ids, s), lambda s: s, s)

    @property
    def rate(self) -> float:
        return self.call.scale * LOG2E if self.call.softcap is None and self.call.scale > 0 else 1.0

    def edge(self, where, row, key, block):
        """Whether any of ROWS queries from `row` on may not see any of the keys from `key` on."""
        mask, size = self.call.mask, self.call.tiles.block_kv
        found = key + size - 1 > row if mask.causal else key + size > self.length
        if mask.window is not None:
            found = found | (key <= row + ROWS - 1 - mask.window)
        if where.whole is not None:
            found = found | (block < where.whole[0]) | (block >= where.whole[1])
        return found

    def masked(self, where, row, key, mine, ids, s):
        mask = self.call.mask
        query_at, key_at = (
            start + plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA)
            for axis, start in ((0, row), (1, key))
        )
        seen = key_at <= query_at if mask.causal else key_at < self.length
        if mask.window is not None:
            near = key_at > query_at - mask.window
            seen = seen & ((near | (key_at < mask.sinks)) if mask.sinks else near)
        if ids is not None:
            theirs = ids[1].at[where.b, pl.ds(key, s.shape[1])]
            theirs = plgpu.load(theirs, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            theirs = lax.broadcast_in_dim(theirs, s.shape, [1])
            seen = seen & (theirs == lax.broadcast_in_dim(mine, s.shape, [0]))
        return jnp.where(seen, s, -jnp.inf)

    def softmax(self, s, top, total):
        """-> weights, the factor for what was summed before, the new top (in powers of 2) and the new total."""
        rate = self.rate
        new = jnp.maximum(top, jnp.max(s, axis=1) * rate)
        alpha = jnp.exp2(top - new)
        p = jnp.exp2(s * rate - lax.broadcast_in_dim(new, s.shape, [0]))
        return p, alpha, new, total * alpha + jnp.sum(p, axis=1)


@dataclasses.dataclass(frozen=True)
class _Where:
    """Which tile a block of threads computes, and the blocks of keys that it meets: the band, last first, then sinks."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    row: jax.Array  # first query
    stop: jax.Array  # end of the band
    band: jax.Array  # blocks in it
    sinks: jax.Array  # blocks before it that hold sinks
    sink_stop: jax.Array
    whole: tuple | None  # blocks without a mask by segments

    @property
    def steps(self):
        return jnp.maximum(self.band + self.sinks, 1)

    def block(self, step):
        at = jnp.where(step < self.band, self.stop - 1 - step, self.sink_stop - 1 - (step - self.band))
        return jnp.maximum(at, 0)

    @classmethod
    def of(cls, kernel: _Kernel, ids):
        mask, tile = kernel.call.mask, kernel.call.tiles
        size, rows = tile.block_kv, ROWS * tile.warpgroups
        index = lax.axis_index("tile")
        inside = lax.rem(index, kernel.sharing * kernel.row_tiles)
        head = lax.div(index, kernel.sharing * kernel.row_tiles) * kernel.sharing + lax.rem(inside, kernel.sharing)
        tile_at = lax.div(inside, kernel.sharing)
        if mask.causal:  # the most work first: the last tiles to start are short
            tile_at = kernel.row_tiles - 1 - tile_at
        b, head = lax.div(head, kernel.heads), lax.rem(head, kernel.heads)
        row = tile_at * rows
        start, stop = jnp.int32(0), jnp.int32(kernel.blocks)
        if mask.causal:
            stop = jnp.minimum(stop, lax.div(row + rows + size - 1, size))
        if mask.window is not None:
            start = lax.div(jnp.maximum(row - mask.window + 1, 0), size)
        whole, low = None, jnp.int32(0)
        sink_stop = jnp.minimum(jnp.int32(pl.cdiv(mask.sinks, size)), start)
        if ids is not None:
            low, high, first, last = (ids[2][b, tile_at, i] for i in range(4))
            start, stop, whole = jnp.maximum(start, low), jnp.minimum(stop, high), (first, last)
            sink_stop = jnp.minimum(sink_stop, high)
        return cls(
            b=b,
            head=head,
            kv_head=lax.div(head, kernel.heads // kernel.kv_heads),
            row=row,
            stop=stop,
            band=jnp.maximum(stop - start, 0),
            sinks=jnp.maximum(sink_stop - low, 0) if mask.window is not None and mask.sinks else jnp.int32(0),
            sink_stop=sink_stop,
            whole=whole,
        )
