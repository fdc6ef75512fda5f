"""Attention over paged caches on TPU: the Pallas Mosaic kernel of `paged_decode` and `ragged_paged_attention`.

A grid step is an item: a block of one row's queries against the pages that they can see. Pages are copied from HBM by
hand, several a block, two blocks in flight; the first block of the next item starts while the last one of this item is
computed, so the copy engine does not idle between rows. Packed pages stay packed until they are in VMEM: scales multiply
logits (keys) and weights (values), never the pages themselves. An item with few queries (a decode among prefill chunks)
computes a narrow tile.

Layout: XLA stores a pool [pages, K, P, H] with H minor when H fills its 128 lanes, else with P minor when P does. The
kernel takes both as they lie (`turned`: a page of a head is [H, P]); anything else would copy the pool every call and
is refused. Scales [.., P, 1] are taken as [.., P]: free at P = 128, a copy of the scales (not of the data) below.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optx.errors import LoweringError
from optx.formats import Float8, Format, Int
from optx.pallas.attention.reference import Mask
from optx.pallas.tpu_common import LANES, VMEM, arch_reason, codes, float16_bits, number, offset_of, parts_of
from optx.tensor import Tensor, is_qtensor, leaf_bytes

PAGES = (16, 32, 64, 128)  # tokens a page
BLOCK_BYTES = 2 << 20  # keys and values a block: long enough to hide the latency of HBM, two of them in VMEM
SLOTS = 1024  # most cached slots a block
ROWS = 4096  # kv heads * query rows an item: bounds the accumulators
UNROLL = 64  # query rows up to which heads are unrolled, to overlap; above, one head fills the units and code grows
SMEM = 512 << 10  # bytes of page table and schedule
FACTORS = ("k_scale", "k_zero", "v_scale", "v_zero", "logit_scale")  # one number a token and head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a call is cut."""

    queries: int  # tokens an item
    pages: int  # cache pages a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static in a call, shapes apart."""

    mask: Mask
    scale: float
    softcap: float | None
    value_dim: int  # numbers of a value
    tiles: Tiles
    interpret: Any = False  # False, True, or pltpu.InterpretParams


def tiles(*, queries: int, group: int, heads: int, page: int, page_bytes: int, pages: int) -> Tiles:
    """By shape: most queries of a row, query heads a kv head, kv heads of an item, tokens a page, bytes of a page of these
    heads in all streams, pages of the table."""
    rows = min(max(ROWS // heads, 16), 512)
    queries = min(queries, max(_power_below(rows // group), 1))
    slots = SLOTS if queries * group <= UNROLL else SLOTS // 2
    count = 1
    while 2 * count <= pages and 2 * count * page_bytes <= BLOCK_BYTES and 2 * count * page <= slots:
        count *= 2
    return Tiles(queries=queries, pages=count)


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1) if n > 0 else 0


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why the kernel declines: reads `cache`, `heads`, `kv_heads`; given: `page_size`, `want_scores`, `key_bias`,
    `logit_scales`."""
    if reason := arch_reason(target):
        return reason
    cache = args["cache"]
    if not cache.holds_tokens:
        return f"a {cache.kind} cache holds no tokens"
    if args["heads"] % args["kv_heads"]:
        return f"{args['heads']} query heads over {args['kv_heads']} kv heads; allowed: a multiple"
    if args.get("want_scores"):
        return "returns no scores"
    if args.get("key_bias"):
        return "adds no bias to keys"
    if args.get("logit_scales", 0) not in (0, args["kv_heads"]):
        return f"{args['logit_scales']} scales of logits a token over {args['kv_heads']} kv heads; allowed: as many"
    if cache.dtype not in ("float32", "bfloat16"):
        return f"pages of {cache.dtype}; allowed: float32, bfloat16"
    for stream in cache.streams:
        format_, width, size = cache.format_of(stream), stream.shape[-1], jnp.dtype(cache.dtype).itemsize
        if format_ is not None and (reason := format_reason(format_)):
            return reason
        if format_ is not None and (args.get("value_dim") or 0) % parts_of(format_):
            return f"value_dim {args['value_dim']} of packed latents; allowed: a multiple of {parts_of(format_)}"
        if format_ is not None:
            width, size = format_.packed(width), 1
        if reason := page_reason(args.get("page_size"), width, size):
            return f"stream {stream.name}: {reason}"
        if cache.near is not None and (
            reason := page_reason(args.get("page_size"), stream.shape[-1], jnp.dtype(cache.dtype).itemsize)
        ):
            return f"stream {stream.name}, tokens kept exact: {reason}"
    return None


def format_reason(format_: Format) -> str | None:
    """Why pages in this format cannot be read, or None."""
    if isinstance(format_, Int) and format_.width in (2, 4, 8) and format_.group is None:
        return None
    if isinstance(format_, Float8) and format_.kind == "e4m3" and format_.group is None:
        return None
    return f"pages in {format_}; allowed: int8, int4, int2, fp8_e4m3 with one scale a token and head"


def page_reason(page: int | None, width: int, itemsize: int) -> str | None:
    """Why a pool of pages [page, width] would not lie in memory as the kernel reads it, or None. page None: not known."""
    if page is not None and page not in PAGES:
        return f"pages of {page} tokens; allowed: {', '.join(map(str, PAGES))}"
    lanes = -(-width // LANES) * LANES
    if 8 * (lanes - width) > width and page != LANES:  # XLA turns such a pool rather than pad it
        return (
            f"{width} entries a head in pages of {page or 'unknown size'} would be copied every call; allowed: pages of "
            f"{LANES} tokens, or a multiple of {LANES} entries"
        )
    rows = width if _turns(page, width) else page
    if rows is not None and itemsize == 1 and rows % 32 and rows != 16:
        return f"{rows} rows of bytes; allowed: 16 or a multiple of 32"
    if rows is not None and itemsize == 2 and rows % 16:
        return f"{rows} rows of 16 bits; allowed: a multiple of 16"
    return None


def _turns(page: int | None, width: int) -> bool:
    return page == LANES and width % LANES != 0


def check(op: str, q, k_pool, v_pool, positions, table, lengths, sink_logits, logit_scale, value_dim, want_scores):
    """Raises LoweringError for what the kernel cannot take. q [..., N, H]."""

    def refuse(argument, got, allowed):
        raise LoweringError(f"{op} (mosaic_tpu): {argument} is {got}; allowed: {allowed}")

    if want_scores:
        refuse("want_scores", want_scores, "False; scores come from the xla row")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        refuse("q's dtype", q.dtype, "float32, bfloat16")
    n, h = q.shape[-2:]
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool is None and name == "v_pool":
            continue
        packed = is_qtensor(pool)
        if packed and pool.axis != -1:
            refuse(name, f"packed along axis {pool.axis}", "-1")
        if packed and (reason := format_reason(pool.format)):
            refuse(name, pool.format, reason)
        data = pool.data if packed else pool
        if data.ndim != 4:
            refuse(name, list(data.shape), "[pages, K, P, H]")
        if not packed and data.dtype not in (jnp.float32, jnp.bfloat16):
            refuse(f"{name}'s dtype", data.dtype, "float32, bfloat16, or a QTensor")
        if reason := page_reason(data.shape[2], data.shape[3], data.dtype.itemsize):
            refuse(name, f"{data.dtype}{list(data.shape)}", reason)
    pages, kv_heads, page, width = k_pool.shape
    if width != h or n % kv_heads:
        refuse("q", list(q.shape), f"[..., a multiple of {kv_heads}, {width}] for k_pool {list(k_pool.shape)}")
    if v_pool is None and (value_dim is None or not 0 < value_dim <= width):
        refuse("value_dim", value_dim, f"1 to {width} where v_pool is None")
    if v_pool is None and is_qtensor(k_pool) and value_dim % (parts := parts_of(k_pool.format)):
        refuse("value_dim", value_dim, f"a multiple of {parts} packed latents")
    if v_pool is not None and v_pool.shape[:3] != (pages, kv_heads, page):
        refuse("v_pool", list(v_pool.shape), f"[{pages}, {kv_heads}, {page}, Hv] as k_pool")
    if v_pool is not None and value_dim not in (None, v_pool.shape[-1]):
        refuse("value_dim", value_dim, f"None or {v_pool.shape[-1]}, the width of v_pool")
    if positions.shape != (pages, page):
        refuse("positions", list(positions.shape), f"[{pages}, {page}]")
    if table.ndim != 3 or table.shape[0] not in (1, kv_heads) or lengths.shape != table.shape[:2]:
        refuse("table, lengths", f"{list(table.shape)}, {list(lengths.shape)}", f"[1 or {kv_heads}, B, pages], [.., B]")
    if (size := 4 * math.prod(table.shape)) > SMEM:
        refuse("table", f"{list(table.shape)}, {size} bytes", f"{SMEM} bytes of scalar memory")
    if sink_logits is not None and sink_logits.shape != (n,):
        refuse("sink_logits", list(sink_logits.shape), f"[{n}]")
    # A pool has a page more than what is read: the scale of that page may be missing.
    if logit_scale is not None and (logit_scale.ndim != 3 or logit_scale.shape[1:] != (kv_heads, page)):
        refuse("logit_scale", list(logit_scale.shape), f"[pages, {kv_heads}, {page}]")


def plan_of(q, k_pool, v_pool, table, *, queries, mask, scale, softcap, value_dim, tiles_, interpret) -> Plan:
    """The static side of a call whose rows have at most `queries` tokens."""
    groups, _, pages = table.shape
    n, h = q.shape[-2:]
    kv_heads, page = k_pool.shape[1:3]
    cut = tiles_ or tiles(
        queries=queries,
        group=n // kv_heads,
        heads=kv_heads // groups,
        page=page,
        page_bytes=sum(leaf_bytes(x) // x.shape[0] for x in jax.tree.leaves((k_pool, v_pool))) // groups,
        pages=pages,
    )
    return Plan(
        mask=mask,
        scale=float(1 / math.sqrt(h) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        value_dim=value_dim if v_pool is None else v_pool.shape[-1],
        tiles=cut,
        interpret=interpret,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """Blocks of queries: cache row, the slots [low, high) that bound what its queries see (low: the slot of the first
    query), how many queries it has, and their positions (-1: none)."""

    rows: jax.Array  # int32[I]
    low: jax.Array  # int32[G, I]
    high: jax.Array  # int32[G, I]
    counts: jax.Array  # int32[I]
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
LINE, LENGTH, FIRST, COUNT, SINKS, NEXT, BEFORE, QUERIES = range(8)


def schedule(items: Items, lengths, mask: Mask, slots: int) -> jax.Array:
    """int32[8, G * I]: line of the table, its length, first block in reach, number of blocks, how many of them are sinks
    before `first`, next step that has blocks (or -1), blocks of all steps before, queries."""
    groups, b = lengths.shape
    line = jnp.arange(groups, dtype=jnp.int32)[:, None] * b + items.rows
    last = -(-items.high // slots)
    first = sinks = jnp.zeros_like(items.low)
    if mask.window is not None:
        first = jnp.minimum(jnp.maximum(items.low - mask.span + 1, 0) // slots if mask.span else last, last)
        sinks = jnp.minimum(-(-mask.sinks // slots), first)
    count = jnp.where(items.counts > 0, jnp.maximum(sinks + last - first, 0), 0).ravel()
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
            jnp.broadcast_to(items.counts, line.shape).ravel(),
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
    group: int  # query heads a kv head
    streams: tuple[str, ...]  # names of the pools that are copied, in order
    k_parts: int  # 2 for int4: even and odd numbers of a head; 4 for int2
    v_parts: int
    k_turned: bool
    v_turned: bool
    k_format: Format | None
    v_format: Format | None
    value: int  # entries of a value part
    scale: float
    softcap: float | None
    sink: bool
    mask: Mask

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(name for name in self.streams if name in FACTORS)


def run(q, pools: Pools, items: Items, sink_logits, logit_scale, plan: Plan):
    """q [I, Q, N, H] against the pages of its items' rows -> (out [I, Q, N, Hv], lse float32[I, Q, N])."""
    count, queries, n, h = q.shape
    groups, b, pages = pools.table.shape
    kv_heads, page = pools.k.shape[1:3]
    heads, group = kv_heads // groups, n // kv_heads
    block = plan.tiles.pages
    slots, blocks = block * page, -(-pages // block)
    streams = _streams(pools, logit_scale)
    values = pools.k if pools.v is None else pools.v
    k_parts, v_parts = _parts(pools.k), _parts(values)
    spec = Spec(
        groups=groups,
        items=count,
        pages=pages,
        block=block,
        page=page,
        group=group,
        streams=tuple(streams),
        k_parts=k_parts,
        v_parts=v_parts,
        k_turned=_turned(pools.k),
        v_turned=_turned(values),
        k_format=_format(pools.k),
        v_format=_format(values),
        value=plan.value_dim // v_parts,
        scale=plan.scale,
        softcap=plan.softcap,
        sink=sink_logits is not None,
        mask=plan.mask,
    )
    at = jnp.take(pools.positions, pools.table, axis=0, mode="clip").reshape(groups * b, pages * page)
    at = jnp.where(jnp.arange(pages * page) < pools.lengths.reshape(-1, 1), at, -1)
    at = jnp.pad(at, ((0, 0), (0, blocks * slots - pages * page)), constant_values=-1).reshape(-1, blocks, slots)

    used = queries * group
    rows = -(-used // 16) * 16  # a tile of bf16 packs 16 rows
    arranged = q.reshape(count, queries, kv_heads, group, h // k_parts, k_parts)
    arranged = arranged.transpose(0, 2, 5, 1, 3, 4).reshape(count, kv_heads, k_parts, used, h // k_parts)
    arranged = jnp.pad(arranged, ((0, 0), (0, 0), (0, 0), (0, rows - used), (0, 0)))
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
        return pltpu.VMEM((2, block, own, *x.shape[2:]), x.dtype)

    scratch = [
        *(buffer(name, x) for name, x in streams.items()),
        *(pltpu.VMEM((heads, slots), jnp.float32) for _ in spec.factors),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, v_parts, rows, spec.value), jnp.float32),
        pltpu.SemaphoreType.DMA((len(streams), 2)),
    ]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, spec=spec),
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM, disable_bounds_checks=True
        ),
        interpret=plan.interpret,
        name="paged_attention",
    )(schedule(items, pools.lengths, plan.mask, slots).ravel(), pools.table.astype(jnp.int32).ravel(), *operands)
    out = out[:, :, :, :used].reshape(count, kv_heads, v_parts, queries, group, spec.value)
    out = out.transpose(0, 3, 1, 4, 5, 2).reshape(count, queries, n, plan.value_dim)
    lse = lse[:, :, :used, 0].reshape(count, kv_heads, queries, group)
    return out, lse.transpose(0, 2, 1, 3).reshape(count, queries, n)


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
                found[f"{name}_{part}"] = float16_bits(factor[..., 0])
    if logit_scale is not None:
        found["logit_scale"] = float16_bits(logit_scale)
    return found


def _parts(pool: Tensor) -> int:
    return parts_of(pool.format) if is_qtensor(pool) else 1


def _format(pool: Tensor) -> Format | None:
    return pool.format if is_qtensor(pool) else None


def _turned(pool: Tensor) -> bool:
    """Whether XLA lays the pool out with tokens minor: entries that would pad 128 lanes beside tokens that do not."""
    return _turns(*(pool.data if is_qtensor(pool) else pool).shape[2:])


def _kernel(plan, table, q_ref, asked_ref, at_ref, *refs, spec: Spec):
    refs = list(refs)
    sink_ref = refs.pop(0) if spec.sink else None
    sources = dict(zip(spec.streams, refs))
    out_ref, lse_ref = refs[len(spec.streams) : len(spec.streams) + 2]
    refs = refs[len(spec.streams) + 2 :]
    buffers = dict(zip(spec.streams, refs))
    refs = refs[len(spec.streams) :]
    lines = dict(zip(spec.factors, refs))
    top_ref, total_ref, sum_ref, sems = refs[len(spec.factors) :]
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

    def empty(h, _):
        top = sink_ref[h] if spec.sink else jnp.full((rows, 1), -jnp.inf, jnp.float32)
        top_ref[h] = jnp.broadcast_to(top, (rows, LANES))
        total_ref[h] = jnp.full((rows, LANES), 1.0 if spec.sink else 0.0, jnp.float32)
        sum_ref[h] = jnp.zeros(sum_ref.shape[1:], jnp.float32)
        return 0

    jax.lax.fori_loop(0, heads, empty, 0)

    def compute(slot, block, rows):
        """The first `rows` rows of queries against the block that lies in `slot`."""
        at, asked = at_ref[0, pl.ds(block, 1)], asked_ref[0, :rows]
        seen = spec.mask(asked, at) & (at >= 0) & (asked >= 0)

        def head(h):
            row = {name: line[pl.ds(h, 1)] for name, line in lines.items()}
            _head(h, slot, rows, seen, row, q_ref, buffers, top_ref, total_ref, sum_ref, spec)

        if heads <= 8 and rows <= UNROLL:
            for h in range(heads):
                head(h)
        else:
            jax.lax.fori_loop(0, heads, lambda h, _: (head(h), 0)[1], 0)

    narrow = -(-spec.group // 16) * 16  # rows that hold a single query

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
        if narrow >= rows:
            compute(slot, block, rows)
        else:
            few = look(QUERIES, step) <= narrow // spec.group
            pl.when(few)(lambda: compute(slot, block, narrow))
            pl.when(jnp.logical_not(few))(lambda: compute(slot, block, rows))
        return 0

    jax.lax.fori_loop(0, count, body, 0)

    def finish(h, _):
        top, total = top_ref[h][:, :1], total_ref[h][:, :1]
        lse_ref[0, h] = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
        for part in range(spec.v_parts):
            out_ref[0, h, part] = (sum_ref[h, part] / jnp.where(total > 0, total, 1)).astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, heads, finish, 0)


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

    jax.lax.fori_loop(jnp.maximum(stored, 0) // spec.page * heads, spec.block * heads, one, 0)


def _factor(x, group, spec: Spec):
    """Factors of one page [K, P] in any dtype -> float32[heads, P]."""
    x = number(x)
    if spec.groups > 1:
        mine = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == group
        x = jnp.sum(jnp.where(mine, x, 0), axis=0, keepdims=True)
    return x


def _load(buffer, slot, h, *, format_, turned, size, dtype):
    """One head of a block as matmul operands, an array [slots, H / parts] a part, or [H / parts, slots] turned; codes keep
    their zero points."""
    if turned:
        x = jnp.concatenate([buffer[slot, p, h, :size] for p in range(buffer.shape[1])], axis=-1)
    else:
        x = buffer[slot, :, h]
        if x.dtype.itemsize == 1 and x.shape[1] % 32:  # half a tile of bytes: pages are joined as 32 bits
            x = x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.float32)
        x = x.reshape(-1, x.shape[-1])[:, :size]
    if format_ is None:
        return [x.astype(dtype)]
    return codes(x, format_, dtype)


def _zero(name: str, factors, format_: Format | None):
    """What the codes of the tokens are too large by, or None."""
    offset, zero = offset_of(format_), factors.get(f"{name}_zero")
    if zero is not None:
        return zero + offset
    return offset or None


def _dot(a, b, contract: int):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _head(h, slot, rows, seen, factors, q_ref, buffers, top_ref, total_ref, sum_ref, spec: Spec):
    """One step of the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) for one kv head."""
    dtype = q_ref.dtype
    width = q_ref.shape[-1]
    keys = _load(buffers["k"], slot, h, format_=spec.k_format, turned=spec.k_turned, size=width, dtype=dtype)
    q = [q_ref[0, h, part, :rows] for part in range(spec.k_parts)]
    logits = sum(_dot(a, b, 0 if spec.k_turned else 1) for a, b in zip(q, keys))
    if (zero := _zero("k", factors, spec.k_format)) is not None:
        total = sum(jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True) for x in q)
        logits = logits - total * zero
    factor = factors["k_scale"] * spec.scale if "k_scale" in factors else spec.scale
    logits = logits * (factor * factors["logit_scale"] if "logit_scale" in factors else factor)
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    logits = jnp.where(seen, logits, -jnp.inf)

    before = top_ref[h, :rows]
    top = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - base[:, :1])
    decay = jnp.exp(before - base)
    top_ref[h, :rows] = top
    total_ref[h, :rows] = decay * total_ref[h, :rows] + jnp.sum(weights, axis=-1, keepdims=True)

    v_factor = "v" if "v" in buffers else "k"
    shift = None
    if f"{v_factor}_scale" in factors:
        weights = jnp.where(seen, weights * factors[f"{v_factor}_scale"], 0)
        if (zero := _zero(v_factor, factors, spec.v_format)) is not None:
            weights = weights.astype(dtype).astype(jnp.float32)  # as they are multiplied
            shift = jnp.sum(weights * zero, axis=-1, keepdims=True)
    if v_factor == "k":
        values = [x[: spec.value] if spec.k_turned else x[:, : spec.value] for x in keys]
    else:
        kwargs = {"format_": spec.v_format, "turned": spec.v_turned}
        values = _load(buffers["v"], slot, h, size=spec.value, dtype=dtype, **kwargs)
    weights = weights.astype(dtype)
    for part, value in enumerate(values):
        added = _dot(weights, value, 1 if spec.v_turned else 0)
        sum_ref[h, part, :rows] = decay[:, :1] * sum_ref[h, part, :rows] + (added if shift is None else added - shift)
