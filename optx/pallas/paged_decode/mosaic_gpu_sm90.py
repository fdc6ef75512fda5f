"""paged_decode on Hopper: each warpgroup streams an equal share of all listed tokens through TMA and tensor cores.

The tiles of all (row, kv head) units form one list that is cut into equal parts, one a warpgroup ("stream-K"), so ragged
lengths and small batches keep every SM busy. A part that covers several units, or a piece of one, leaves a partial
result (weighted values, maximum, sum) for each; a second kernel merges them in a fixed order. Query heads of a kv head and
query tokens are the 64 rows of the matrix instructions. Packed codes become 16-bit codes in shared memory; scales and zero
points act on logits and probabilities: q.(k - z)s = s(q.k - z sum(q)), and sum_j w_j z_j leaves the output, w = p s.

The split follows Stream-K (Osama et al. 2023, arXiv:2301.03598); the online softmax FlashDecoding (Dao et al. 2023).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from optx.errors import LoweringError
from optx.formats import Float8, Int
from optx.pallas.attention.reference import Mask
from optx.tensor import QTensor, is_qtensor

OP = "paged_decode"
ROWS = 64  # rows of the matrix instruction: query heads of a kv head x query tokens
SMS = 132
SMEM = 220 * 1024  # bytes a block may plan with; barriers and reductions take the rest of 227 KB
LOG2E = math.log2(math.e)
HEAD_DIMS, PAGES, GROUPS, QUERIES = (64, 128, 256), (16, 32, 64, 128), 16, 8
BF16 = jnp.dtype("bfloat16")
WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_TOKEN = WGMMA.reduce(1), WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """tokens a step, steps in flight, warpgroups an SM (each with its own steps in flight)."""

    tokens: int = 64
    stages: int = 4
    wgs: int = 1
    sms: int = SMS
    registers: bool = (
        True  # products read their left side from registers; False: all through shared memory (interpreter)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernels are specialised on; hashable, a static argument."""

    batch: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    page: int
    width: int  # pages a row in the table
    groups: int  # 1, or kv_heads where heads keep different pages
    format: str  # dense, int8, int4, fp8
    zero: bool
    dtype: str  # of queries, output and dense pools
    mask: Mask
    scale: float
    softcap: float | None
    sinks: bool  # sink logits
    tiles: Tiles

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of one kv head: query tokens x query heads."""
        return self.queries * self.group

    @property
    def blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def kept(self) -> int:
        """Rows of a block that leave the kernel: 16 rows are the fewest that the merge handles."""
        return min(ROWS, -(-self.rows // 16) * 16)

    @property
    def units(self) -> int:
        return self.batch * self.kv_heads * self.blocks

    @property
    def workers(self) -> int:
        return self.tiles.sms * self.tiles.wgs

    @property
    def packed(self) -> bool:
        return self.format != "dense"

    @property
    def bytes_wide(self) -> int:
        """Entries of a stored token along its last axis."""
        return self.head_dim // 2 if self.format == "int4" else self.head_dim


def tiles(head_dim: int, format: str = "dense") -> Tiles:
    """Steps in flight and warpgroups by head dim and format, so that SMEM is filled."""
    if format == "dense":
        return Tiles(stages={64: 12, 128: 6, 256: 2}[head_dim], wgs=1)
    wgs = 1 if head_dim == 256 else 2
    step = 2 * 64 * head_dim // (2 if format == "int4" else 1) + 1024
    fixed = wgs * (3 * 64 * head_dim * 2 + 8192)
    return Tiles(stages=min(8, (SMEM - fixed) // (wgs * step)), wgs=wgs)


def _format(fmt) -> str | None:
    """dense, int8, int4, fp8 of a cache format; None: not one that the kernel reads."""
    if fmt is None:
        return "dense"
    if getattr(fmt, "group", None) is not None:
        return None
    if isinstance(fmt, Int) and fmt.width in (8, 4):
        return f"int{fmt.width}"
    return "fp8" if isinstance(fmt, Float8) and fmt.kind == "e4m3" else None


def supports(args, target) -> str | None:
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    cache = args["cache"]
    if cache.kind != "paged":
        return f"reads paged keys and values, not a {cache.kind} cache"
    if args["head_dim"] not in HEAD_DIMS:
        return f"head_dim {args['head_dim']}; allowed: 64, 128, 256"
    if args["heads"] // args["kv_heads"] > GROUPS:
        return f"{args['heads'] // args['kv_heads']} query heads a kv head; at most {GROUPS}"
    if _format(cache.format) is None:
        return f"pages of {cache.format}; allowed: dense, int8, int4, fp8 e4m3, one scale a token and head"
    if cache.dtype not in (("bfloat16", "float16") if cache.format is None else ("bfloat16",)):
        return f"pages and queries of {cache.dtype}; allowed: bfloat16, and float16 where pages are dense"
    page = args.get("page_size")
    if page is not None and page not in PAGES:
        return f"page size {page}; allowed: 16, 32, 64, 128"
    if args.get("want_scores"):
        return "does not return scores"
    return "takes no logit scale" if args.get("logit_scale") else None


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
    """Attention of Q = 1 .. 8 new tokens a row over its cached tokens, their own included.

    q [B, Q, N, H]; pools [pages + 1, K, P, H], dense or QTensor (int8, int4, fp8 e4m3); positions int32[pages + 1, P];
    table int32[G, B, pages]; lengths int32[G, B]; q_positions int32[B, Q], -1 where there is no query: a row's queries are
    its newest slots. -> (out [B, Q, N, H], lse float32[B, Q, N], None).
    Raises: LoweringError for what the kernel does not take.
    """
    _check(q, k_pool, v_pool, table, logit_scale, value_dim, want_scores)
    plan = _plan(q, k_pool, table, mask, scale, softcap, sink_logits is not None, tiles)
    return (*_run(plan, q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits), None)


def _refuse(argument: str, got, allowed: str):
    raise LoweringError(f"{OP}: {argument} {got}; allowed: {allowed}")


def _check(q, k_pool, v_pool, table, logit_scale, value_dim, want_scores):
    if v_pool is None or value_dim is not None:
        _refuse("v_pool", "None (latents)", "a pool of values of the keys' head dim")
    if want_scores:
        _refuse("want_scores", True, "False")
    if logit_scale is not None:
        _refuse("logit_scale", "given", "None")
    b, queries, n, h = q.shape
    pages, kv_heads, page = k_pool.shape[:3]
    if k_pool.shape != v_pool.shape or k_pool.shape[3] != h:
        _refuse("pools", f"{k_pool.shape} and {v_pool.shape}", f"two of [pages + 1, K, P, {h}]")
    if h not in HEAD_DIMS:
        _refuse("head dim", h, "64, 128, 256")
    if page not in PAGES:
        _refuse("page size", page, "16, 32, 64, 128")
    if not 1 <= queries <= QUERIES:
        _refuse("query tokens", queries, f"1 to {QUERIES}")
    if n % kv_heads or n // kv_heads > GROUPS:
        _refuse("query heads", f"{n} for {kv_heads} kv heads", f"1 to {GROUPS} a kv head")
    if table.shape[0] not in (1, kv_heads) or table.shape[1] != b:
        _refuse("table", table.shape, f"[1 or {kv_heads}, {b}, pages]")
    if is_qtensor(k_pool) != is_qtensor(v_pool) or (is_qtensor(k_pool) and k_pool.format != v_pool.format):
        _refuse("formats of keys and values", f"{k_pool.dtype} and {v_pool.dtype}", "the same for both")
    if is_qtensor(k_pool):
        if _format(k_pool.format) is None:
            _refuse("format", k_pool.format, "int8, int4, fp8 e4m3, one scale a token and head")
        if q.dtype != BF16:
            _refuse("dtype of q", q.dtype, "bfloat16 over packed pages")
    elif not (q.dtype == k_pool.dtype == v_pool.dtype and q.dtype in (BF16, jnp.dtype("float16"))):
        _refuse("dtypes", f"q {q.dtype}, pools {k_pool.dtype}, {v_pool.dtype}", "all bfloat16 or all float16")


def _plan(q, k_pool, table, mask, scale, softcap, sinks, chosen) -> Plan:
    b, queries, n, h = q.shape
    fmt = _format(k_pool.format) if is_qtensor(k_pool) else "dense"
    return Plan(
        batch=b,
        queries=queries,
        heads=n,
        kv_heads=k_pool.shape[1],
        head_dim=h,
        page=k_pool.shape[2],
        width=table.shape[2],
        groups=table.shape[0],
        format=fmt,
        zero=is_qtensor(k_pool) and k_pool.format.has_zero,
        dtype=str(q.dtype),
        mask=mask,
        scale=float(1 / math.sqrt(h) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        sinks=sinks,
        tiles=chosen or tiles(h, fmt),
    )


def _span(plan: Plan, length):
    """Of a row with `length` slots: (tiles that hold sinks, first tile of the window, tiles in all)."""
    t = plan.tiles.tokens
    last = (length + (t - 1)) // t
    if plan.mask.window is None:
        zero = length * 0
        return zero, zero, last
    first = jnp.maximum(length - (plan.mask.window + plan.queries - 1), 0) // t
    sinks = jnp.minimum(first, -(-plan.mask.sinks // t))
    return sinks, first, sinks + last - first


def _offsets(plan: Plan, lengths):
    """int32[units + 1]: where each unit's tiles begin in the list of all tiles."""
    count = _span(plan, lengths)[2]  # [G, B]
    heads = jnp.broadcast_to(count.T, (plan.batch, plan.kv_heads))  # G = 1: each head alike
    if plan.groups == 1:  # a prefix over rows, then heads within a row are equal
        before = jnp.sum(jnp.where(jnp.tri(plan.batch, k=-1, dtype=bool), count[0], 0), axis=1)
        each = plan.kv_heads * plan.blocks
        units = before[:, None] * each + count[0][:, None] * jnp.arange(each, dtype=jnp.int32)
        total = jnp.sum(count) * each
        return jnp.append(units.reshape(-1), total).astype(jnp.int32)
    flat = jnp.repeat(heads.reshape(-1), plan.blocks)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(flat)]).astype(jnp.int32)


def _shares(plan: Plan, offsets):
    """int32[workers * 4]: first tile, end, first unit, end of units of each worker's share."""
    share, rest = jnp.divmod(offsets[-1], plan.workers)
    worker = jnp.arange(plan.workers, dtype=jnp.int32)
    start = worker * share + jnp.minimum(worker, rest)
    stop = start + share + (worker < rest)
    first = jnp.sum(offsets[None, 1:] <= start[:, None], axis=1)
    last = jnp.sum(offsets[None, :-1] < stop[:, None], axis=1)
    return jnp.stack([start, stop, first, last], axis=1).astype(jnp.int32).reshape(-1)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits):
    b, k, g, h = plan.batch, plan.kv_heads, plan.group, plan.head_dim
    rows = jnp.moveaxis(q.reshape(b, plan.queries, k, g, h), 1, 2).reshape(b, k, plan.rows, h)
    if plan.format == "int4":
        rows = jnp.concatenate([rows[..., 0::2], rows[..., 1::2]], axis=-1)
    pad = plan.blocks * plan.kept - plan.rows
    if pad:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, pad), (0, 0)))
    rows = rows.reshape(plan.units, plan.kept, h)
    lengths = jnp.minimum(lengths, plan.width * plan.page).astype(jnp.int32)
    offsets = _offsets(plan, lengths)
    aux = [q_positions.reshape(-1), table.reshape(-1), lengths.reshape(-1), offsets, _shares(plan, offsets)]
    if plan.mask.window is not None:
        aux.append(positions)
    if plan.packed:
        flat = lambda x: x.reshape(x.shape[:-1])  # noqa: E731
        pools = [k_pool.data, v_pool.data, flat(k_pool.scale), flat(v_pool.scale)]
        pools += [flat(k_pool.zero), flat(v_pool.zero)] if plan.zero else []
        if plan.format == "int8" and plan.zero:
            pools[:2] = [lax.bitcast_convert_type(x, jnp.int8) for x in pools[:2]]
    else:
        pools = [k_pool, v_pool]
    parts, marks = _attend(plan, rows, pools, aux)
    out, lse = _merge(plan, parts, marks, offsets, sink_logits)
    if plan.format == "int4":
        out = jnp.stack([out[..., : h // 2], out[..., h // 2 :]], axis=-1).reshape(out.shape)
    out = out.reshape(b, k, plan.blocks * plan.kept, h)[:, :, : plan.rows].reshape(b, k, plan.queries, g, h)
    lse = lse.reshape(b, k, plan.blocks * plan.kept)[:, :, : plan.rows].reshape(b, k, plan.queries, g)
    return (
        jnp.moveaxis(out, 1, 2).reshape(b, plan.queries, plan.heads, h),
        jnp.moveaxis(lse, 1, 2).reshape(b, plan.queries, plan.heads),
    )


def _tiling(width: int, bits: int):
    """SMEM layout of rows of `width` numbers: tiles of 8 rows, swizzled by their bytes."""
    swizzle = min(128, width * bits // 8)
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))


def _attend(plan: Plan, rows, pools, aux):
    """-> partial values float32[workers + units, kept, H], (maximum, sum) float32[workers + units, 2, 64]."""
    t, h, wide = plan.tiles, plan.head_dim, plan.bytes_wide
    slots, windowed = t.wgs * t.stages, plan.mask.window is not None
    per = max(1, t.tokens // plan.page)  # pages a step
    piece = min(t.tokens, plan.page)
    small = [pools[i] for i in range(2, len(pools))] + ([aux[5]] if windowed else [])
    dtype = jnp.dtype(plan.dtype)
    stored = pools[0].dtype
    half = _tiling(min(h, wide) if plan.packed else h, 16)
    scratch = {
        "q_s": plgpu.SMEM((t.wgs, ROWS, h), dtype, transforms=half),
        "o_s": plgpu.SMEM((t.wgs, ROWS, 32), jnp.float32),
        "m_s": plgpu.SMEM((t.wgs, 2, ROWS), jnp.float32),
        "k_s": plgpu.SMEM((slots, t.tokens, wide), stored, transforms=_tiling(wide, 8 * stored.itemsize)),
        "v_s": plgpu.SMEM((slots, t.tokens, wide), stored, transforms=_tiling(wide, 8 * stored.itemsize)),
        # A copy's target must be 128-byte aligned: a page's scales lie apart.
        "small_s": [plgpu.SMEM((slots, per, max(piece, 128 // x.dtype.itemsize)), x.dtype) for x in small],
        "full": plgpu.Barrier(num_arrivals=per * (2 + len(small)), num_barriers=slots),
        "q_full": plgpu.Barrier(num_barriers=t.wgs),
    }
    if plan.packed:
        scratch["wide_s"] = plgpu.SMEM((t.wgs * 2, t.tokens, h), dtype, transforms=half)
    if not t.registers:
        scratch["p_s"] = plgpu.SMEM((t.wgs, ROWS, t.tokens), dtype, transforms=_tiling(t.tokens, 16))
    segments = plan.workers + plan.units
    body = functools.partial(_attend_body, plan, len(pools), len(aux), per, piece)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((segments, plan.kept, h), jnp.float32),
            jax.ShapeDtypeStruct((segments, 2, ROWS), jnp.float32),
        ),
        grid=(t.sms,),
        grid_names=("sm",),
        num_threads=t.wgs,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )(rows, *pools, *aux)


def _attend_body(plan, pool_count, aux_count, per, piece, q_g, *refs, q_s, o_s, m_s, k_s, v_s, small_s, full, q_full,
                 wide_s=None, p_s=None):  # fmt: skip
    pools, (qpos_g, table_g, lengths_g, offsets_g, shares_g, *position_g), (parts_g, marks_g) = (
        refs[:pool_count],
        refs[pool_count : pool_count + aux_count],
        refs[pool_count + aux_count :],
    )
    t, h, mask, dtype = plan.tiles, plan.head_dim, plan.mask, jnp.dtype(plan.dtype)
    tokens, windowed = t.tokens, mask.window is not None
    wg = lax.axis_index("wg")
    worker = lax.axis_index("sm") * t.wgs + wg
    start, stop, first_unit, last_unit = (shares_g[worker * 4 + i] for i in range(4))
    q_me, o_me, m_me = q_s.at[wg], o_s.at[wg], m_s.at[wg]

    def locate(unit):
        """Row, kv head, block of rows and index into [G, B] of a unit."""
        head = unit // plan.blocks
        row, head = head // plan.kv_heads, head % plan.kv_heads
        listed = head * plan.batch + row if plan.groups > 1 else row
        return row, head, unit % plan.blocks, listed

    def first_token(tile, length):
        sinks, first, _ = _span(plan, length)
        return (tile if not windowed else jnp.where(tile < sinks, tile, first + tile - sinks)) * tokens

    def slot_of(i):
        return wg * t.stages + (i - start) % t.stages

    def fetch(i, unit):
        """Starts the copies of tile i; returns its unit, `unit` or later."""
        unit = lax.while_loop(lambda u: offsets_g[u + 1] <= i, lambda u: u + 1, unit)
        _, head, _, listed = locate(unit)
        length = lengths_g[listed]
        token, slot = first_token(i - offsets_g[unit], length), slot_of(i)
        last = (length - 1) // plan.page
        pages = [table_g[listed * plan.width + jnp.minimum(token // plan.page + j, last)] for j in range(per)]
        inside = pl.ds(pl.multiple_of(token % plan.page, piece), piece) if plan.page > piece else slice(None)
        for j, page in enumerate(pages):
            at = pl.ds(j * piece, piece)
            plgpu.copy_gmem_to_smem(pools[0].at[page, head, inside], k_s.at[slot, at], full.at[slot])
            plgpu.copy_gmem_to_smem(pools[1].at[page, head, inside], v_s.at[slot, at], full.at[slot])
            for ref, to in zip(pools[2:], small_s, strict=False):
                plgpu.copy_gmem_to_smem(ref.at[page, head, inside], to.at[slot, j, pl.ds(0, piece)], full.at[slot])
            for ref in position_g:
                plgpu.copy_gmem_to_smem(ref.at[page, inside], small_s[-1].at[slot, j, pl.ds(0, piece)], full.at[slot])
        return unit

    def vector(ref, slot):
        """The numbers of a step's tokens, [tokens]."""
        parts = [plgpu.load(ref.at[slot, j, pl.ds(0, piece)], layout=BY_TOKEN, optimized=False) for j in range(per)]
        return parts[0] if per == 1 else jnp.concatenate(parts)

    def wide(x, shape, axis):
        return lax.broadcast_in_dim(x, shape, (axis,))

    def product(a, b, shape):
        def scope(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))

    fetched = lax.fori_loop(
        0, t.stages, lambda i, u: lax.cond(start + i < stop, lambda: fetch(start + i, u), lambda: u), first_unit
    )

    def unit_loop(unit, fetched):
        offset = offsets_g[unit]
        begin, end = jnp.maximum(offset, start), jnp.minimum(offsets_g[unit + 1], stop)
        row, _, block, listed = locate(unit)
        length = lengths_g[listed]

        @pl.when(begin < end)
        def _():
            plgpu.copy_gmem_to_smem(q_g.at[unit], q_me.at[pl.ds(0, plan.kept)], q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

        limit, position, asked = _queries(plan, qpos_g, row, block, length)
        q_r = q_me[...] if t.registers or plan.packed else None
        left = plgpu.layout_cast(q_r, WGMMA) if t.registers else q_me
        q_sum = None
        if plan.zero:
            q_sum = jnp.sum(plgpu.layout_cast(q_r, WGMMA).astype(jnp.float32), axis=1)

        def tile_loop(i, carry):
            fetched, top, total, zeros, out = carry
            slot = slot_of(i)
            token = first_token(i - offset, length)
            plgpu.barrier_wait(full.at[slot])
            if plan.packed:
                keys, values = wide_s.at[wg * 2], wide_s.at[wg * 2 + 1]
                _unpack(plan, k_s.at[slot], keys)
                _unpack(plan, v_s.at[slot], values, length - token)
                plgpu.commit_smem()
            else:
                keys, values = k_s.at[slot], v_s.at[slot]

                @pl.when(token + tokens > length)
                def _():  # what lies past the length may be NaN, and 0 * NaN is NaN
                    at = plgpu.broadcasted_iota(jnp.int32, (tokens, h), 0, layout=WGMMA)
                    v = plgpu.load(values, layout=WGMMA)
                    values[...] = jnp.where(at < length - token, v, jnp.zeros_like(v))
                    plgpu.commit_smem()

            shape = (ROWS, tokens)
            s = product(left, keys.T, shape)
            columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
            if plan.packed:
                scales = [vector(ref, slot).astype(jnp.float32) for ref in small_s[: 4 if plan.zero else 2]]
                shift = 128.0 if plan.format == "int8" else 8.0
                if plan.zero:
                    s = s - wide(q_sum, shape, 0) * wide(scales[2] - shift, shape, 1)
                s = s * wide(scales[0], shape, 1)
            if plan.softcap is not None:
                # c tanh(x / c) = c - 2 c / (1 + exp(2 x / c))
                s = jnp.exp2(s * (2 * LOG2E * plan.scale / plan.softcap))
                s = plan.softcap * LOG2E - (2 * plan.softcap * LOG2E) / (1 + s)
            else:
                s = s * (plan.scale * LOG2E)
            seen = columns + token < wide(limit, shape, 0)
            if windowed:
                at = wide(vector(small_s[-1], slot), shape, 1)
                asking = wide(position, shape, 0)
                near = at > asking - mask.window
                seen = seen & ((near | (at < mask.sinks)) if mask.sinks else near)
            s = jnp.where(seen, s, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(s, axis=1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            alpha = jnp.exp2(top - base)
            p = jnp.exp2(s - wide(base, shape, 0))
            total = total * alpha + jnp.sum(p, axis=1)
            if plan.packed:
                # past the length a scale may be NaN
                p = jnp.where(seen, p * wide(scales[1], shape, 1), 0.0)
            p = p.astype(dtype)
            if plan.zero:
                away = jnp.where(seen, p.astype(jnp.float32) * wide(scales[3] - shift, shape, 1), 0.0)
                zeros = zeros * alpha + jnp.sum(away, axis=1)
            out = out * wide(alpha, out.shape, 0)
            if t.registers:
                out = pl.run_state(lambda acc: plgpu.wgmma(acc, p, values))(plgpu.ACC.init(out))
            else:
                p_s.at[wg][...] = p
                plgpu.commit_smem()
                out = out + product(p_s.at[wg], values, out.shape)
            plgpu.commit_smem()  # all four warps have read the step: it may be overwritten
            ahead = i + t.stages
            fetched = lax.cond(ahead < stop, lambda: fetch(ahead, fetched), lambda: fetched)
            return fetched, new_top, total, zeros, out

        full_of = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW)  # noqa: E731
        none = plgpu.layout_cast(jnp.zeros((ROWS, h), jnp.float32), WGMMA)
        fetched, top, total, zeros, out = lax.fori_loop(
            begin, end, tile_loop, (fetched, full_of(-jnp.inf), full_of(0.0), full_of(0.0), none)
        )
        if plan.zero:
            out = out - wide(zeros, out.shape, 0)

        @pl.when(begin < end)
        def _():
            segment = worker + unit
            m_me.at[0][...] = top
            m_me.at[1][...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(m_me, marks_g.at[segment])
            for at in range(0, h, 32):
                o_me[...] = out[:, at : at + 32]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_me.at[pl.ds(0, plan.kept)], parts_g.at[segment, :, pl.ds(at, 32)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()

        return fetched

    lax.fori_loop(first_unit, last_unit, unit_loop, fetched)
    plgpu.wait_smem_to_gmem(0)


def _queries(plan, qpos_g, row, block, length):
    """By row of the block: slots that it sees at most [64], and its position where there is a window."""
    at = [qpos_g[row * plan.queries + i] for i in range(plan.queries)]
    query = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
    query = (query + block * ROWS) // plan.group if plan.queries > 1 else query
    limits = []
    for i, mine in enumerate(at):
        later = sum(((other > mine).astype(jnp.int32) for j, other in enumerate(at) if j != i), jnp.int32(0))
        limits.append(jnp.where(mine >= 0, length - (later if plan.mask.causal else 0), 0))

    def spread(values):
        out = plgpu.layout_cast(jnp.full((ROWS,), values[0], jnp.int32), BY_ROW)
        for i in range(1, plan.queries):
            out = jnp.where(query == i, values[i], out)
        return out

    return spread(limits), spread(at) if plan.mask.window is not None else None, None


def _unpack(plan, codes, to, real=None):
    """Codes of a step [tokens, wide] in SMEM -> the same as 16-bit numbers [tokens, H]; rows from `real` on as zeros."""
    dtype = jnp.dtype(plan.dtype)
    x = plgpu.load(codes, layout=WGMMA, optimized=False)
    if plan.format == "int4":
        low, high = _nibbles(plan, x)
        to.at[:, pl.ds(0, plan.bytes_wide)][...] = low
        to.at[:, pl.ds(plan.bytes_wide, plan.bytes_wide)][...] = high
        return
    if plan.format == "int8":
        if plan.zero:
            x = x ^ jnp.int8(-128)
        to[...] = x.astype(dtype)
        return
    x = x.astype(jnp.float16).astype(jnp.float32)
    if real is not None:  # only fp8 has codes that are not a number
        x = jnp.where(plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=WGMMA) < real, x, 0.0)
    to[...] = x.astype(dtype)


def _nibbles(plan, x):
    """uint8[tokens, H / 2] -> (even, odd) numbers as code - 8."""
    dtype = jnp.dtype(plan.dtype)
    even, odd = (x & 15).astype(jnp.int32) - 8, (x >> 4).astype(jnp.int32) - 8
    return even.astype(jnp.float32).astype(dtype), odd.astype(jnp.float32).astype(dtype)


def _merge(plan: Plan, parts, marks, offsets, sink_logits):
    """Partial results of each unit -> out [units, kept, H], lse float32[units, kept]."""
    h, kept = plan.head_dim, plan.kept
    args = [parts, marks, offsets]
    if plan.sinks:
        row = jnp.arange(plan.blocks * kept) % plan.group
        sink = sink_logits.astype(jnp.float32).reshape(plan.kv_heads, plan.group)[:, row] * LOG2E
        args.append(sink.reshape(plan.kv_heads * plan.blocks, kept))
    layout = plgpu.Layout.MMA_ACC(jnp.float32, m_warps=1)
    by_row = layout.reduce(1)

    def body(parts_g, marks_g, offsets_g, *refs):
        out_g, lse_g = refs[-2:]
        unit, rows = lax.axis_index("unit"), pl.ds(lax.axis_index("rows") * 16, 16)
        begin, end, total = offsets_g[unit], offsets_g[unit + 1], offsets_g[plan.units]
        share, rest = total // plan.workers, total % plan.workers

        def worker(tile):
            long = rest * (share + 1)
            return jnp.where(tile < long, tile // (share + 1), rest + (tile - long) // jnp.maximum(share, 1))

        first = worker(begin)
        count = jnp.where(end > begin, worker(end - 1) - first + 1, 0)

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        def step(i, carry):
            top, total, out = carry
            segment = first + i + unit
            m, l = load(marks_g.at[segment, 0, rows], by_row), load(marks_g.at[segment, 1, rows], by_row)
            new = jnp.maximum(top, m)
            base = jnp.where(new == -jnp.inf, 0.0, new)
            a, b = jnp.exp2(top - base), jnp.exp2(m - base)
            part = load(parts_g.at[segment, rows], layout)
            out = out * lax.broadcast_in_dim(a, out.shape, (0,)) + part * lax.broadcast_in_dim(b, out.shape, (0,))
            return new, total * a + l * b, out

        if plan.sinks:
            top = load(refs[0].at[unit % (plan.kv_heads * plan.blocks), rows], by_row)
            total = plgpu.layout_cast(jnp.ones((16,), jnp.float32), by_row)
        else:
            top = plgpu.layout_cast(jnp.full((16,), -jnp.inf, jnp.float32), by_row)
            total = plgpu.layout_cast(jnp.zeros((16,), jnp.float32), by_row)
        none = plgpu.layout_cast(jnp.zeros((16, h), jnp.float32), layout)
        top, total, out = lax.fori_loop(0, count, step, (top, total, none))
        inverse = 1 / jnp.where(total > 0, total, 1.0)
        out = out * lax.broadcast_in_dim(inverse, out.shape, (0,))
        out_g.at[unit, rows][...] = out.astype(out_g.dtype)
        lse_g.at[unit, rows][...] = (top + jnp.log2(total)) / LOG2E

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((plan.units, kept, h), jnp.dtype(plan.dtype)),
            jax.ShapeDtypeStruct((plan.units, kept), jnp.float32),
        ),
        grid=(plan.units, kept // 16),
        grid_names=("unit", "rows"),
        num_threads=1,
        thread_name="wg",
        kernel_name="paged_decode_merge",
    )(*args)
