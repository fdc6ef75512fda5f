"""`flash_attention` for Hopper: Pallas Mosaic GPU, one warpgroup that loads and two or three that compute.

A tile is 64 query rows a computing warpgroup; it meets the blocks of keys that its mask reaches, last block first. The
warpgroups take turns at the tensor cores, and inside one the softmax of a block runs beside the P V product of the block
before. A thread block goes through a list of tiles made on the host so that all lists take the same time; the loading
warpgroup runs ahead into the next tile. Sources: FlashAttention-3 (arXiv:2407.08608) for the schedule inside a tile,
FlashAttention-2 (arXiv:2307.08691) for the rest. `flash_attention_e4m3` is the same kernel with both products in 8 bits.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir

from optx.errors import LoweringError
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.late import dependent, llvm, mgpu, plgpu, vector
from optx.pallas.tiles import tuned

ROWS = 64  # query rows of a warpgroup: the M of a wgmma
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # (query and key width, value width)
DTYPES = (jnp.bfloat16, jnp.float16)
E4M3 = jnp.float8_e4m3fn
PEAK = 8  # weights in e4m3 reach 2^PEAK, so that small ones keep their bits; bf16 ones reach 1
L2_BYTES = 24 << 20  # keys and values that tiles in flight may share: half of the L2 cache
SMEM_BYTES = 226 << 10  # of a thread block, barriers apart
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2E = math.log2(math.e)
NOT_REAL = -(2**31)  # the segment of keys that nobody sees
PARTS = 8  # columns of a row's running sum: the narrowest array in the layout of wgmma
BETWEEN = 1.5  # steps that the change from one tile to the next costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    block_kv: int = 128  # keys a step
    stages: int = 2  # steps whose keys and values are in flight
    warpgroups: int = 2  # that compute, ROWS query rows each
    max_registers: int = 240  # a thread of theirs
    overlap: bool = True  # softmax beside the P V product of the step before; costs block_kv / 2 registers
    turns: bool = True  # warpgroups alternate at the tensor cores
    blocks: int = 132  # thread blocks that share the tiles: the cores of an H100 or H200 SXM; 0: one a tile
    registers: bool = True  # P enters the second product from registers; False: from shared memory, for the interpreter


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call."""

    mask: Mask
    scale: float
    softcap: float | None
    tiles: Tiles
    dtype: Any  # of the result


def tiles(length: int, head_dim: int, value_dim: int) -> Tiles:
    """The cut of a call over sequences of `length`: what fits shared memory, then what was tuned for the device."""
    rule = Tiles(block_kv=64 if head_dim == 256 else 128)
    return tuned("flash_attention", {"head_dim": head_dim, "value_dim": value_dim}, rule)


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why this kernel declines the call site. Reads head_dim, value_dim and dtype where they are given."""
    if target.platform != "gpu" or target.arch != "sm90":
        return f"built for sm90, the target is {target.platform}/{target.arch}"
    widths = (args["head_dim"], args.get("value_dim") or args["head_dim"])
    if widths not in HEAD_DIMS:
        return f"head dims (keys, values) {widths}; it has {', '.join(map(str, HEAD_DIMS))}"
    dtype = jnp.dtype(args.get("dtype") or "bfloat16")
    if dtype not in DTYPES:
        return f"activations in {dtype.name}; it has {', '.join(jnp.dtype(d).name for d in DTYPES)}"
    return None


def flash_attention(
    q,
    k,
    v,
    *,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    valid=None,
    segments=None,
    tiles: Tiles | None = None,
):
    """Attention inside self-contained sequences: `reference.flash_attention`, whose gradient it has too.

    q [B, S, N, H], k [B, S, K, H], v [B, S, K, Hv] in bfloat16 or float16, (H, Hv) one of HEAD_DIMS; scale a number;
    valid bool[B, S]; segments int32[B, S], above -2**31. -> (out [B, S, N, Hv], lse float32[B, S, N], None).
    Raises: LoweringError naming the argument for shapes and dtypes that it does not take.
    """
    _check(q, k, v, sink_logits, valid, segments)
    call = _Call(
        mask=mask,
        scale=float(1 / math.sqrt(q.shape[-1]) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        tiles=tiles or _tiles(q.shape[1], q.shape[-1], v.shape[-1]),
        dtype=q.dtype,
    )
    out, lse = _differentiable(call, q, k, v, sink_logits, valid, segments)
    return out, lse, None


_tiles = tiles


def flash_attention_e4m3(
    q,
    k,
    v,
    *,
    q_scale,
    k_scale,
    v_scale,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    valid=None,
    segments=None,
    dtype=jnp.bfloat16,
    tiles: Tiles | None = None,
):
    """`flash_attention` of q, k and v stored in float8_e4m3fn, each to be multiplied by its scale; both products in e4m3.

    q_scale float32[B, N], k_scale and v_scale float32[B, K], positive. No gradient. -> as there, out in `dtype`.
    Raises: LoweringError naming the argument.
    """
    _check(q, k, v, sink_logits, valid, segments, (E4M3,))
    scale = float(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    n, group = q.shape[2], q.shape[2] // k.shape[2]
    for name, x, width in (("q_scale", q_scale, n), ("k_scale", k_scale, k.shape[2]), ("v_scale", v_scale, k.shape[2])):
        if x.shape != (q.shape[0], width):
            _refuse(name, x.shape, f"[{q.shape[0]}, {width}]")
    if scale <= 0:
        _refuse("scale", scale, "a positive number")
    k_scale, v_scale = (jnp.repeat(x.astype(jnp.float32), group, axis=1) for x in (k_scale, v_scale))
    scales = jnp.stack([q_scale.astype(jnp.float32) * k_scale * scale, v_scale])
    softcap = None if softcap is None else float(softcap)
    # Below 256 the softmax binds, not the tensor cores: turns at them cost 2% there and gain 2% at 256.
    cut = _tiles(q.shape[1], q.shape[-1], v.shape[-1])
    tiles = tiles or dataclasses.replace(cut, block_kv=128, turns=q.shape[-1] == 256)
    call = _Call(mask=mask, scale=scale, softcap=softcap, tiles=tiles, dtype=jnp.dtype(dtype))
    out, lse = _run(call, q, k, v, sink_logits, valid, segments, scales)
    return out, lse, None


def _refuse(name, got, allowed):
    raise LoweringError(f"flash_attention (mosaic_gpu/sm90): {name} is {got}; allowed: {allowed}")


def _check(q, k, v, sink_logits, valid, segments, dtypes=DTYPES):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            _refuse(name, x.shape, "[B, S, heads, width]")
        if x.dtype not in dtypes:
            _refuse(f"{name}'s dtype", x.dtype, ", ".join(jnp.dtype(d).name for d in dtypes))
        if x.dtype != q.dtype:
            _refuse(f"{name}'s dtype", x.dtype, f"q's, {q.dtype}")
    b, s, n, h = q.shape
    kv_heads, value_dim = v.shape[2:]
    if k.shape != (b, s, kv_heads, h) or v.shape[:2] != (b, s):
        _refuse("k, v", f"{k.shape}, {v.shape}", f"k [{b}, {s}, K, {h}] and v [{b}, {s}, K, Hv] for q {q.shape}")
    if (h, value_dim) not in HEAD_DIMS:
        _refuse("(H, Hv)", (h, value_dim), ", ".join(map(str, HEAD_DIMS)))
    if min(b, s, kv_heads) < 1 or n % kv_heads:
        _refuse("q", q.shape, f"at least one token, and heads in groups for K = {kv_heads}")
    if sink_logits is not None and sink_logits.shape != (n,):
        _refuse("sink_logits", sink_logits.shape, f"[{n}]")
    for name, x, kind in (("valid", valid, jnp.bool_), ("segments", segments, jnp.int32)):
        if x is not None and (x.shape != (b, s) or x.dtype != kind):
            _refuse(name, f"{x.dtype}{x.shape}", f"{jnp.dtype(kind).name}[{b}, {s}]")


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
def _run(call: _Call, q, k, v, sink_logits, valid, segments, scales=None):
    """The kernel's call, alike for all layers of a model: assembled once."""
    tile = call.tiles
    b, s, n, h = q.shape
    kv_heads, value_dim = v.shape[2:]
    rows = ROWS * tile.warpgroups
    row_tiles, blocks = pl.cdiv(s, rows), pl.cdiv(s, tile.block_kv)
    ids = _ids(valid, segments, row_tiles, rows, blocks, tile.block_kv)
    sharing = _sharing(b * n, n // kv_heads, s, h + value_dim)
    # How long a tile takes is known here unless segments or lengths decide it: then the hardware hands tiles out.
    known = segments is None and (valid is None or b == 1)
    table = _lists(call.mask, tile, b * n, row_tiles, blocks, sharing, tile.blocks if known else 0)
    narrow = q.dtype == E4M3
    kernel = _Kernel(call, s, n, kv_heads, row_tiles, blocks, narrow)
    if rest := -s % 8:  # copies of tiles want a multiple of 8 tokens
        q, k, v = (jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) for x in (q, k, v))
    if narrow:
        v = _transposed(v, tile.block_kv, tile.registers)
    k_shape, v_shape = (tile.block_kv, h), (value_dim, tile.block_kv) if narrow else (tile.block_kv, value_dim)

    def shared(*shape, dtype=q.dtype):
        swizzle = min(128, math.gcd(shape[-1] * jnp.dtype(dtype).itemsize, 128))
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    scratch = {
        "k_smem": shared(tile.stages, *k_shape),
        "v_smem": shared(tile.stages, *v_shape),
        "lse_smem": plgpu.SMEM((tile.warpgroups, ROWS), jnp.float32),
        "q_here": plgpu.Barrier(num_barriers=tile.warpgroups),
        "q_free": plgpu.Barrier(num_barriers=tile.warpgroups),
        "k_here": plgpu.Barrier(num_barriers=tile.stages),
        "v_here": plgpu.Barrier(num_barriers=tile.stages),
        "k_free": plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        "v_free": plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages),
        "turn": plgpu.Barrier(num_barriers=tile.warpgroups),
    }
    if not tile.registers:
        scratch["p_smem"] = shared(tile.warpgroups, ROWS, tile.block_kv)
    # Results leave from memory of their own where there is room: the queries of the next tile come in beside them.
    q_shape, o_shape = (tile.warpgroups, ROWS, h), (tile.warpgroups, ROWS * h // value_dim, value_dim)
    results = rows * (value_dim * jnp.dtype(call.dtype).itemsize + 4)
    separate = q.dtype.itemsize * (rows * h + tile.stages * tile.block_kv * (h + value_dim)) + results <= SMEM_BYTES
    if separate or narrow:
        scratch |= {"q_smem": shared(*q_shape), "o_smem": shared(tile.warpgroups, ROWS, value_dim, dtype=call.dtype)}
    else:  # as many bytes a warpgroup for results as for queries
        scratch["qo_smem"] = plgpu.RefUnion(shared(*q_shape), shared(*o_shape))
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)
    out, lse = dependent(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], value_dim), call.dtype),
            jax.ShapeDtypeStruct((b, n, row_tiles * rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(table.shape[0],),
        grid_names=("block",),
        num_threads=tile.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name="flash_attention",
    )(q, k, v, sink, ids, scales, jnp.asarray(table))
    return out[:, :s], jnp.moveaxis(lse[..., :s], 1, 2)


def _transposed(v, block: int, permuted: bool):
    """v [B, S, K, Hv] -> [B, K, Hv, S in whole blocks]: products in 8 bits want keys side by side.

    permuted: keys in the order in which a thread's weights come out of the first product, 16 by 16 (see `_pack`).
    """
    v = jnp.pad(v, ((0, 0), (0, -v.shape[1] % block), (0, 0), (0, 0)))
    b, length, heads, width = v.shape
    if permuted:  # place 4 t + 2 i + j holds key 8 i + 2 t + j
        v = v.reshape(b, length // 16, 2, 4, 2, heads, width).swapaxes(2, 3)
    return jnp.moveaxis(v.reshape(b, length, heads, width), 1, 3)


def _sharing(heads: int, group: int, length: int, widths: int) -> int:
    """Query heads whose tiles run side by side, so that the keys and values they read stay in the L2 cache."""
    most = max(1, L2_BYTES // (length * widths * 2)) * group
    return max(x for x in range(1, heads + 1) if heads % x == 0 and x <= most)


@functools.lru_cache(maxsize=64)
def _lists(mask: Mask, tile: Tiles, heads: int, row_tiles: int, blocks: int, sharing: int, number: int) -> np.ndarray:
    """Which tiles each thread block computes: int32[thread blocks, 1 + most tiles], the first column their count.

    A tile is head * row_tiles + its index along the sequence. Tiles are handed out longest first within `sharing` heads,
    each to the list that is shortest by then.
    """
    costs = [_band(mask, tile, i * ROWS * tile.warpgroups, blocks) for i in range(row_tiles)]
    costs = [max(stop - start + sinks, 1) + BETWEEN for start, stop, sinks in costs]
    order = sorted(range(row_tiles), key=lambda i: -costs[i])
    handed = [
        head * row_tiles + i
        for first in range(0, heads, sharing)
        for i in order
        for head in range(first, first + sharing)
    ]
    if not number or len(handed) <= number:
        return np.stack([np.ones(len(handed), np.int32), np.array(handed, np.int32)], axis=1)
    lists = [[] for _ in range(number)]
    loads = [(0.0, i) for i in range(number)]
    for x in handed:
        load, i = heapq.heappop(loads)
        lists[i].append(x)
        heapq.heappush(loads, (load + costs[x % row_tiles], i))
    table = np.zeros((number, 1 + max(map(len, lists))), np.int32)
    for i, numbers in enumerate(lists):
        table[i, : 1 + len(numbers)] = [len(numbers), *numbers]
    return table


def _band(mask: Mask, tile: Tiles, row, blocks: int):
    """Blocks of keys that a tile of queries from `row` on can see: [start, stop), and how many before them hold sinks."""
    size, rows = tile.block_kv, ROWS * tile.warpgroups
    start, stop, sinks = 0, blocks, 0
    if mask.causal:
        stop = _least(blocks, _over(row + rows + size - 1, size))
    if mask.window is not None:
        start = _over(_most(row - mask.window + 1, 0), size)
        sinks = _least(pl.cdiv(mask.sinks, size), start) if mask.sinks else 0
    return start, stop, sinks


def _over(x, y: int):
    return x // y if isinstance(x, int) else lax.div(x, y)


def _least(x, y):
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def _most(x, y):
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.maximum(x, y)


def _ids(valid, segments, row_tiles, rows, blocks, block_kv):
    """Segments of queries (None where they are all of one) and of keys, and by tile of queries the blocks [first, last)
    that it can see at all and those [first, last) that it sees whole, as far as segments go: int32[B, tiles, 4].
    None where all tokens see each other."""
    if valid is None and segments is None:
        return None
    given = valid if segments is None else segments
    batch, length = given.shape
    keys = jnp.zeros(given.shape, jnp.int32) if segments is None else segments
    keys = keys if valid is None else jnp.where(valid, keys, NOT_REAL)
    keys = jnp.pad(keys, ((0, 0), (0, blocks * block_kv - length)), constant_values=NOT_REAL)
    by_block = keys.reshape(batch, 1, blocks, block_kv)
    real = by_block != NOT_REAL
    queries, touched, whole = None, real.any(-1), real.all(-1)
    if segments is not None:
        # Rows past the end repeat the last real row's segment: they must not widen what a tile reads.
        queries = jnp.pad(segments, ((0, 0), (0, row_tiles * rows - length)), mode="edge")
        by_tile = queries.reshape(batch, row_tiles, 1, rows)
        low, high = by_tile.min(-1), by_tile.max(-1)
        floor = jnp.where(real, by_block, 2**31 - 1).min(-1)
        touched &= (floor <= high) & (by_block.max(-1) >= low)
        whole &= (floor == by_block.max(-1)) & (low == high) & (floor == low)

    def run(flags):
        """The first run of true: [first, last), empty where there is none."""
        first = jnp.argmax(flags, -1)
        at = jnp.arange(blocks)
        stop = jnp.where(~flags & (at >= first[..., None]), at, blocks).min(-1)
        return first, jnp.where(flags.any(-1), stop, first)

    last = blocks - jnp.argmax(touched[..., ::-1], -1)
    first = jnp.argmax(touched, -1)
    bounds = jnp.stack((first, jnp.where(touched.any(-1), last, first), *run(whole)), -1).astype(jnp.int32)
    return queries, keys, jnp.broadcast_to(bounds, (batch, row_tiles, 4))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The body of the kernel; a fresh object a trace, its fields are Python numbers."""

    call: _Call
    length: int
    heads: int
    kv_heads: int
    row_tiles: int
    blocks: int
    narrow: bool  # 8-bit operands

    @property
    def __name__(self):
        return "flash_attention"

    def __call__(self, q, k, v, sink, ids, scales, table, out, lse, *, qo_smem=None, **scratch):
        if qo_smem is not None:
            scratch["q_smem"], scratch["o_smem"] = qo_smem
        scratch["separate"] = qo_smem is None  # results from queries
        wg = lax.axis_index("wg")
        last = self.call.tiles.warpgroups

        @pl.when(wg < last)
        def _():
            plgpu.set_max_registers(self.call.tiles.max_registers, action="increase")
            if self.call.tiles.turns:
                pl.when(wg == last - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))
            self.each_tile(ids, table, functools.partial(self.compute, wg, sink, ids, scales, out, lse, **scratch))
            plgpu.wait_smem_to_gmem(0)
            if self.call.tiles.turns:
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))

        @pl.when(wg == last)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            steps = self.each_tile(ids, table, functools.partial(self.load, q, k, v, **scratch))
            self.drain(steps, **scratch)

    def each_tile(self, ids, table, body):
        """body(where, tiles done, steps done) over this thread block's list -> steps done."""
        block = lax.axis_index("block")

        def one(i, carry):
            done, tile = carry
            following = table[block, jnp.minimum(i + 2, table.shape[1] - 1)]
            where = _Where.of(self, tile, ids)
            body(where, i, done)
            return done + where.steps, following

        first = table[block, 1]
        if table.shape[1] == 2:  # one tile a thread block
            return one(first * 0, (first * 0, first))[0]
        return lax.fori_loop(0, table[block, 0], one, (first * 0, first))[0]

    def load(
        self,
        q,
        k,
        v,
        where,
        number,
        done,
        *,
        q_smem,
        q_here,
        q_free,
        k_smem,
        v_smem,
        k_here,
        v_here,
        k_free,
        v_free,
        **_,
    ):
        """Keys of step t, then values of step t - 1: the order in which they are used."""
        tile = self.call.tiles

        def fetch(step, source, target, here, free):
            slot = lax.rem(done + step, tile.stages)

            @pl.when(done + step >= tile.stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            at = pl.ds(where.block(step) * tile.block_kv, tile.block_kv)
            index = (where.kv_head, slice(None), at) if self.narrow and source is v else (at, where.kv_head)
            plgpu.copy_gmem_to_smem(source.at[where.b, *index], target.at[slot], here.at[slot])

        fetch(0, k, k_smem, k_here, k_free)
        for wg in range(tile.warpgroups):
            pl.when(number > 0)(functools.partial(plgpu.barrier_wait, q_free.at[wg]))
            rows = pl.ds(where.row + wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q.at[where.b, rows, where.head], q_smem.at[wg], q_here.at[wg])

        @pl.loop(1, where.steps)
        def _(step):
            fetch(step, k, k_smem, k_here, k_free)
            fetch(step - 1, v, v_smem, v_here, v_free)

        fetch(where.steps - 1, v, v_smem, v_here, v_free)

    def drain(self, steps, *, q_free, k_free, v_free, **_):
        """Sees the last phase of every barrier: none may be pending when its memory goes."""
        tile = self.call.tiles
        for wg in range(tile.warpgroups):
            plgpu.barrier_wait(q_free.at[wg])
        for slot in range(tile.stages):
            for free in (k_free, v_free):
                pl.when(steps > slot)(functools.partial(plgpu.barrier_wait, free.at[slot]))

    def compute(
        self,
        wg,
        sink,
        ids,
        scales,
        out,
        lse,
        where,
        number,
        done,
        *,
        q_smem,
        o_smem,
        separate,
        lse_smem,
        q_here,
        q_free,
        **scratch,
    ):
        value_dim = out.shape[-1]
        row = where.row + wg * ROWS
        rows = pl.ds(row, ROWS)
        by_row = plgpu.Layout.WGMMA.reduce(1)
        if sink is None:
            top, total = jnp.full((ROWS,), LOWEST, jnp.float32), jnp.zeros((ROWS, PARTS), jnp.float32)
        else:
            top = jnp.full((ROWS,), sink[where.head] * LOG2E, jnp.float32)
            total = jnp.full((ROWS, PARTS), 2.0**self.peak / PARTS, jnp.float32)
        top, total = plgpu.layout_cast(top, by_row), plgpu.layout_cast(total, plgpu.Layout.WGMMA)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, value_dim), jnp.float32), plgpu.Layout.WGMMA)
        mine = None
        if ids is not None and ids[0] is not None:
            mine = plgpu.load(ids[0].at[where.b, rows], layout=by_row, optimized=False)
        factor = self.call.scale if scales is None else scales[0, where.b, where.head]
        folded = self.call.softcap is None and self.call.scale > 0  # into the exponent, behind the largest logit
        rate = factor * LOG2E if folded else 1.0

        def weights(s, step, *state):
            return self.softmax(rate, self.logits(factor, folded, where, row, mine, ids, s, step), *state)

        q_at, o_at = q_smem.at[wg], o_smem.at[wg] if separate else o_smem.at[wg, pl.ds(0, ROWS)]

        def q_used():
            if separate:
                plgpu.barrier_arrive(q_free.at[wg])

        plgpu.barrier_wait(q_here.at[wg])
        run = self.overlapped if self.call.tiles.overlap and self.call.tiles.registers else self.plain
        acc, top, total = run(where, done, wg, q_at, q_used, weights, (acc, top, total), **scratch)

        total = jnp.sum(total, axis=1)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        scale = jnp.where(empty, 0.0, (1.0 if scales is None else scales[1, where.b, where.head]) / total)
        acc = acc * lax.broadcast_in_dim(scale, acc.shape, [0])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_at[...] = acc.astype(out.dtype)
        lse_smem.at[wg][...] = jnp.where(empty, -jnp.inf, (top - self.peak) * (1 / LOG2E) + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_at, out.at[where.b, rows, where.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[where.b, where.head, rows])
        if not separate:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[wg])

    @property
    def peak(self) -> int:
        return PEAK if self.narrow else 0

    def values(self, v_smem, slot):
        """[keys, Hv] of one step."""
        return v_smem.at[slot].transpose((1, 0)) if self.narrow else v_smem.at[slot]

    def turns(self, wg, turn):
        """(wait for the tensor cores, pass them on)."""
        tile = self.call.tiles
        if not tile.turns:
            return (lambda: None), (lambda: None)
        following = lax.rem(wg + 1, tile.warpgroups)
        return (lambda: plgpu.barrier_wait(turn.at[wg])), (lambda: plgpu.barrier_arrive(turn.at[following]))

    def overlapped(
        self, where, done, wg, q, q_used, weights, state, *, k_smem, v_smem, k_here, v_here, k_free, v_free, turn, **_
    ):
        """Q K of step t and P V of step t - 1 are in flight together; the softmax of t waits for the first of them only."""
        tile = self.call.tiles
        acc, top, total = state
        take, pass_on = self.turns(wg, turn)
        slot_of = lambda step: lax.rem(done + step, tile.stages)  # noqa: E731

        def keys_of(step):
            # A wait between the softmax and the wait for P V: ptxas would pull the latter before the softmax.
            pl.when(step < where.steps)(lambda: plgpu.barrier_wait(k_here.at[slot_of(step)]))

        first = slot_of(0)
        plgpu.barrier_wait(k_here.at[first])
        take()

        def only_qk(s_ref):
            plgpu.wgmma(s_ref, q, k_smem.at[first].transpose((1, 0)))
            pass_on()
            return s_ref[...]

        s = pl.run_scoped(only_qk, plgpu.ACC((ROWS, tile.block_kv), jnp.float32))
        plgpu.barrier_arrive(k_free.at[first])
        p, _, top, total = weights(s, 0, top, total)
        p = _pack(p, v_smem.dtype)
        keys_of(1)

        def step(t, carry):
            acc, p, top, total = carry
            slot, before = slot_of(t), slot_of(t - 1)

            def products(refs):
                s_ref, acc_ref, alpha_ref, next_ref, top_ref, total_ref = refs
                plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                plgpu.barrier_wait(v_here.at[before])
                plgpu.wgmma(acc_ref, p, self.values(v_smem, before))
                pass_on()
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                s = lax.optimization_barrier(s)
                plgpu.barrier_arrive(k_free.at[slot])
                new, alpha, top_ref[...], total_ref[...] = weights(s, t, top_ref[...], total_ref[...])
                next_ref[...], alpha_ref[...] = lax.optimization_barrier((new, alpha))
                keys_of(t + 1)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(v_free.at[before])

            take()  # before the zeros: without a wait between, ptxas has the first wgmma ignore its accumulator instead
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile.block_kv), jnp.float32), plgpu.Layout.WGMMA)
            _, acc, alpha, new, top, total = pl.run_state(products)(
                (plgpu.ACC.init(zeros), plgpu.ACC.init(acc), top, zeros, top, total)
            )
            acc = lax.optimization_barrier(acc)
            acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
            return acc, _pack(new, p.dtype), top, total

        acc, p, top, total = lax.fori_loop(1, where.steps, step, (acc, p, top, total))
        q_used()
        slot = slot_of(where.steps - 1)
        plgpu.barrier_wait(v_here.at[slot])
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, self.values(v_smem, slot)))(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, top, total

    def plain(
        self,
        where,
        done,
        wg,
        q,
        q_used,
        weights,
        state,
        *,
        k_smem,
        v_smem,
        k_here,
        v_here,
        k_free,
        v_free,
        turn,
        **scratch,
    ):
        """One product after the other; the warpgroups' turns alone keep the tensor cores busy."""
        tile = self.call.tiles
        take, pass_on = self.turns(wg, turn)

        def step(t, carry):
            acc, top, total = carry
            slot = lax.rem(done + t, tile.stages)
            plgpu.barrier_wait(k_here.at[slot])
            take()

            def qk(s_ref):
                plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                pass_on()
                return s_ref[...]

            s = pl.run_scoped(qk, plgpu.ACC((ROWS, tile.block_kv), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            p, alpha, top, total = weights(s, t, top, total)
            acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
            p = _pack(p, v_smem.dtype) if tile.registers else p.astype(v_smem.dtype)
            plgpu.barrier_wait(v_here.at[slot])
            if tile.registers:
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, self.values(v_smem, slot)))(plgpu.ACC.init(acc))
            else:
                p_smem = scratch["p_smem"].at[wg]
                p_smem[...] = p
                plgpu.commit_smem()

                def pv(ref):
                    plgpu.wgmma(ref, p_smem, self.values(v_smem, slot))
                    return ref[...]

                acc = acc + pl.run_scoped(pv, plgpu.ACC(acc.shape, jnp.float32))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, top, total

        state = lax.fori_loop(0, where.steps, step, state)
        q_used()
        return state

    def logits(self, factor, folded, where, row, mine, ids, s, step):
        """Products of one step -> masked logits in units that `softmax` multiplies by `rate`."""
        call = self.call
        if call.softcap is not None:
            # 1 - 2 / (e^2x + 1): the hardware's own tanh is good to 2^-11 only.
            power = jnp.exp2(s * (factor * (2 / call.softcap * LOG2E)))
            s = call.softcap * LOG2E * (1.0 - 2.0 / (power + 1.0))
        elif not folded:
            s = s * (factor * LOG2E)
        block = where.block(step)
        key = block * call.tiles.block_kv
        edge = self.edge(where, row, key, block)
        return lax.cond(edge, lambda s: self.masked(where, row, key, mine, ids, s), lambda s: s, s)

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
            seen = seen & (theirs != NOT_REAL if mine is None else theirs == lax.broadcast_in_dim(mine, s.shape, [0]))
        return jnp.where(seen, s, -jnp.inf)

    def softmax(self, rate, s, top, total):
        """-> weights, the factor for what was summed before, the new top (in powers of 2) and the new sums of PARTS columns:
        a thread adds up what it holds, threads meet at the end of the tile."""
        new = jnp.maximum(top, jnp.max(s, axis=1) * rate)
        alpha = jnp.exp2(top - new)
        p = jnp.exp2(s * rate - lax.broadcast_in_dim(new - self.peak if self.peak else new, s.shape, [0]))
        parts = [p[:, at : at + PARTS] for at in range(0, p.shape[1], PARTS)]
        while len(parts) > 1:
            parts = [functools.reduce(jnp.add, parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return p, alpha, new, total * lax.broadcast_in_dim(alpha, total.shape, [0]) + parts[0]


def _pack(p, dtype):
    """Weights float32[ROWS, keys] as the register operand of a product.

    In 8 bits a thread holds 4 keys side by side there, and 2 of each 8 here: rather than trade them between threads, the
    keys change places 16 by 16, the same way as `_transposed` has put the values.
    """
    if dtype != E4M3:
        return p.astype(dtype)
    wanted = plgpu.ShapeDtypeStruct(p.shape, E4M3, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=wanted)
    def packed(_, p):
        i32 = ir.IntegerType.get_signless(32)
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        out = np.empty(layout.registers_shape(p.shape), dtype=object)
        four = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        text = (
            "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
            "mov.b32 $0, {a, b}; }"
        )
        for index in np.ndindex(out.shape):
            row, column, *rest = index
            pairs = [p.registers[(row, 2 * column + i, *rest)] for i in range(2)]
            numbers = [
                vector.extract(pair, dynamic_position=[], static_position=[i]) for pair in pairs for i in range(2)
            ]
            word = llvm.inline_asm(i32, numbers, text, "=r,f,f,f,f", asm_dialect=0)
            out[index] = vector.bitcast(four, vector.broadcast(ir.VectorType.get((1,), i32), word))
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return packed(p)


@dataclasses.dataclass(frozen=True)
class _Where:
    """A tile, and the blocks of keys that it meets: the band, last first, then sinks."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    row: jax.Array  # first query
    stop: jax.Array  # end of the band
    band: jax.Array  # blocks in it
    sinks: jax.Array | None  # blocks before it that hold sinks; None where the mask has no sinks
    sink_stop: jax.Array
    whole: tuple | None  # blocks without a mask by segments

    @property
    def steps(self):
        return jnp.maximum(self.band if self.sinks is None else self.band + self.sinks, 1)

    def block(self, step):
        at = self.stop - 1 - step
        if self.sinks is not None:
            at = jnp.where(step < self.band, at, self.sink_stop - 1 - (step - self.band))
        return jnp.maximum(at, 0)

    @classmethod
    def of(cls, kernel: _Kernel, tile, ids):
        call, heads = kernel.call, kernel.heads
        head, tile_at = lax.div(tile, kernel.row_tiles), lax.rem(tile, kernel.row_tiles)
        b, head = lax.div(head, heads), lax.rem(head, heads)
        row = tile_at * (ROWS * call.tiles.warpgroups)
        # Plus a zero that is traced: lowering wants no Python numbers where it expects values.
        start, stop, sinks = (tile * 0 + x for x in _band(call.mask, call.tiles, row, kernel.blocks))
        sink_stop, whole = sinks, None
        if ids is not None:
            low, high, first, last = (ids[2][b, tile_at, i] for i in range(4))
            start, stop, whole = jnp.maximum(start, low), jnp.minimum(stop, high), (first, last)
            sink_stop = jnp.minimum(sink_stop, high)
            sinks = jnp.maximum(sink_stop - low, 0)
        return cls(
            b=b,
            head=head,
            kv_head=lax.div(head, heads // kernel.kv_heads),
            row=row,
            stop=stop,
            band=jnp.maximum(stop - start, 0),
            sinks=sinks if call.mask.window is not None and call.mask.sinks else None,
            sink_stop=sink_stop,
            whole=whole,
        )
