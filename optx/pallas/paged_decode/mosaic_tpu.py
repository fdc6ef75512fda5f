"""Attention over paged caches on TPU: one Pallas Mosaic kernel for decode (here) and ragged ticks (ragged_paged_attention).

A grid step is an item: a block of one row's queries against the pages that they can see. Pages are copied from HBM by
hand, several a block, two blocks in flight; the first block of the next item starts while the last one of this item is
computed, so the copy engine does not idle between rows. Packed pages stay packed until they are in VMEM: scales multiply
logits (keys) and weights (values), never the pages themselves.

Layout: XLA stores a pool [pages + 1, K, P, H] with H minor when H is a multiple of 128 lanes, else with P minor when P is.
The kernel takes both as they lie (`turned`: a page of a head is [H, P]); anything else would copy the pool every call and
is refused. Scales [.., P, 1] are taken as [.., P]: free at P = 128, a copy of the scales (not of the data) at P = 64.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optx.errors import FormatError
from optx.formats import Float8, Int
from optx.pallas.attention.reference import Mask
from optx.tensor import Tensor, is_qtensor

LANES = 128
BLOCK_BYTES = 2 << 20  # keys and values a block: long enough to hide the latency of HBM, two of them in VMEM
SLOTS = 1024  # most cached slots a block
ROWS = 2048  # heads * query rows an item: bounds the accumulators
SMEM = 512 << 10  # bytes of page table and schedule
VMEM = 40 << 20  # of 64 MB (v7x) or 128 MB (v5e, v6e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """queries: tokens an item; pages: cache pages a block."""

    queries: int
    pages: int


def tiles(*, queries: int, group: int, heads: int, page: int, page_bytes: int, pages: int, decode: bool) -> Tiles:
    """From shapes: longest run of queries, query heads a kv head, kv heads an item, page size, bytes of a page of these
    heads in all streams, pages of the table."""
    count = 1
    while 2 * count <= pages and 2 * count * page_bytes <= BLOCK_BYTES and 2 * count * page <= SLOTS:
        count *= 2
    if decode:
        return Tiles(queries=queries, pages=count)
    rows = min(max(ROWS // heads, 16), 256)
    return Tiles(queries=min(_power(queries), max(_power(rows // group), 1)), pages=count)


def supports(args, target) -> str | None:
    """Formats, head counts and dtypes that the kernel takes; page sizes are checked when it is called."""
    if target.platform != "tpu":
        return f"is for tpu, not {target.platform}"
    cache = args["cache"]
    if not cache.holds_tokens:
        return f"a {cache.kind} cache holds no tokens"
    if cache.format is None and cache.dtype not in ("float32", "bfloat16"):
        return f"pages in {cache.dtype}; allowed: float32, bfloat16"
    reason = format_reason(cache.format) if cache.format is not None else None
    if reason:
        return reason
    value_dim = args.get("value_dim")
    if value_dim and cache.format is not None and value_dim % 2:
        return f"value_dim {value_dim} of packed latents; allowed: an even number"
    return None


def format_reason(format_) -> str | None:
    """Why pages in this format cannot be read, or None."""
    if isinstance(format_, Int) and format_.width in (4, 8) and format_.group is None:
        return None
    if isinstance(format_, Float8) and format_.kind == "e4m3" and format_.group is None:
        return None
    return f"pages in {format_}; allowed: int8, int4, fp8_e4m3 with one scale a token and head"


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
    interpret=False,
):
    """Attention of Q = 1 .. 8 new tokens a row over its cached tokens, as `attention.reference.paged_attention`.

    q [B, Q, N, H]; pools [pages, K, P, H], dense or packed; v_pool None: values are the first `value_dim` numbers of the
    keys; positions int32[pages, P]; table int32[G, B, pages], G = 1 or K; lengths int32[G, B]; q_positions int32[B, Q],
    -1 where there is no query; logit_scale [pages, K, P]; sink_logits [N].
    -> (out [B, Q, N, Hv], lse float32[B, Q, N], None).
    Raises: FormatError for shapes that the kernel does not take, and for want_scores.
    """
    if not 1 <= q.shape[1] <= 8:
        raise FormatError(
            f"paged_decode: q has {q.shape[1]} tokens a row; allowed: 1 to 8, or use ragged_paged_attention"
        )
    check("paged_decode", q, k_pool, v_pool, table, value_dim, want_scores)
    return _decode(
        q,
        k_pool,
        v_pool,
        positions,
        table,
        lengths,
        q_positions,
        sink_logits,
        logit_scale,
        mask=mask,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        value_dim=value_dim,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("mask", "scale", "softcap", "value_dim", "interpret"))
def _decode(q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale, *, mask, **static):
    b, queries = q_positions.shape
    tile = tiles_for(q, k_pool, v_pool, table, queries, decode=True)
    count = jnp.sum(q_positions >= 0, axis=1, dtype=jnp.int32)
    items = Items(
        rows=jnp.arange(b, dtype=jnp.int32),
        low=lengths - count,
        high=lengths,
        active=count > 0,
        positions=q_positions,
    )
    pools = Pools(k=k_pool, v=v_pool, positions=positions, table=table, lengths=lengths)
    out, lse = run(q, pools, items, tile, sink_logits, logit_scale, mask=mask, **static)
    return out, lse, None


def check(op: str, q, k_pool, v_pool, table, value_dim, want_scores) -> None:
    """Raises FormatError for what `run` cannot take."""
    if want_scores:
        raise FormatError(f"{op}: want_scores=True; allowed on tpu: False (scores come from the xla row)")
    if v_pool is None and value_dim is None:
        raise FormatError(f"{op}: v_pool is None and value_dim is None; give value_dim, the length of MLA values")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise FormatError(f"{op}: q in {q.dtype}; allowed: float32, bfloat16")
    kv_heads = k_pool.shape[1]
    if q.shape[-2] % kv_heads:
        raise FormatError(f"{op}: {q.shape[-2]} query heads over {kv_heads} kv heads; allowed: a multiple")
    if table.shape[0] not in (1, kv_heads):
        raise FormatError(f"{op}: table of {table.shape[0]} groups; allowed: 1 or the {kv_heads} kv heads")
    size = 4 * (math.prod(table.shape) + math.prod(table.shape[:2]))
    if size > SMEM:
        raise FormatError(f"{op}: page table {list(table.shape)} takes {size} bytes of scalar memory; allowed: {SMEM}")
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool is None:
            continue
        if is_qtensor(pool) and (reason := format_reason(pool.format)):
            raise FormatError(f"{op}: {name}: {reason}")
        data = pool.data if is_qtensor(pool) else pool
        if not is_qtensor(pool) and data.dtype not in (jnp.float32, jnp.bfloat16):
            raise FormatError(f"{op}: {name} in {data.dtype}; allowed: float32, bfloat16, or a QTensor")
        page, width = data.shape[2:]
        need = 32 // data.dtype.itemsize  # rows that one tile of VMEM packs
        if page % need:
            raise FormatError(f"{op}: {name} has pages of {page} tokens in {data.dtype}; allowed: multiples of {need}")
        if width % LANES and page % LANES and width < LANES:
            raise FormatError(
                f"{op}: {name} has pages of {page} tokens with {width} entries a head, which would be copied every call; "
                f"allowed: pages of {LANES} tokens, or heads of {LANES} entries"
            )


def tiles_for(q, k_pool: Tensor, v_pool: Tensor | None, table, queries: int, *, decode: bool) -> Tiles:
    groups, _, pages = table.shape
    kv_heads, page = k_pool.shape[1:3]
    bytes_ = sum(_nbytes(x) // x.shape[0] for x in jax.tree.leaves((k_pool, v_pool))) // groups
    return tiles(
        queries=queries,
        group=q.shape[-2] // kv_heads,
        heads=kv_heads // groups,
        page=page,
        page_bytes=bytes_,
        pages=pages,
        decode=decode,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """Blocks of queries: cache row, the slots [low, high) that bound what its queries see (low: the slot of the first
    query), whether it has a query at all, and the queries' positions (-1: none)."""

    rows: jax.Array  # int32[I]
    low: jax.Array  # int32[G, I]
    high: jax.Array  # int32[G, I]
    active: jax.Array  # bool[I]
    positions: jax.Array  # int32[I, Q]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pools:
    """What a layer's view holds."""

    k: Tensor
    v: Tensor | None
    positions: jax.Array
    table: jax.Array
    lengths: jax.Array


# Rows of the schedule, int32 a grid step.
LINE, LENGTH, FIRST, COUNT, SINKS, NEXT, BEFORE = range(7)


def schedule(items: Items, lengths, mask: Mask, slots: int) -> jax.Array:
    """int32[7, G * I]: line of the table, its length, first block in reach, number of blocks, how many of them are sinks
    before `first`, next step that has blocks (or -1), blocks of all steps before."""
    groups, b = lengths.shape
    line = jnp.arange(groups, dtype=jnp.int32)[:, None] * b + items.rows
    first = jnp.maximum(items.low - mask.window + 1, 0) // slots if mask.window else jnp.zeros_like(items.low)
    last = -(-items.high // slots)
    sinks = jnp.minimum(-(-mask.sinks // slots), first) if mask.window else jnp.zeros_like(first)
    count = jnp.where(items.active, jnp.maximum(sinks + last - first, 0), 0).ravel()
    steps = count.shape[0]
    busy = jnp.where(count > 0, jnp.arange(steps, dtype=jnp.int32), steps)
    following = jnp.append(jax.lax.cummin(busy, reverse=True)[1:], jnp.int32(steps))
    return jnp.stack(
        [
            line.ravel(),
            jnp.take(lengths.ravel(), line.ravel()),
            first.ravel(),
            count,
            sinks.ravel(),
            jnp.where(following < steps, following, -1),
            jnp.cumsum(count) - count,
        ]
    ).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Static facts of one kernel."""

    groups: int
    items: int
    pages: int  # of the table
    block: int  # pages a block
    page: int  # tokens a page
    streams: tuple[str, ...]  # names of the pools that are copied, in order
    k_parts: int  # 2 for int4: even and odd numbers of a head
    v_parts: int
    k_turned: bool
    v_turned: bool
    k_signed: bool  # int4 codes are centred on 8
    v_signed: bool
    value: int  # entries of a value part
    scale: float
    softcap: float | None
    sink: bool
    mask: Mask


def run(
    q, pools: Pools, items: Items, tile: Tiles, sink_logits, logit_scale, *, mask, scale, softcap, value_dim, interpret
):
    """q [I, Q, N, H] against the pages of its items' rows -> (out [I, Q, N, Hv], lse float32[I, Q, N])."""
    count, queries, n, h = q.shape
    groups, b, pages = pools.table.shape
    kv_heads, page = pools.k.shape[1:3]
    heads, group = kv_heads // groups, n // kv_heads
    slots = tile.pages * page
    streams = _streams(pools, logit_scale)
    value_dim = value_dim if pools.v is None else pools.v.shape[-1]
    k_parts = _parts(pools.k)
    v_parts = k_parts if pools.v is None else _parts(pools.v)
    k_turned = _turned(pools.k)
    spec = Spec(
        groups=groups,
        items=count,
        pages=pages,
        block=tile.pages,
        page=page,
        streams=tuple(streams),
        k_parts=k_parts,
        v_parts=v_parts,
        k_turned=k_turned,
        v_turned=k_turned if pools.v is None else _turned(pools.v),
        k_signed=_signed(pools.k),
        v_signed=_signed(pools.k if pools.v is None else pools.v),
        value=value_dim // v_parts,
        scale=scale,
        softcap=softcap,
        sink=sink_logits is not None,
        mask=mask,
    )
    plan = schedule(items, pools.lengths, mask, slots)
    blocks = -(-pages // tile.pages)
    at = jnp.take(pools.positions, pools.table, axis=0, mode="clip").reshape(groups * b, pages * page)
    at = jnp.where(jnp.arange(pages * page) < pools.lengths.reshape(-1, 1), at, -1)
    at = jnp.pad(at, ((0, 0), (0, blocks * slots - pages * page)), constant_values=-1).reshape(-1, blocks, slots)

    used = queries * group
    rows = -(-used // 16) * 16  # a tile of bf16 packs 16 rows
    fill = ((0, 0), (0, 0), (0, 0), (0, rows - used), (0, 0))
    arranged = q.reshape(count, queries, kv_heads, group, h // k_parts, k_parts)
    arranged = arranged.transpose(0, 2, 5, 1, 3, 4).reshape(count, kv_heads, k_parts, used, h // k_parts)
    arranged = jnp.pad(arranged, fill)
    asked = jnp.pad(jnp.repeat(items.positions, group, axis=1), ((0, 0), (0, rows - used)), constant_values=-1)

    operands = [arranged, asked[..., None], at]
    in_specs = [
        pl.BlockSpec((1, heads, k_parts, rows, h // k_parts), lambda i, *_: (i % count, i // count, 0, 0, 0)),
        pl.BlockSpec((1, rows, 1), lambda i, *_: (i % count, 0, 0)),
        pl.BlockSpec((1, blocks, slots), lambda i, plan, *_: (plan[LINE * groups * count + i], 0, 0)),
    ]
    if spec.sink:
        sink = jnp.tile(sink_logits.astype(jnp.float32).reshape(kv_heads, 1, group), (1, queries, 1))
        sink = jnp.pad(sink.reshape(kv_heads, used, 1), ((0, 0), (0, rows - used), (0, 0)))
        operands.append(sink)
        in_specs.append(pl.BlockSpec((heads, rows, 1), lambda i, *_: (i // count, 0, 0)))
    operands += streams.values()
    in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * len(streams)

    def buffer(name, x):
        own = kv_heads if name in FACTORS else heads  # a head's row of factors is not a whole tile: all heads come
        return pltpu.VMEM((2, tile.pages, own, *x.shape[2:]), x.dtype)

    factors = [name for name in streams if name in FACTORS]
    scratch = [
        *(buffer(name, x) for name, x in streams.items()),
        *(pltpu.VMEM((heads, slots), jnp.float32) for _ in factors),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, v_parts, rows, spec.value), jnp.float32),
        pltpu.SemaphoreType.DMA((len(streams), 2)),
    ]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, spec=spec, factors=tuple(factors)),
        out_shape=(
            jax.ShapeDtypeStruct((count, kv_heads, v_parts, rows, spec.value), q.dtype),
            jax.ShapeDtypeStruct((count, kv_heads, rows, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(groups * count,),
            in_specs=in_specs,
            out_specs=(
                pl.BlockSpec((1, heads, v_parts, rows, spec.value), lambda i, *_: (i % count, i // count, 0, 0, 0)),
                pl.BlockSpec((1, heads, rows, 1), lambda i, *_: (i % count, i // count, 0, 0)),
            ),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="paged_attention",
    )(plan.ravel(), pools.table.astype(jnp.int32).ravel(), *operands)
    out = out[:, :, :, :used].reshape(count, kv_heads, v_parts, queries, group, spec.value)
    out = out.transpose(0, 3, 1, 4, 5, 2).reshape(count, queries, n, value_dim)
    lse = lse[:, :, :used, 0].reshape(count, kv_heads, queries, group)
    return out, lse.transpose(0, 2, 1, 3).reshape(count, queries, n)


FACTORS = ("k_scale", "k_zero", "v_scale", "v_zero", "logit_scale")  # one number a token and head


def _streams(pools: Pools, logit_scale) -> dict[str, jax.Array]:
    """What is copied page by page, in the layouts that the kernel reads."""
    found = {}
    for name, pool in (("k", pools.k), ("v", pools.v)):
        if pool is None:
            continue
        data = pool.data if is_qtensor(pool) else pool
        found[name] = jnp.swapaxes(data, 2, 3) if _turned(pool) else data
        for part in ("scale", "zero") if is_qtensor(pool) else ():
            factor = getattr(pool, part)
            if factor is not None:
                found[f"{name}_{part}"] = _plain(factor[..., 0])
    if logit_scale is not None:
        found["logit_scale"] = _plain(logit_scale)
    return found


def _plain(x):
    """float16 as its bits: the vector unit has no float16."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def _parts(pool: Tensor) -> int:
    return 2 if is_qtensor(pool) and isinstance(pool.format, Int) and pool.format.width == 4 else 1


def _signed(pool: Tensor) -> bool:
    return is_qtensor(pool) and isinstance(pool.format, Int) and pool.format.symmetric


def _turned(pool: Tensor) -> bool:
    """Whether XLA lays the pool out with tokens minor: entries that would pad 128 lanes beside tokens that do not."""
    data = pool.data if is_qtensor(pool) else pool
    return data.shape[3] % LANES != 0 and data.shape[2] % LANES == 0


def _nbytes(x) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _power(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length() if n & (n - 1) else max(n, 1)


def _kernel(plan, table, q_ref, asked_ref, at_ref, *refs, spec: Spec, factors):
    refs = list(refs)
    sink_ref = refs.pop(0) if spec.sink else None
    sources = dict(zip(spec.streams, refs))
    out_ref, lse_ref = refs[len(spec.streams) : len(spec.streams) + 2]
    refs = refs[len(spec.streams) + 2 :]
    buffers = dict(zip(spec.streams, refs))
    refs = refs[len(spec.streams) :]
    lines = dict(zip(factors, refs))
    top_ref, total_ref, sum_ref, sems = refs[len(factors) :]
    heads, rows = q_ref.shape[1], q_ref.shape[3]
    steps = spec.groups * spec.items
    slots = spec.block * spec.page
    step = pl.program_id(0)
    look = lambda field, i: plan[field * steps + i]  # noqa: E731
    count, before = look(COUNT, step), look(BEFORE, step)

    def copies(i, j, slot, do):
        """`do` for every copy of block j of step i into buffer `slot`."""
        first, sinks = look(FIRST, i), look(SINKS, i)
        block = jnp.where(j < sinks, j, first + j - sinks)
        line, used = look(LINE, i), (look(LENGTH, i) + spec.page - 1) // spec.page
        group = i // spec.items

        def page(p, _):
            at = block * spec.block + p
            index = table[line * spec.pages + at]
            for s, name in enumerate(spec.streams):
                source, target = sources[name].at[index], buffers[name].at[slot, p]
                if spec.groups > 1 and name not in FACTORS:
                    source = source.at[pl.ds(group, 1)]
                do(pltpu.make_async_copy(source, target, sems.at[s, slot]))
            return 0

        jax.lax.fori_loop(0, jnp.clip(used - block * spec.block, 0, spec.block), page, 0)
        return block

    start = lambda i, j, slot: copies(i, j, slot, lambda copy: copy.start())  # noqa: E731

    @pl.when((count > 0) & (before == 0))
    def _():
        start(step, 0, 0)

    for h in range(heads):
        top_ref[h] = (
            jnp.broadcast_to(sink_ref[h], (rows, LANES))
            if spec.sink
            else jnp.full((rows, LANES), -jnp.inf, jnp.float32)
        )
    total_ref[...] = jnp.full(total_ref.shape, 1.0 if spec.sink else 0.0, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def body(j, _):
        slot = (before + j) % 2
        following = look(NEXT, step)

        @pl.when(j + 1 < count)
        def _():
            start(step, j + 1, 1 - slot)

        @pl.when((j + 1 == count) & (following >= 0))
        def _():
            start(following, 0, 1 - slot)

        block = copies(step, j, slot, lambda copy: copy.wait())
        length = look(LENGTH, step)

        @pl.when((block + 1) * slots > length)
        def _():
            _clear(buffers.get("v", buffers["k"]), slot, length - block * slots, spec.v_turned, spec)

        group = step // spec.items
        for name, line in lines.items():
            for p in range(spec.block):
                line[:, p * spec.page : (p + 1) * spec.page] = _factor(buffers[name][slot, p], group, spec)
        at = at_ref[0, pl.ds(block, 1)]
        asked = asked_ref[0]
        seen = spec.mask(asked, at) & (at >= 0) & (asked >= 0)

        def head(h):
            row = {name: line[pl.ds(h, 1)] for name, line in lines.items()}
            _head(h, slot, seen, row, q_ref, buffers, top_ref, total_ref, sum_ref, spec)

        if heads <= 8:
            for h in range(heads):
                head(h)
        else:
            jax.lax.fori_loop(0, heads, lambda h, _: (head(h), 0)[1], 0)
        return 0

    jax.lax.fori_loop(0, count, body, 0)

    for h in range(heads):
        top, total = top_ref[h][:, :1], total_ref[h][:, :1]
        lse_ref[0, h] = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
        for part in range(spec.v_parts):
            out_ref[0, h, part] = (sum_ref[h, part] / jnp.where(total > 0, total, 1)).astype(out_ref.dtype)


def _clear(buffer, slot, stored, turned: bool, spec: Spec):
    """Zeroes what lies past a row's slots: it may be NaN, and 0 * NaN must not reach the sum. Integers cannot be NaN."""
    if jnp.issubdtype(buffer.dtype, jnp.integer):
        return
    heads, *shape = buffer.shape[2:]

    def one(i, _):
        p, h = i // heads, i % heads
        token = p * spec.page + jax.lax.broadcasted_iota(jnp.int32, tuple(shape), 1 if turned else 0)
        x = buffer[slot, p, h].astype(jnp.float32)
        buffer[slot, p, h] = jnp.where(token < stored, x, 0).astype(buffer.dtype)
        return 0

    jax.lax.fori_loop(0, spec.block * heads, one, 0)


def _factor(x, group, spec: Spec):
    """Factors of one page [K, P] in any dtype -> float32[heads, P]."""
    if x.dtype == jnp.uint16:  # float16 bits; subnormals by their value, as the unit flushes them
        bits = x.astype(jnp.int32)
        sign = jnp.where(bits >= 0x8000, -1.0, 1.0)
        size = bits & 0x7FFF
        normal = pltpu.bitcast((size << 13) + (112 << 23), jnp.float32)
        normal = jnp.where(size >= 0x7C00, jnp.float32(jnp.inf), normal)
        x = sign * jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)
    elif jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.int32).astype(jnp.float32)
    else:
        x = x.astype(jnp.float32)
    if spec.groups > 1:
        mine = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == group
        x = jnp.sum(jnp.where(mine, x, 0), axis=0, keepdims=True)
    return x


def _load(buffer, slot, h, *, parts, turned, signed, size, dtype):
    """One head of a block as matmul operands, a list of `parts` arrays [slots, H / parts], or [H / parts, slots] turned."""
    if turned:
        x = jnp.concatenate([buffer[slot, p, h, :size] for p in range(buffer.shape[1])], axis=-1)
    else:
        x = buffer[slot, :, h]
        x = x.reshape(-1, x.shape[-1])[:, :size]
    if parts == 1:
        return [x if x.dtype == dtype else _cast(x, dtype)]
    codes = x.astype(jnp.int32)
    both = [codes & 15, codes >> 4]
    return [((c - 8) if signed else c).astype(jnp.float32).astype(dtype) for c in both]


def _cast(x, dtype):
    if x.dtype in (jnp.uint8, jnp.int8):
        x = x.astype(jnp.int32).astype(jnp.float32)
    return x.astype(jnp.float32).astype(dtype)


def _dot(a, b, contract: int):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _head(h, slot, seen, factors, q_ref, buffers, top_ref, total_ref, sum_ref, spec: Spec):
    """One step of the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) for one kv head."""
    dtype = q_ref.dtype
    width = q_ref.shape[-1]
    kwargs = {"parts": spec.k_parts, "turned": spec.k_turned, "signed": spec.k_signed}
    keys = _load(buffers["k"], slot, h, size=width, dtype=dtype, **kwargs)
    q = [q_ref[0, h, part] for part in range(spec.k_parts)]
    logits = sum(_dot(a, b, 0 if spec.k_turned else 1) for a, b in zip(q, keys))
    if "k_zero" in factors:
        total = sum(jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True) for x in q)
        logits = logits - total * factors["k_zero"]
    factor = factors["k_scale"] * spec.scale if "k_scale" in factors else spec.scale
    logits = logits * (factor * factors["logit_scale"] if "logit_scale" in factors else factor)
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    logits = jnp.where(seen, logits, -jnp.inf)

    before = top_ref[h]
    top = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - base[:, :1])
    decay = jnp.exp(before - base)
    top_ref[h] = top
    total_ref[h] = decay * total_ref[h] + jnp.sum(weights, axis=-1, keepdims=True)

    v_factor = "v" if "v" in buffers else "k"
    shift = None
    if f"{v_factor}_scale" in factors:
        weights = jnp.where(seen, weights * factors[f"{v_factor}_scale"], 0)
        if f"{v_factor}_zero" in factors:
            shift = jnp.sum(weights * factors[f"{v_factor}_zero"], axis=-1, keepdims=True)
    if v_factor == "k":
        values = [x[: spec.value] if spec.k_turned else x[:, : spec.value] for x in keys]
    else:
        kwargs = {"parts": spec.v_parts, "turned": spec.v_turned, "signed": spec.v_signed}
        values = _load(buffers["v"], slot, h, size=spec.value, dtype=dtype, **kwargs)
    weights = weights.astype(dtype)
    for part, value in enumerate(values):
        added = _dot(weights, value, 1 if spec.v_turned else 0)
        sum_ref[h, part] = decay[:, :1] * sum_ref[h, part] + (added if shift is None else added - shift)
