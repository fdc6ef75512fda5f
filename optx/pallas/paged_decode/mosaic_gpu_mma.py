"""`paged_decode` by the matrix instructions of a warp (mma.sync), which every NVIDIA GPU since Ampere has.

Decoding is bound by the bytes of keys and values: of 64 tokens and a head of 128 numbers an SM of a B200 gets 32 KiB in some
1,200 clocks, in which these instructions do the products several times over. So what newer parts have (wgmma, tcgen05) gains
nothing here; the copies do: by the tensor memory accelerator from Hopper on, by cp.async before.

A thread block is one warpgroup that reads the pages part, part + parts, ... of a row and a kv head, a few copies ahead; its
warps share out the keys of a page, then the columns of the values. Parts end as sums of their own, which XLA merges
(FlashAttention-2, arXiv:2307.08691, section 3.1).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.errors import LoweringError
from optx.pallas.attention.page_formats import streams_of
from optx.pallas.attention.reference import Mask
from optx.pallas.late import plgpu, utils
from optx.tensor import is_qtensor

ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm120")
HEAD_DIMS = (64, 128, 256)
PAGES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
ROWS = 32  # query rows (query tokens by heads of a kv head) that a thread block has at most
SHARED = {
    8: 90 << 10,
    12: 90 << 10,
}  # bytes of pages in flight by major architecture; others 112 << 10: two blocks fit an SM
BLOCKS = 4 * 148  # thread blocks that should be there: some for each SM
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    parts: int  # thread blocks that share out the pages of a row and head
    stages: int  # pages in flight
    tma: bool = True  # False: copies by cp.async, the only ones before Hopper
    interpreted: bool = False  # products by jnp.dot, as the interpreter knows no mma


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static in a call."""

    mask: Mask
    scale: float
    softcap: float | None
    tiles: Tiles
    lists: int  # G: page lists, one for all heads or one a kv head
    bands: int  # tiles of query rows
    rows: int  # query rows of a tile
    scaled: bool = False  # cached tokens have a logit scale


def supports(args, target) -> str | None:
    """None, or why this kernel declines the call site. Reads cache, heads, kv_heads, head_dim and page_size."""
    cache = args["cache"]
    if cache.kind != "paged":
        return f"reads paged keys and values, not a {cache.kind} cache"
    if args["head_dim"] not in HEAD_DIMS:
        return f"head_dim {args['head_dim']}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    streams = streams_of(cache)
    if isinstance(streams, str):
        return streams
    if any(stream.code != "dense" for stream in streams.values()):
        return "reads pages of 16-bit numbers, and these are packed"
    if jnp.dtype(cache.dtype) not in DTYPES:
        return f"pages of {cache.dtype}; allowed: bfloat16, float16"
    if args.get("page_size") not in (None, *PAGES):
        return f"page size {args['page_size']}; allowed: {', '.join(map(str, PAGES))}"
    if target.arch.startswith("sm8") and args.get("page_size") == 16 and args["head_dim"] == 64:
        return "pages of 16 tokens by 64 numbers: too little for a copy by cp.async"
    if args["mask"].block > 1:
        return "borders of a mask that move by blocks"
    return "adds no bias to keys" if args.get("key_bias") else None


def capability() -> int:
    """Major architecture that is lowered for; 9 where the device does not say."""
    return utils._infer_arch()[0]


def tiles_for(batch: int, kv_heads: int, bands: int, pages: int, page: int, head_dim: int, major: int) -> Tiles:
    stage = 2 * 2 * page * head_dim
    parts = max(1, min(pages, BLOCKS // (batch * kv_heads * bands), 64))
    stages = max(1, min(4, SHARED.get(major, 112 << 10) // stage))
    return Tiles(parts=parts, stages=stages, tma=major >= 9)


def paged_decode(
    q,
    k_pool,
    v_pool,
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
    """Attention of Q new tokens a row over its cached tokens, their own included: `reference.paged_attention`.

    q [B, Q, N, H]; pools [pages + 1, K, P, H]; positions int32[pages + 1, P]; table int32[G, B, pages]; lengths int32[G, B];
    q_positions int32[B, Q], -1 where there is no query; logit_scale [pages + 1, K, P]. -> (out [B, Q, N, H], lse
    float32[B, Q, N], None). Raises: LoweringError naming the argument for what it does not take.
    """
    if reason := _refusal(q, k_pool, v_pool, logit_scale, value_dim, want_scores, mask):
        raise LoweringError(f"paged_decode (mosaic_gpu, mma): {reason}")
    b, queries, n, h = q.shape
    kv_heads, page = k_pool.shape[1:3]
    rows = queries * n // kv_heads
    bands = pl.cdiv(rows, ROWS)
    tiles = tiles or tiles_for(b, kv_heads, bands, table.shape[2], page, h, capability())
    if not tiles.tma and page * h < 2048:
        raise LoweringError(
            f"paged_decode (mosaic_gpu, mma): pages of {page} x {h}; allowed before Hopper: 2048 numbers or more"
        )
    call = Call(
        mask=mask,
        scale=float(1 / math.sqrt(h) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        tiles=tiles,
        lists=table.shape[0],
        bands=bands,
        rows=16 if rows <= 16 and page >= 32 else ROWS,
        scaled=logit_scale is not None,
    )
    out, lse = _run(call, q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale)
    return out, lse, None


def _refusal(q, k_pool, v_pool, logit_scale, value_dim, want_scores, mask) -> str | None:
    if v_pool is None or value_dim is not None or want_scores:
        return f"v_pool {v_pool is not None}, want_scores {want_scores}; allowed: a pool of values, no scores"
    if any(is_qtensor(pool) for pool in (k_pool, v_pool)):
        return "pools are packed; allowed: of 16 bits"
    if k_pool.shape != v_pool.shape or k_pool.ndim != 4:
        return f"pools are {k_pool.shape} and {v_pool.shape}; allowed: two of [pages, K, P, H]"
    if q.dtype not in DTYPES or k_pool.dtype != q.dtype or v_pool.dtype != q.dtype:
        return (
            f"q, k_pool and v_pool are {q.dtype}, {k_pool.dtype}, {v_pool.dtype}; allowed: all bfloat16, or all float16"
        )
    if q.shape[3] not in HEAD_DIMS or k_pool.shape[2] not in PAGES:
        return f"head dim {q.shape[3]}, pages of {k_pool.shape[2]}; allowed: {HEAD_DIMS}, {PAGES}"
    if logit_scale is not None and logit_scale.shape != k_pool.shape[:3]:
        return f"logit_scale {logit_scale.shape}; allowed: {k_pool.shape[:3]}"
    return "a mask with blocks; allowed: block 1" if mask.block > 1 else None


def pages_of_part(length, part, parts: int, page: int):
    """How many of the pages part, part + parts, ... hold slots below `length`."""
    return lax.max(lax.div(lax.div(length + (page - 1), page) - part + (parts - 1), parts), 0)


def _body(q, k_pool, v_pool, positions, table, lengths, q_positions, *refs, call: Call):
    tiles, refs = call.tiles, list(refs)
    logit_scale = refs.pop(0) if call.scaled else None
    out, lse, k_smem, v_smem, p_smem, full = refs
    parts, stages, (page, h) = tiles.parts, tiles.stages, k_pool.shape[2:]
    part, band = lax.rem(lax.axis_index("part"), parts), lax.div(lax.axis_index("part"), parts)
    head, row = lax.axis_index("head"), lax.axis_index("row")
    listed = head if call.lists > 1 else 0
    length = lengths[listed, row]
    count = pages_of_part(length, part, parts, page)
    # Warps side by side: a tile of results is 16 rows a warp of one, and 8 columns a warp of the other number.
    high = 1 if call.rows == 16 or page >= 32 else 2
    acc_layout = plgpu.Layout.MMA_ACC(q.dtype, m_warps=high)
    left_layout = plgpu.Layout.MMA_LHS(q.dtype, m_warps=high)
    right_layout = plgpu.Layout.MMA_RHS(q.dtype, m_warps=high)
    by_row, by_column = acc_layout.reduce(1), acc_layout.reduce(0)
    shape = (call.rows, page)
    spread = lambda x, axis, to, layout=acc_layout: plgpu.layout_cast(lax.broadcast_in_dim(x, to, (axis,)), layout)  # noqa: E731
    load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731

    def product(acc, a, b):
        if tiles.interpreted:
            return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
        return plgpu.mma(acc, a, b)

    def listed_page(i):
        return table[listed, row, part + i * parts]

    inside = {} if tiles.tma else {"oob_mode": plgpu.OOBFillMode.PROMISE_IN_BOUNDS}

    def fetch(slot, i):
        """Page i of the part into a slot. By cp.async, whose copies are waited for by their number, there is always one more."""
        at = listed_page(i if tiles.tma else lax.min(i, lax.max(count - 1, 0)))
        for pool, smem in ((k_pool, k_smem), (v_pool, v_smem)):
            barrier = [full.at[slot]] if tiles.tma else []
            plgpu.copy_gmem_to_smem(pool.at[at, head], smem.at[slot], *barrier, **inside)

    def fetch_next(slot, i):
        run = functools.partial(fetch, slot, i)
        pl.when(i < count)(run) if tiles.tma else run()

    for i in range(stages):
        fetch_next(i, jnp.int32(i))

    mine = load(q.at[row, head, pl.ds(band * call.rows, call.rows)], left_layout)
    asked = load(q_positions.at[row, pl.ds(band * call.rows, call.rows)], by_row)
    asked = spread(asked, 0, shape)

    def step(i, carry):
        largest, total, sums = carry
        slot, at = lax.rem(i, stages), listed_page(i)
        if tiles.tma:
            plgpu.barrier_wait(full.at[slot])
        else:
            plgpu.wait_gmem_to_smem(2 * (stages - 1))
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), acc_layout)
        keys = load(k_smem.at[slot].T, right_layout)
        logits = product(zeros, mine, keys) * call.scale
        if call.scaled:
            logits = logits * spread(load(logit_scale.at[at, head], by_column), 1, shape)
        if call.softcap is not None:
            logits = jnp.tanh(logits / call.softcap) * call.softcap
        first = (part + i * parts) * page
        key = spread(load(positions.at[at], by_column), 1, shape)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=acc_layout)
        seen = call.mask(asked, key) & (asked >= 0) & (column < length - first)
        logits = jnp.where(seen, logits * LOG2E, LOWEST)
        top = jnp.maximum(largest, jnp.max(logits, axis=1))
        shrink = jnp.exp2(largest - top)
        weights = jnp.where(seen, jnp.exp2(logits - spread(top, 0, shape)), 0.0)
        total = total * shrink + jnp.sum(weights, axis=1)
        p_smem[...] = weights.astype(q.dtype)
        plgpu.commit_smem()  # a barrier: warps read weights of keys that other warps have computed
        values = load(v_smem.at[slot], right_layout)
        # Counted along one axis: a pair of a register lies along tokens here, and an iota of two axes counts it along columns.
        token = plgpu.broadcasted_iota(jnp.int32, (page,), 0, layout=right_layout.reduce(1))
        written = spread(token < length - first, 0, (page, h), right_layout)
        values = jnp.where(written, values, jnp.zeros((), q.dtype))  # what was never written may be anything
        sums = product(sums * spread(shrink, 0, sums.shape), load(p_smem, left_layout), values)
        plgpu.commit_smem()  # what was read is read before copies and the next weights are written there
        fetch_next(slot, i + stages)
        return top, total, sums

    full_of = lambda x: plgpu.layout_cast(jnp.full((call.rows,), x, jnp.float32), by_row)  # noqa: E731
    zeros = plgpu.layout_cast(jnp.zeros((call.rows, h), jnp.float32), acc_layout)
    largest, total, sums = lax.fori_loop(0, count, step, (full_of(LOWEST), full_of(0.0), zeros))
    if not tiles.tma:
        plgpu.wait_gmem_to_smem(0)
    some = total > 0
    part_of = 1 / jnp.where(some, total, 1.0)
    to = pl.ds(band * call.rows, call.rows)
    out.at[part, row, head, to][...] = sums * spread(part_of, 0, sums.shape)
    lse.at[part, row, head, to][...] = jnp.where(some, largest / LOG2E + jnp.log(total), -jnp.inf)


def merge(out, lse, sink_logits, dtype):
    """Parts of one softmax: out [parts, ..., N, H] and lse float32[parts, ..., N], with a logit a head that has no value where
    sink_logits [N] are given -> (out [..., N, H] in dtype, lse [..., N])."""
    total = jax.nn.logsumexp(lse, axis=0)
    total = total if sink_logits is None else jnp.logaddexp(total, sink_logits.astype(jnp.float32))
    share = jnp.exp(lse - jnp.where(jnp.isfinite(total), total, 0))[..., None]
    return jnp.sum(jnp.where(share > 0, share * out, 0), axis=0).astype(dtype), total


@functools.partial(jax.jit, static_argnums=0)
def _run(call: Call, q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale):
    """The kernel's call, alike for all layers of a model: assembled once; and the merge of its parts."""
    b, queries, n, h = q.shape
    kv_heads, page = k_pool.shape[1:3]
    group, tiles = n // kv_heads, call.tiles
    rows, whole = queries * group, call.bands * call.rows
    by_head = jnp.moveaxis(q.reshape(b, queries, kv_heads, group, h), 2, 1).reshape(b, kv_heads, rows, h)
    by_head = jnp.pad(by_head, ((0, 0), (0, 0), (0, whole - rows), (0, 0)))
    asked = jnp.pad(jnp.repeat(q_positions, group, axis=1), ((0, 0), (0, whole - rows)), constant_values=-1)
    more = [logit_scale.astype(jnp.float32)] if call.scaled else []
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    pages = plgpu.SMEM((tiles.stages, page, h), q.dtype, transforms=transforms)
    kernel = plgpu.kernel(
        functools.partial(_body, call=call),
        out_type=(
            jax.ShapeDtypeStruct((tiles.parts, b, kv_heads, whole, h), jnp.float32),
            jax.ShapeDtypeStruct((tiles.parts, b, kv_heads, whole), jnp.float32),
        ),
        grid=(tiles.parts * call.bands, kv_heads, b),
        grid_names=("part", "head", "row"),
        scratch_types=(
            pages,
            pages,
            plgpu.SMEM((call.rows, page), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="paged_decode_mma",
    )
    out, lse = kernel(by_head, k_pool, v_pool, positions, table, lengths, asked, *more)
    back = lambda x: jnp.moveaxis(x[:, :, :, :rows].reshape(*x.shape[:3], queries, group, *x.shape[4:]), 2, 3)  # noqa: E731
    out, lse = (back(x).reshape(tiles.parts, b, queries, n, *x.shape[4:]) for x in (out, lse))
    return merge(out, lse, sink_logits, q.dtype)
