"""`ragged_paged_attention` on Hopper: prefill chunks and decodes in one launch over paged keys and values.

The work is a list of units: a decode row with one kv head, or a tile of a chunk's tokens with one kv head (its query
heads beside each other, 2 x 64 rows). The list, decodes first, is cut by cost into one equal part for each SM
("stream-K"), so that some SMs stream pages for decodes while the others multiply for chunks. Two warpgroups compute; in
a chunk they hold 64 query rows each and take turns on the tensor cores, in a decode they halve the cached tokens. A
third one copies pages through the page table by TMA, and widens packed ones to 16 bits. Where a cut falls inside a unit,
and for decodes, partial results (weighted values, maximum, sum) leave the kernel; a second one merges them in a fixed
order. Tiles of long contexts, where no row decodes, are first handed out whole, one to each SM at a time ("waves"): SMs then
read the pages of few heads at once, which the L2 cache holds. In a chunk the softmax of a step runs beside the product with
values of the step before, unless pages are packed or masks ask for positions. Scales and zero points of packed pages act on
logits and weights: q.(k - z)s = s(q.k - z sum(q)).

Sources: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), Stream-K (Osama et al. 2023, arXiv:2301.03598), Sarathi
(Agrawal et al. 2023, arXiv:2308.16369) for decodes beside chunks.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir

from optx.cache import Ragged
from optx.errors import LoweringError
from optx.formats.codebook import centroids
from optx.pallas.attention import words_sm90 as w
from optx.pallas.attention.page_formats import Pages, pages_of, streams_of, unpacked
from optx.pallas.attention.reference import Mask
from optx.pallas.attention.words_sm90 import Codes
from optx.pallas.late import arith, by_row, by_token, dependent, plgpu, utils
from optx.tensor import is_qtensor

OP = "ragged_paged_attention"
ROWS = 64  # query rows of a warpgroup: the M of wgmma
COMPUTE = 2  # warpgroups that compute
KEPT = 16  # rows of a decode that leave the kernel, and of a step of the merge
SMS = 132
SHARED = 232448 - 2560  # bytes of shared memory a block may have, less barriers and alignment
LOG2E = math.log2(math.e)
LOWEST = -1e30  # below any logit, and finite: exp2(LOWEST - LOWEST) is 1, not NaN
FULL = Mask()
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
GROUPS = 16  # query heads a kv head
SPANS = (32, 64)  # tokens that share scales of channels
UNIT = 32  # numbers of a token that a thread makes of codes at a time
SUMS = 8  # columns of a row's running sum: the narrowest array in the layout of wgmma
BOX = 256  # numbers a copy takes
# Columns of the table of units.
FACTS = 13
TOKEN, NUMBER, NEWEST, LENGTH, LISTED, HEAD, SKIP, STEPS, FROM, UPTO, ITEM, ROW, DECODE = range(FACTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What a step of `block_kv` tokens takes one SM, in units of 1/16 us at a head dim of 128 and blocks of 128.

    decode: alone on the memory's bandwidth; chunk: bound by the tensor cores; share: a decode's when all SMs read.
    Estimates (55 GB/s an SM, 600 TFLOP/s and 2.9 TB/s a chip), to be replaced by measured ones: they only balance SMs.
    """

    decode: int = 19
    chunk: int = 30
    share: int = 47
    unit: int = 30  # to begin and end a unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    block_kv: int = 128  # cached tokens a step
    stages: int = 2  # steps of 16-bit keys and values in shared memory
    raw: int = 0  # packed pages: steps of codes in flight
    columns: int = 32  # of a decode's partial result that pass through shared memory at once
    registers: tuple[int, int] = (232, 40)  # a thread of the warpgroups that compute, and of the one that copies
    turns: bool = True  # the two compute warpgroups alternate between tensor cores and softmax
    sms: int = SMS
    waves: bool = True
    costs: Costs = Costs()
    whole: bool = False  # no unit is cut: its sums are taken in one order, whatever else is in the batch
    interpretable: bool = False  # weights reach the second product through shared memory: what the interpreter can run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernels are specialised on; hashable, a static argument."""

    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    page: int
    pool_pages: int
    width: int  # pages a row in the table
    lists: int  # 1, or kv_heads where heads keep different pages
    k: Pages
    v: Pages
    dtype: str  # of queries, output and dense pools
    mask: Mask
    scale: float
    softcap: float | None
    sinks: bool  # sink logits
    logit_scale: bool
    tiles: Tiles

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def per_wg(self) -> int:
        """Tokens of a chunk in the 64 rows of a warpgroup."""
        return ROWS // self.group

    @property
    def tile(self) -> int:
        """Tokens of a chunk in a unit."""
        return COMPUTE * self.per_wg

    @property
    def decodes(self) -> int:
        """Bound on decode rows."""
        return min(self.batch, self.tokens)

    @property
    def chunks(self) -> int:
        """Bound on tiles of chunks."""
        return max(1, self.tokens // self.tile + min(self.batch, self.tokens // 2))

    @property
    def units(self) -> int:
        return self.kv_heads * (self.decodes + self.chunks)

    @property
    def format(self) -> str:
        """Codes of keys and of values."""
        return self.k.code

    @property
    def packed(self) -> bool:
        return self.format != "dense"

    @property
    def overlaps(self) -> bool:
        """Whether the softmax of a chunk's step runs beside the product with values of the step before."""
        return not self.packed and not self.placed and not self.tiles.interpretable

    @property
    def made(self) -> bool:
        """Whether threads make numbers of the codes word by word, in their order, with what scales are not a token's."""
        return self.format in ("int3", "int2", "codebook4") or not (self.k.by_token and self.v.by_token)

    @property
    def split(self) -> bool:
        """Whether even numbers of a head become the first half of a row, odd ones the second."""
        return self.format == "int4" and not self.made

    @property
    def shift(self) -> float:
        """Code that is multiplied as 0 where it is not known which one stands for it."""
        return float(2 ** (self.k.bits - 1))

    @property
    def k_scaled(self) -> bool:
        """Whether scales act on logits."""
        return self.packed and self.k.by_token and self.k.scaled

    @property
    def k_zero(self) -> bool:
        """Whether zero points act on logits."""
        return self.k.by_token and self.k.zero is not None

    @property
    def v_zero(self) -> bool:
        """Whether zero points act on weights."""
        return self.v.by_token and self.v.zero is not None

    @property
    def stored(self) -> int:
        """Entries of a stored token along its last axis."""
        return self.head_dim * self.k.bits // 8 if self.packed else self.head_dim

    @property
    def windowed(self) -> bool:
        return self.mask.window is not None

    @property
    def placed(self) -> bool:
        """Whether the mask asks for the positions of cached tokens."""
        return self.windowed or self.mask.apart

    @property
    def borders(self) -> tuple[Any, ...]:
        """Functions of a query's position that bound the positions it sees: from where, and to where."""
        return (self.mask.oldest,) * self.windowed + (self.mask.end,) * (self.mask.lag is not None)

    @property
    def piece(self) -> int:
        """Cached tokens of a step that one warpgroup takes in a decode: half of them, or all of every other step."""
        return max(ROWS, self.tiles.block_kv // 2)

    @property
    def box(self) -> int:
        """Cached tokens a copy."""
        return min(self.page, self.piece)

    @property
    def boxes(self) -> int:
        return self.tiles.block_kv // self.box

    @property
    def names(self) -> tuple[str, ...]:
        """What belongs to cached tokens, in the order of their copies."""
        found = [f"{x}_scale" for x in "kv" if self.packed and getattr(self, x).scaled]
        found += [f"{x}_zero" for x in "kv" if getattr(self, x).zero is not None]
        return (*found, *["logit_scale"] * self.logit_scale, *["at"] * self.placed)

    def numbers(self, name: str) -> int:
        """How many of them a box of tokens has."""
        return getattr(self, name[0]).scales(self.box, self.head_dim) if name[:2] in ("k_", "v_") else self.box

    def itemsize(self, name: str) -> int:
        if name[:2] not in ("k_", "v_"):
            return 4
        return 1 if name.endswith("zero") and getattr(self, name[0]).zero == "code" else 2

    @property
    def shared(self) -> int:
        """Bytes of shared memory, without barriers and what lies between the buffers."""
        t, h = self.tiles, self.head_dim
        rows = COMPUTE * ROWS * (2 * h + 2 * self.stage_width + 4 * t.columns)
        sizes = (max(self.numbers(name) * self.itemsize(name), 128) for name in self.names)
        boxes = (t.stages + t.raw) * self.boxes * sum(sizes)
        return rows + boxes + 2 * t.block_kv * (2 * t.stages * h + t.raw * self.stored)

    @property
    def stage_width(self) -> int:
        """Columns of queries and output that pass through shared memory at once."""
        return min(self.head_dim, 128 if self.head_dim <= 128 else 64)

    @property
    def sink_blocks(self) -> int:
        return -(-self.mask.sinks // self.tiles.block_kv) if self.windowed else 0


def tiles(head_dim: int, format: str = "dense") -> Tiles:
    """The cut of a call, so that shared memory (227 KiB) is filled."""
    if format == "dense":
        return {
            64: Tiles(stages=4),
            128: Tiles(),
            256: Tiles(block_kv=64, columns=16),
        }[head_dim]
    columns = 16 if head_dim > 64 else 32
    stages, raw = {64: (4, 4), 128: (3, 3), 256: (1, 2)}[head_dim]
    return Tiles(block_kv=64, stages=stages, raw=raw, columns=columns, registers=(200, 104))


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why this kernel does not take the call site.

    Reads cache, head_dim, heads, kv_heads; where given page_size, value_dim, want_scores, key_bias.
    """
    if (getattr(target, "platform", None), getattr(target, "arch", None)) != ("gpu", "sm90"):
        return "needs a Hopper GPU (sm90)"
    cache = args["cache"]
    if cache is None or cache.kind != "paged":
        return f"takes paged caches, not {cache.kind if cache is not None else 'none'}"
    streams = streams_of(cache)
    if isinstance(streams, str):
        return streams
    if reason := _layout_reason(*streams.values(), args["head_dim"]):
        return reason
    if cache.dtype not in (("bfloat16", "float16") if not cache.packed else ("bfloat16",)):
        return f"takes bfloat16, and float16 where pages are dense, not {cache.dtype}"
    heads, kv_heads, head_dim = args["heads"], args["kv_heads"], args["head_dim"]
    if args.get("value_dim") not in (None, head_dim):
        return "values must be as wide as keys"
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if heads % kv_heads or heads // kv_heads > GROUPS:
        return f"takes at most {GROUPS} query heads a kv head, got {heads} over {kv_heads}"
    page = args.get("page_size")
    if page is not None and page not in PAGE_SIZES:
        return f"takes pages of {', '.join(map(str, PAGE_SIZES))} tokens, not {page}"
    if args.get("key_bias"):
        return "adds no bias to keys"
    return "does not return scores" if args.get("want_scores") else None


def _layout_reason(k: Pages, v: Pages, head_dim: int) -> str | None:
    """Why pages are not read that lie so, or None."""
    if k.bits * head_dim < 32 * 8:
        return f"{k.code} of {head_dim} numbers a head; takes at least 32 bytes a token and head"
    if k.code in ("int8", "int4") and k.by_token and v.by_token and k.zero != v.zero:
        return "zero points of keys or values alone; takes both or none"
    if k.scaled != v.scaled:
        return "scales of keys or values alone; takes both or none"
    if v.span is not None:
        return "scales by channel of values; takes those of keys"
    if k.span is not None and k.span not in SPANS:
        return f"scales shared by {k.span} tokens; takes {', '.join(map(str, SPANS))}"
    for pages in (k, v):
        if pages.group is not None and pages.group % UNIT:
            return f"groups of {pages.group} numbers; takes multiples of {UNIT}"
        if not pages.by_token and pages.scales(ROWS, head_dim) > BOX:
            return f"{pages.scales(ROWS, head_dim)} scales of {ROWS} tokens; takes at most {BOX}"
    return None


def ragged_paged_attention(
    q,
    k_pool,
    v_pool,
    *,
    ragged: Ragged,
    positions,
    table,
    lengths,
    mask: Mask = FULL,
    scale=None,
    softcap=None,
    sink_logits=None,
    logit_scale=None,
    value_dim=None,
    want_scores=False,
    tiles: Tiles | None = None,
):
    """Attention of T ragged tokens over their rows' cached pages, causal inside a chunk.

    q [T, N, H]; pools [pages + 1, K, P, H] in q's dtype, or QTensor (page_formats.py; q in bfloat16); positions
    int32[pages + 1, P]; table int32[G, B, pages]; lengths int32[G, B]; sink_logits [N]; logit_scale [pages, K, P]. A
    row's tokens are its newest slots. H is 64, 128 or 256, P 16, 32, 64 or 128, at most 16 query heads a kv head.
    -> (out [T, N, H], lse float32[T, N], None); what padding tokens get is unspecified.
    Raises: LoweringError for arguments outside this, naming the argument.
    """
    _check(q, k_pool, v_pool, ragged, table, lengths, sink_logits, logit_scale, value_dim, want_scores)
    plan = _plan(q, k_pool, v_pool, ragged, table, mask, scale, softcap, sink_logits, logit_scale, tiles)
    return (*_run(plan, q, k_pool, v_pool, ragged, positions, table, lengths, sink_logits, logit_scale), None)


def _check(q, k_pool, v_pool, ragged, table, lengths, sink_logits, logit_scale, value_dim, want_scores):
    def refuse(argument, got, allowed):
        raise LoweringError(f"{OP} (mosaic_gpu/sm90): {argument} {got}; allowed: {allowed}")

    if q.ndim != 3 or q.dtype not in (jnp.bfloat16, jnp.float16):
        refuse("q", f"{q.dtype}{list(q.shape)}", "bfloat16 or float16 [T, N, H]")
    if v_pool is None:
        refuse("v_pool", "None (latents)", "a pool of values")
    tokens, heads, head_dim = q.shape
    if k_pool.ndim != 4 or k_pool.shape != v_pool.shape or k_pool.shape[-1] != head_dim:
        refuse("k_pool, v_pool", f"{list(k_pool.shape)}, {list(v_pool.shape)}", f"two of [pages + 1, K, P, {head_dim}]")
    formats = [x.format if is_qtensor(x) else None for x in (k_pool, v_pool)]
    k, v = (pages_of(x) for x in formats)
    if k is None or v is None or k.code != v.code:
        refuse("k_pool, v_pool", f"of {formats[0]} and {formats[1]}", "what `supports` takes, codes alike for both")
    if reason := _layout_reason(k, v, head_dim):
        refuse("k_pool, v_pool", f"of {formats[0]} and {formats[1]}", reason)
    if k.span is not None and k_pool.shape[2] % k.span:
        refuse("k_pool", f"of page size {k_pool.shape[2]}", f"a multiple of the {k.span} tokens that share scales")
    if is_qtensor(k_pool):
        if q.dtype != jnp.bfloat16:
            refuse("q", q.dtype, "bfloat16 over packed pages")
    elif k_pool.dtype != q.dtype or v_pool.dtype != q.dtype:
        refuse("k_pool, v_pool", f"{k_pool.dtype}, {v_pool.dtype}", f"q's dtype {q.dtype}")
    kv_heads, page = k_pool.shape[1:3]
    if head_dim not in HEAD_DIMS:
        refuse("q", f"of head dim {head_dim}", ", ".join(map(str, HEAD_DIMS)))
    if page not in PAGE_SIZES:
        refuse("k_pool", f"of page size {page}", ", ".join(map(str, PAGE_SIZES)))
    if heads % kv_heads or heads // kv_heads > GROUPS:
        refuse("q", f"of {heads} heads over {kv_heads} kv heads", f"a multiple, at most {GROUPS} times as many")
    if ragged.rows.shape != (tokens,):
        refuse("ragged", f"of {ragged.rows.shape[0]} tokens", f"q's {tokens}")
    if table.ndim != 3 or table.shape[0] not in (1, kv_heads) or table.shape[1] != ragged.batch:
        refuse("table", f"{list(table.shape)}", f"[1 or {kv_heads}, {ragged.batch}, pages]")
    if lengths.shape != table.shape[:2]:
        refuse("lengths", f"{list(lengths.shape)}", f"{list(table.shape[:2])}")
    if sink_logits is not None and sink_logits.shape != (heads,):
        refuse("sink_logits", f"{list(sink_logits.shape)}", f"[{heads}]")
    if logit_scale is not None and logit_scale.shape[1:] != (kv_heads, page):
        refuse("logit_scale", f"{list(logit_scale.shape)}", f"[pages, {kv_heads}, {page}]")
    if value_dim not in (None, head_dim):
        refuse("value_dim", value_dim, f"None or {head_dim}")
    if want_scores:
        refuse("want_scores", True, "False: a sum over all queries of a row needs a second pass that is not written")


def _plan(q, k_pool, v_pool, ragged, table, mask, scale, softcap, sink_logits, logit_scale, chosen) -> Plan:
    tokens, heads, head_dim = q.shape
    k, v = (pages_of(x.format if is_qtensor(x) else None) for x in (k_pool, v_pool))
    plan = Plan(
        tokens=tokens,
        batch=ragged.batch,
        heads=heads,
        kv_heads=k_pool.shape[1],
        head_dim=head_dim,
        page=k_pool.shape[2],
        pool_pages=k_pool.shape[0],
        width=table.shape[2],
        lists=table.shape[0],
        k=k,
        v=v,
        dtype=str(q.dtype),
        mask=mask,
        scale=float(1 / math.sqrt(head_dim) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        sinks=sink_logits is not None,
        logit_scale=logit_scale is not None,
        tiles=chosen or tiles(head_dim, k.code),
    )
    while plan.shared > SHARED and plan.tiles.raw > 1:  # scalars of small pages take room: one step less in flight
        plan = dataclasses.replace(plan, tiles=dataclasses.replace(plan.tiles, raw=plan.tiles.raw - 1))
    return plan


# --- The list of units, and how it is cut ----------------------------------------------------------------------------


def _schedule(plan: Plan, ragged: Ragged, lengths):
    """-> units int32[units, 13] (columns above), cuts int32[sms + 1, 6] (unit, step in it, steps before; of waves their first
    unit, how many, this SM's steps in them), and where the row of each token and head lies among those of all units: int32[T, N].
    """
    block, tile, heads, mask = plan.tiles.block_kv, plan.tile, plan.kv_heads, plan.mask
    counts = ragged.counts.astype(jnp.int32)
    is_decode = counts == 1
    tiles_of = jnp.where(counts > 1, -(-counts // tile), 0)
    decodes, chunks = _sums(jnp.stack([is_decode.astype(jnp.int32), tiles_of]))
    n_decodes, n_chunks = decodes[-1], chunks[-1]
    last_row = plan.batch - 1

    def row_of(ends, size):
        at = jnp.arange(size, dtype=jnp.int32)
        return jnp.minimum(jnp.sum(ends[None, :] <= at[:, None], axis=1, dtype=jnp.int32), last_row)

    rows = jnp.concatenate([row_of(decodes, plan.decodes), row_of(chunks, plan.chunks)])

    index = jnp.arange(plan.units, dtype=jnp.int32)
    decode = index < heads * n_decodes
    inside = jnp.where(decode, index, index - heads * n_decodes)
    per = jnp.maximum(jnp.where(decode, n_decodes, n_chunks), 1)
    head, item = inside // per, inside % per
    real = index < heads * (n_decodes + n_chunks)
    head = jnp.minimum(head, heads - 1)
    row = rows[jnp.where(decode, item, plan.decodes + jnp.minimum(item, plan.chunks - 1))]
    first = jnp.where(decode, 0, (item - (chunks - tiles_of)[row]) * tile)
    number = jnp.clip(counts[row] - first, 0, tile)
    length = lengths[head if plan.lists > 1 else 0, row]
    newest = length - counts[row] + first
    stop = jnp.maximum(jnp.minimum(newest + number, length) if mask.causal else length, 1)
    stop = (stop + block - 1) // block
    skip = jnp.zeros_like(stop)
    if plan.windowed and mask.span == 0:
        stop = jnp.minimum(stop, plan.sink_blocks)
    elif plan.windowed:
        skip = jnp.maximum(jnp.maximum(newest - mask.span + 1, 0) // block - plan.sink_blocks, 0)
    steps = jnp.where(real, jnp.maximum(stop - skip, 1), 0)

    cost, unit_cost = _costs(plan, decode, steps)
    count = heads * (n_decodes + n_chunks)
    longest, shortest = jnp.max(steps), jnp.min(jnp.where(real, steps, jnp.max(steps)))
    alike = (n_decodes == 0) & (4 * shortest >= 3 * longest)
    cut = count - jnp.where(
        alike & plan.tiles.waves, count // plan.tiles.sms * plan.tiles.sms, 0
    )  # units that may be cut
    left = jnp.where(index < cut, steps, 0)
    each = jnp.where(real & (index < cut), steps * cost + unit_cost, 0)
    ends, steps_until = _sums(jnp.stack([each, left]))
    cuts = _cuts(plan, cut, ends, ends - each, cost, unit_cost, left, steps_until - left)
    cuts = jnp.concatenate([cuts, _waves(plan, cut, count, steps)], axis=1)
    # The first and the last part that a unit lies in.
    at, step = cuts[1:-1, 0], cuts[1:-1, 1]
    before = (at[None, :] < index[:, None]) | ((at[None, :] == index[:, None]) & (step[None, :] == 0))
    begun = jnp.sum(before, axis=1, dtype=jnp.int32)
    ended = jnp.sum(at[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    listed = (head * plan.batch if plan.lists > 1 else 0) + row
    row_at = jnp.where(decode, index * KEPT, KEPT * heads * plan.decodes + inside * COMPUTE * ROWS)
    columns = [ragged.starts[row] + first, number, newest, length, listed, head, skip, steps, begun, ended, item]
    columns += [row_at, decode]
    units = jnp.stack([x.astype(jnp.int32) for x in columns], axis=1)

    token_row = jnp.clip(ragged.rows, 0, last_row)
    offset = jnp.clip(jnp.arange(plan.tokens, dtype=jnp.int32) - ragged.starts[token_row], 0, plan.tokens)
    mine = jnp.arange(heads, dtype=jnp.int32)[None, :]
    as_decode = KEPT * (mine * n_decodes + (decodes[token_row] - 1)[:, None])
    as_chunk = mine * n_chunks + (chunks[token_row] - tiles_of[token_row] + offset // tile)[:, None]
    as_chunk = as_chunk * (COMPUTE * ROWS) + _row(plan, offset % tile)[:, None]
    where = jnp.where(is_decode[token_row][:, None], as_decode, KEPT * heads * plan.decodes + as_chunk)
    where = (where[:, :, None] + jnp.arange(plan.group, dtype=jnp.int32)).reshape(plan.tokens, plan.heads)
    return units, cuts, where


def _sums(x):
    """Running sums along the last axis. A masked sum is one kernel, XLA's `cumsum` four."""
    size = x.shape[-1]
    if size > 2048:
        return jnp.cumsum(x, axis=-1, dtype=jnp.int32)
    return jnp.sum(jnp.where(jnp.tri(size, dtype=bool), x[..., None, :], 0), axis=-1, dtype=jnp.int32)


def _row(plan: Plan, token):
    """Row of a unit in which a token's first query head lies."""
    return token // plan.per_wg * ROWS + token % plan.per_wg * plan.group


def _costs(plan: Plan, decode, steps):
    """Cost of a step by unit, and of a unit. Decodes that would want more than the memory gives cost what they get."""
    costs, work = plan.tiles.costs, plan.tiles.block_kv * plan.head_dim / (128 * 128)
    chunk = max(1, round(costs.chunk * work))
    most = plan.units * (-(-plan.width * plan.page // plan.tiles.block_kv) + 1)
    shrink = max(1, -(-most * max(chunk, round(costs.share * work), 1) // 2**30))  # the sum must fit int32
    narrow = 1 if not plan.packed else 0.75
    alone, share = max(1, round(costs.decode * work * narrow) // shrink), round(costs.share * work) // shrink
    chunk = max(1, chunk // shrink)
    of_decodes, of_chunks = jnp.sum(jnp.where(decode, steps, 0)), jnp.sum(jnp.where(decode, 0, steps))
    ratio = of_chunks.astype(jnp.float32) / jnp.maximum(of_decodes, 1).astype(jnp.float32)
    ours = jnp.maximum(alone, share - jnp.minimum(chunk * ratio, share)).astype(jnp.int32)
    return jnp.where(decode, ours, chunk), max(1, round(costs.unit * work) // shrink)


def _cuts(plan: Plan, count, ends, starts, cost, unit_cost, steps, steps_before):
    """Where each part begins: unit, step in it, steps before it. A step belongs to the part in which its cost begins."""
    sms = plan.tiles.sms
    share, rest = jnp.divmod(ends[-1], sms)
    part = jnp.arange(sms + 1, dtype=jnp.int32)
    begin = part * share + jnp.minimum(part, rest)
    unit = jnp.minimum(jnp.sum(ends[None, :] <= begin[:, None], axis=1, dtype=jnp.int32), count)
    at = jnp.minimum(unit, plan.units - 1)
    into = begin - starts[at]
    step = jnp.where(into > 0, jnp.maximum(-(-(into - unit_cost) // cost[at]), 1), 0)
    past = (unit < count) & ((step > 0) if plan.tiles.whole else (step >= steps[at]))
    unit, step = jnp.where(past, unit + 1, unit), jnp.where(past | (unit >= count), 0, step)
    total = steps_before[-1] + steps[-1]
    before = jnp.where(unit < count, steps_before[jnp.minimum(unit, plan.units - 1)] + step, total)
    return jnp.stack([unit, step, before], axis=1).astype(jnp.int32)


def _waves(plan: Plan, cut, count, steps):
    """Of the units from `cut` to `count`, whole ones: the first, the waves that they make, and steps by SM: int32[sms + 1, 3]."""
    sms, part = plan.tiles.sms, jnp.arange(plan.tiles.sms + 1, dtype=jnp.int32)[:, None]
    wave = jnp.arange(max(1, plan.units // sms), dtype=jnp.int32)[None, :]
    unit = _in_wave(cut, wave, part, sms)
    mine = jnp.sum(jnp.where((unit < count) & (part < sms), steps[jnp.minimum(unit, plan.units - 1)], 0), axis=1)
    alike = [jnp.full((sms + 1,), x) for x in (cut, (count - cut) // sms)]
    return jnp.stack([*alike, mine], axis=1).astype(jnp.int32)


def _in_wave(first, wave, part, sms: int):
    """The unit of a part in a wave; every other wave turns round, as units of a chunk grow along it."""
    return first + wave * sms + jnp.where(_rem(wave, 2) == 0, part, sms - 1 - part)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, q, k_pool, v_pool, ragged, positions, table, lengths, sink_logits, logit_scale):
    k, g, h = plan.kv_heads, plan.group, plan.head_dim
    lengths = jnp.minimum(lengths, plan.width * plan.page).astype(jnp.int32)
    units, cuts, where = _schedule(plan, ragged, lengths)
    if plan.split:
        q = jnp.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1)
    merge_rows = lambda x: x.reshape(x.shape[0] * k, *x.shape[2:])  # noqa: E731
    per_token = []  # by cached token, in the order in which the kernel reads them
    pools = [k_pool, v_pool]
    if plan.packed:
        small = [x for part in ("scale", "zero") for x in (getattr(k_pool, part), getattr(v_pool, part))]
        per_token += [merge_rows(x.reshape(*x.shape[:2], -1)) for x in small if x is not None]
        pools = [k_pool.data, v_pool.data]
        if plan.format in ("int8", "int4") and not plan.made:
            pools = [lax.bitcast_convert_type(x, jnp.int8) for x in pools]
    pools = [merge_rows(x) for x in pools]
    if plan.logit_scale:
        per_token.append(merge_rows(logit_scale.astype(jnp.float32)))
    extra = []
    sinks = None
    if plan.sinks:
        sinks = sink_logits.astype(jnp.float32).reshape(k, g)[:, jnp.arange(ROWS) % g] * LOG2E
        extra.append(sinks)
    if plan.placed:
        per_token.append(positions)
        extra += _borders(plan, ragged)
    table = table.reshape(-1)
    out, lse, *parts = _attend(plan, q, pools, per_token, units, cuts, table, extra)
    out, lse = _merge(plan, out, lse, parts, units, cuts, sinks)
    if plan.split:
        out = jnp.stack([out[..., : h // 2], out[..., h // 2 :]], axis=-1).reshape(out.shape)
    return out, lse[where]


def _borders(plan: Plan, ragged: Ragged):
    """Each of `plan.borders` by row of each tile of a chunk int32[chunks, 2, 64], then each by token."""
    tiles_of = jnp.where(ragged.counts > 1, -(-ragged.counts // plan.tile), 0)
    ends = jnp.cumsum(tiles_of, dtype=jnp.int32)
    at = jnp.arange(plan.chunks, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= at[:, None], axis=1, dtype=jnp.int32), plan.batch - 1)
    token = ragged.starts[row] + (at - (ends - tiles_of)[row]) * plan.tile
    inside = jnp.arange(COMPUTE)[:, None] * plan.per_wg + jnp.arange(ROWS) // plan.group
    token = jnp.clip(token[:, None, None] + inside, 0, plan.tokens - 1)
    found = [border(ragged.positions.astype(jnp.int32)) for border in plan.borders]
    return [*(x[token] for x in found), *found]


# --- The kernel ------------------------------------------------------------------------------------------------------


def _tiling(width: int, bits: int):
    """SMEM layout of rows of `width` numbers: tiles of 8 rows, swizzled by their bytes; one after the other where no power of 2
    divides into them (two planes of codes)."""
    swizzle = min(128, width * bits // 8)
    if swizzle & (swizzle - 1):
        return ()
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))


def _attend(plan: Plan, q, pools, per_token, units, cuts, table, extra):
    """-> out [T, N, H] and lse [rows of all units] of whole units, then partial results: of decodes values
    float32[parts, 2, 16, H] and (maximum, sum) float32[parts, 2, 2, 64], of chunks [2 sms, 2, 64, H] and the same."""
    t, h, dtype = plan.tiles, plan.head_dim, jnp.dtype(plan.dtype)
    wide, f32 = _tiling(h if plan.made else min(h, plan.stored), 16), jnp.float32
    width = plan.stage_width
    ring = t.stages + t.raw
    copies = plan.boxes * (2 + len(per_token)) if plan.packed else plan.boxes * (1 + len(per_token))
    smem = plgpu.SMEM
    scratch = {
        "stage_s": smem((COMPUTE, ROWS, width), dtype),
        "k_s": smem((t.stages, t.block_kv, h), dtype, transforms=wide),
        "v_s": smem((t.stages, t.block_kv, h), dtype, transforms=wide),
        "part_s": smem((COMPUTE, ROWS, t.columns), f32),
        # A copy's target must be 128-byte aligned: what belongs to a box lies apart.
        "token_s": [
            smem((ring, plan.boxes, max(plan.numbers(name), 128 // x.dtype.itemsize)), x.dtype)
            for name, x in zip(plan.names, per_token, strict=True)
        ],
        "q_full": plgpu.Barrier(num_arrivals=1 if plan.group == 1 else plan.per_wg, num_barriers=COMPUTE),
        "q_one": plgpu.Barrier(num_barriers=COMPUTE),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE),
        "k_full": plgpu.Barrier(num_arrivals=1 if plan.packed else copies, num_barriers=t.stages),
        "v_full": plgpu.Barrier(num_arrivals=1 if plan.packed else plan.boxes, num_barriers=t.stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=t.stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=t.stages),
        "turn": plgpu.Barrier(num_barriers=COMPUTE) if plan.overlaps else plgpu.Barrier(num_arrivals=COMPUTE),
    }
    if plan.packed:
        codes = smem((t.raw, t.block_kv, plan.stored), pools[0].dtype, transforms=_tiling(plan.stored, 8))
        scratch |= {"k_raw": codes, "v_raw": codes, "raw_full": plgpu.Barrier(num_arrivals=copies, num_barriers=t.raw)}
    # Results leave from where a unit's queries lay: those of the next are on their way into `stage_s` by then.
    rows = {"q_s": smem((COMPUTE, ROWS, h), dtype, transforms=wide), "out_s": smem((COMPUTE, ROWS, h), dtype)}
    scratch |= rows if t.interpretable else {"rows_s": plgpu.RefUnion(*rows.values())}
    if t.interpretable:
        scratch["p_s"] = smem((COMPUTE, ROWS, t.block_kv), dtype, transforms=_tiling(t.block_kv, 16))
        scratch["half_s"] = smem((COMPUTE, ROWS, plan.piece), dtype, transforms=_tiling(plan.piece, 16))
    parts = t.sms + plan.kv_heads * plan.decodes
    rows = plan.kv_heads * (KEPT * plan.decodes + COMPUTE * ROWS * plan.chunks)
    kernel = _Kernel(plan, len(per_token), width, ring)
    return dependent(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((rows,), f32),
            jax.ShapeDtypeStruct((parts, COMPUTE, KEPT, h), f32),
            jax.ShapeDtypeStruct((parts, COMPUTE, 2, ROWS), f32),
            jax.ShapeDtypeStruct((2 * t.sms, COMPUTE, ROWS, h), f32),
            jax.ShapeDtypeStruct((2 * t.sms, COMPUTE, 2, ROWS), f32),
        ),
        grid=(t.sms,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        scratch_types=scratch,
        kernel_name=OP,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, *pools, *per_token, units, cuts, table, *extra)


def _wide(x, shape, axis):
    return lax.broadcast_in_dim(x, shape, (axis,))


def _rem(x, y):
    return lax.rem(x, jnp.int32(y))


def _div(x, y):
    return lax.div(x, jnp.int32(y))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The body of the kernel; a fresh object a trace, its fields are Python numbers."""

    plan: Plan
    per_token: int
    width: int
    ring: int

    @property
    def __name__(self):
        return OP

    def __call__(self, q, *refs, rows_s=None, **scratch):
        plan = self.plan
        if rows_s is not None:
            scratch["q_s"], scratch["out_s"] = rows_s
        refs = list(refs)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        pools, per_token = take(2), take(self.per_token)
        units, cuts, table = take(3)
        sinks = take(1)[0] if plan.sinks else None
        row_borders, borders = take(len(plan.borders)), take(len(plan.borders))
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        begin, end = ([cuts[sm + i, j] for j in range(6)] for i in range(2))
        where = _Where(self, units, sm, begin, end)

        @pl.when(wg < COMPUTE)
        def _():
            plgpu.set_max_registers(plan.tiles.registers[0], action="increase")
            _Compute(self, where, wg, sinks, row_borders, borders, refs, scratch).run()

        @pl.when(wg == COMPUTE)
        def _():
            plgpu.set_max_registers(plan.tiles.registers[1], action="decrease")
            _Copy(self, where, q, pools, per_token, table, scratch).run()

    def block(self, step, skip):
        """The block of cached tokens that a step meets: those of the sinks, then those of the window."""
        return jnp.where(step < self.plan.sink_blocks, step, step + skip) if self.plan.windowed else step


@dataclasses.dataclass(frozen=True)
class _Where:
    """The part of one SM: its units in waves, then those from `begin` to `end`, rows of the cuts."""

    kernel: _Kernel
    units: Any
    sm: Any
    begin: list
    end: list

    @property
    def waves(self):
        return self.begin[4]

    @property
    def cut(self):
        """Steps outside waves."""
        return self.end[2] - self.begin[2]

    @property
    def steps(self):
        return self.begin[5] + self.cut

    @property
    def count(self):
        """Units."""
        some = (self.end[1] > 0).astype(jnp.int32)
        return self.waves + jnp.where(self.cut > 0, self.end[0] + some - self.begin[0], 0)

    def unit(self, n):
        """The n-th unit."""
        whole = _in_wave(self.begin[3], n, self.sm, self.kernel.plan.tiles.sms)
        return jnp.where(n < self.waves, whole, self.begin[0] + n - self.waves)

    def span(self, unit, steps):
        """Steps [first, last) of a unit that belong to this part."""
        return (
            jnp.where(unit == self.begin[0], self.begin[1], 0),
            jnp.where((unit == self.end[0]) & (unit < self.begin[3]), self.end[1], steps),
        )

    def facts(self, unit, columns):
        return [self.units[unit, c] for c in columns]


class _Copy:
    """The warpgroup that copies pages, and widens packed ones."""

    def __init__(self, kernel, where, q, pools, per_token, table, scratch):
        self.kernel, self.plan, self.where = kernel, kernel.plan, where
        self.q, self.pools, self.per_token, self.table = q, pools, per_token, table
        self.s = scratch

    def run(self):
        (self.run_packed if self.plan.packed else self.run_dense)()
        for slot in range(self.plan.tiles.stages):  # every phase of a barrier is waited for
            plgpu.barrier_wait(self.s["k_free"].at[slot])
            plgpu.barrier_wait(self.s["v_free"].at[slot])
        plgpu.barrier_wait(self.s["q_free"])

    def run_dense(self):
        """Keys of a step, then values of the step before: in the order in which they are used, none waits behind what is not."""
        stages = self.plan.tiles.stages

        def values(t, last):
            plgpu.barrier_wait(self.s["v_free"].at[_rem(t, stages)])
            self.copy_pages(1, last, self.s["v_s"], self.s["v_full"], _rem(t, stages))

        def step(t, state):
            cursor, found, last = state
            slot = _rem(t, stages)
            plgpu.barrier_wait(self.s["k_free"].at[slot])
            now = cursor[4], self.inside(cursor), found
            self.copy_pages(0, now, self.s["k_s"], self.s["k_full"], slot)
            self.copy_numbers(now, self.s["k_full"].at[slot], slot)
            pl.when(t > 0)(lambda: values(t - 1, last))
            self.other_queries(cursor)
            after = self.advance(cursor, t)
            self.first_queries(after)
            return after, self.pages(after), now  # read while later copies wait for room

        cursor, steps = self.first(), self.where.steps
        pl.when(steps > 0)(lambda: self.first_queries(cursor))
        start = cursor[4], self.inside(cursor), self.pages(cursor)
        *_, last = lax.fori_loop(0, steps, step, (cursor, start[2], start))
        pl.when(steps > 0)(lambda: values(steps - 1, last))

    def run_packed(self):
        """Codes of later steps are in flight while those of one are widened."""
        t_ = self.plan.tiles
        steps = self.where.steps

        def fetch(t, cursor):
            slot, full = _rem(t, t_.raw), self.s["raw_full"]
            now = cursor[4], self.inside(cursor), self.pages(cursor)
            self.copy_pages(0, now, self.s["k_raw"], full, slot)
            self.copy_numbers(now, full.at[slot], _rem(t, self.kernel.ring))
            self.copy_pages(1, now, self.s["v_raw"], full, slot)
            return self.advance(cursor, t)

        def maybe(t, cursor):
            return lax.cond(t < steps, lambda: tuple(fetch(t, cursor)), lambda: tuple(cursor))

        def step(t, state):
            cursor, ahead = state
            self.other_queries(cursor)
            slot, raw = _rem(t, t_.stages), _rem(t, t_.raw)
            plgpu.barrier_wait(self.s["raw_full"].at[raw])
            left = cursor[5] - self.kernel.block(cursor[1], cursor[6]) * t_.block_kv
            for name in "kv":
                plgpu.barrier_wait(self.s[f"{name}_free"].at[slot])
                codes, to = self.s[f"{name}_raw"].at[raw], self.s[f"{name}_s"].at[slot]
                if self.plan.made:
                    self.make(name, codes, to, left, _rem(t, self.kernel.ring))
                else:
                    _widen(self.plan, codes, to, left)
                plgpu.commit_smem()
                plgpu.barrier_arrive(self.s[f"{name}_full"].at[slot])
            ahead, after = maybe(t + t_.raw, ahead), tuple(self.advance(cursor, t))
            self.first_queries(after)
            return after, ahead

        ahead = lax.fori_loop(0, t_.raw, maybe, tuple(self.first()))
        pl.when(steps > 0)(lambda: self.first_queries(self.first()))
        lax.fori_loop(0, steps, step, (tuple(self.first()), ahead))

    def make(self, name, codes, to, left, slot):
        """Numbers of the codes of a step, with their scales where those are not a token's; rows from `left` on as zeros."""
        plan = self.plan
        names = [x for x in plan.names if x[:2] == f"{name}_"]
        small = {x[2:]: self.s["token_s"][plan.names.index(x)].at[slot] for x in names}
        work = _make_plainly if plan.tiles.interpretable else _make_by_threads
        work(plan, getattr(plan, name), small, codes, to, left)

    def unit(self, n):
        """Cursor: which unit, step in it, end of its steps, whether a unit begins, head, length, skip, row of the table."""
        unit = self.where.unit(n)
        head, length, skip, listed, steps = self.where.facts(unit, (HEAD, LENGTH, SKIP, LISTED, STEPS))
        return n, *self.where.span(unit, steps), jnp.int32(1), head, length, skip, listed

    def first(self):
        none = jnp.int32(0)
        return lax.cond(self.where.steps > 0, lambda: self.unit(none), lambda: (none,) * 8)

    def advance(self, cursor, t):
        n, step, end, _, *rest = cursor
        more = (step + 1 >= end) & (t + 1 < self.where.steps)
        return lax.cond(more, lambda: self.unit(n + 1), lambda: (n, step + 1, end, jnp.int32(0), *rest))

    def pages(self, cursor):
        """Pages that hold the step's boxes; past the length: beyond the pool, where TMA gives zeros."""
        _, step, _, _, _, length, skip, listed = cursor
        plan = self.plan
        token = self.kernel.block(step, skip) * plan.tiles.block_kv
        found = []
        for i in range(plan.boxes):
            slot = token + i * plan.box
            page = self.table[listed * plan.width + jnp.minimum(_div(slot, plan.page), plan.width - 1)]
            found.append(jnp.where(slot < length, page, plan.pool_pages))
        return found

    def first_queries(self, cursor):
        """Copies the queries of a unit that begins here while the unit before is worked on: all, or the columns that pass through
        shared memory at once."""
        pl.when(cursor[3] == 1)(lambda: self.queries(cursor, range(1)))

    def other_queries(self, cursor):
        """Copies their other columns, where there are, which wait for the end of the unit before."""
        parts = self.plan.head_dim // self.kernel.width
        if parts > 1:
            pl.when(cursor[3] == 1)(lambda: self.queries(cursor, range(1, parts)))

    def queries(self, cursor, parts):
        """Copies columns of a unit's queries, as many at a time as pass through shared memory."""
        plan, s = self.plan, self.s
        head, group = cursor[4], plan.group
        token, decode = self.where.facts(self.where.unit(cursor[0]), (TOKEN, DECODE))
        for c in parts:
            columns = pl.ds(c * self.kernel.width, self.kernel.width)
            plgpu.barrier_wait(s["q_free"])
            for wg in range(COMPUTE):
                target, first = s["stage_s"].at[wg], token + wg * plan.per_wg

                def one(i, first=first, target=target, wg=wg, columns=columns, full="q_full"):
                    source = self.q.at[first + i, pl.ds(head * group, group), columns]
                    at = pl.ds(pl.multiple_of(i * group, group), group)
                    plgpu.copy_gmem_to_smem(source, target.at[at], s[full].at[wg])

                @pl.when(decode == 1)
                def _(one=one):
                    one(jnp.int32(0), first=token, full="q_one")

                @pl.when(decode == 0)
                def _(one=one, first=first, target=target, wg=wg, columns=columns):
                    if group == 1:
                        source = self.q.at[pl.ds(first, ROWS), head, columns]
                        plgpu.copy_gmem_to_smem(source, target, s["q_full"].at[wg])
                    else:
                        lax.fori_loop(0, plan.per_wg, lambda i, _: one(i), None)

    def inside(self, cursor):
        """The first of a step's tokens in their page, where that has several boxes."""
        first = self.kernel.block(cursor[1], cursor[6]) * self.plan.tiles.block_kv
        return _rem(first, self.plan.page) if self.plan.page > self.plan.box else jnp.int32(0)

    def part(self, first, i, count=None):
        """Of a page the tokens of box i, or the `count` numbers that belong to them."""
        plan = self.plan
        count = count or plan.box
        if plan.page == plan.box:
            return slice(None)
        at = _rem(first + i * plan.box, plan.page)
        at = at if count == plan.box else _div(at, plan.box) * count
        return pl.ds(pl.multiple_of(at, count), count)

    def copy_pages(self, which, now, to, full, slot):
        """Starts the copies of keys (0) or values (1); now: kv head, `inside` and pages of the step."""
        head, first, found = now
        for i, page in enumerate(found):
            source = self.pools[which].at[page * self.plan.kv_heads + head, self.part(first, i)]
            box = pl.ds(i * self.plan.box, self.plan.box)
            plgpu.copy_gmem_to_smem(source, to.at[slot, box], full.at[slot])

    def copy_numbers(self, now, full, slot):
        """The same of what belongs to tokens."""
        plan, (head, first, found) = self.plan, now
        for name, ref, to in zip(plan.names, self.per_token, self.s["token_s"], strict=True):
            count = plan.numbers(name)
            for i, page in enumerate(found):
                row = page if name == "at" else page * plan.kv_heads + head
                source = ref.at[row, self.part(first, i, count)]
                plgpu.copy_gmem_to_smem(source, to.at[slot, i, pl.ds(0, count)], full)


def _widen(plan: Plan, codes, to, left):
    """Codes of a step [tokens, stored] in SMEM -> the same as 16-bit numbers [tokens, H]; rows from `left` on as zeros."""
    dtype = jnp.dtype(plan.dtype)
    for first in range(0, plan.tiles.block_kv, ROWS):
        rows = pl.ds(first, ROWS)
        x = plgpu.load(codes.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
        if plan.format == "int4":
            even = (x & jnp.int8(15)).astype(dtype) - jnp.asarray(8, dtype)
            odd = ((x ^ jnp.int8(-128)) & jnp.int8(-16)).astype(dtype) * jnp.asarray(1 / 16, dtype)
            to.at[rows, pl.ds(0, plan.stored)][...] = even
            to.at[rows, pl.ds(plan.stored, plan.stored)][...] = odd
        elif plan.format == "int8":
            x = x ^ jnp.int8(-128) if plan.k.zero else x
            to.at[rows][...] = x.astype(dtype)
        else:  # only fp8 has codes that are not a number
            x = x.astype(jnp.float16).astype(jnp.float32)
            at = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA) + first
            to.at[rows][...] = jnp.where(at < left, x, 0.0).astype(dtype)


def _make_plainly(plan: Plan, stream: Pages, small, codes, to, left):
    """For the interpreter."""
    tokens, h = plan.tiles.block_kv, plan.head_dim
    x = unpacked(codes[...], stream.bits)
    if stream.code == "codebook4":
        x = sum(jnp.where(x == i, jnp.float32(c), 0) for i, c in enumerate(centroids(4)))
    else:
        x = x.astype(jnp.float32)

    def wide(part):
        count = stream.scales(plan.box, h)
        found = jnp.concatenate([small[part][i, :count] for i in range(plan.boxes)]).astype(jnp.float32)
        if stream.span is not None:
            return jnp.repeat(found.reshape(-1, h), stream.span, axis=0)
        return jnp.repeat(found.reshape(tokens, -1), h // (count // plan.box), axis=1)

    if stream.by_token:
        x = x if stream.code == "codebook4" else x - plan.shift
    elif stream.zero == "least":
        x = x * wide("scale") + wide("zero")
    else:
        x = (x - (wide("zero") if stream.zero else plan.shift)) * wide("scale")
    to[...] = jnp.where(jnp.arange(tokens)[:, None] < left, x, 0).astype(plan.dtype)


def _make_by_threads(plan: Plan, stream: Pages, small, codes, to, left):
    """A thread makes 32 numbers of a token at a time."""
    h, made = plan.head_dim, Codes(stream)
    raw_tiling, wide_tiling = _tiling(plan.stored, 8), _tiling(h, 16)
    refs = (plgpu.RefType(raw_tiling), plgpu.RefType(wide_tiling), *(plgpu.RefType(),) * len(small))

    @plgpu.inline_mgpu(arg_types=(*refs, plgpu.Layout.WG_SPLAT()), return_type=())
    def make(_, codes, to, *rest):
        i32_ = ir.IntegerType.get_signless(32)
        named, left = dict(zip(small, rest[:-1], strict=True)), rest[-1].registers.item()
        thread = w.and_(utils.thread_idx(), 127)

        def swizzled(row, byte, size):
            """Byte of a row in shared memory whose rows have `size` bytes: tiles of 8 rows by 128 bytes at most."""
            swizzle = min(128, size)
            at = w.add(w.times(w.and_(row, 7), swizzle), w.and_(byte, swizzle - 1))
            at = arith.xori(at, arith.shli(w.and_(w.right(at, 7), swizzle // 16 - 1), w.i32(4)))
            tile = w.add(w.times(w.right(row, 3), size // swizzle), arith.divui(byte, w.i32(swizzle)))
            return w.add(at, w.times(tile, 8 * swizzle))

        def one(what, token, at, element=None, count=1):
            """Numbers from `at` (i32) on of those that belong to the token's box."""
            dtype = small[what].dtype
            pitch = max(stream.scales(plan.box, h) * dtype.itemsize, 128)
            page = w.times(arith.divui(token, w.i32(plan.box)), pitch)
            element = element or utils.dtype_to_ir_type(dtype)
            return w.load(named[what], w.add(page, w.times(at, dtype.itemsize)), element, count)

        def words(token, part):
            """Words of the codes of 32 numbers."""
            size = UNIT * made.plane // 8
            if made.plane == stream.bits:
                return w.load(codes, swizzled(token, w.times(part, size), plan.stored), i32_, size // 4)
            row = w.times(token, plan.stored)
            low = w.load(codes, w.add(row, w.times(part, size)), i32_, size // 4)
            return low + w.load(codes, w.add(w.add(row, h // 4), w.times(part, UNIT // 8)), i32_)

        def steps(token, part):
            """What makes numbers of 16 words of neighbours."""
            inside = arith.remui(token, w.i32(plan.box))
            real = w.less(token, left)
            if stream.span is not None:
                at = w.add(w.times(arith.divui(inside, w.i32(stream.span)), h), w.times(part, UNIT))

                def pairs(what):
                    found = [x for i in range(0, UNIT, 8) for x in one(what, token, w.add(at, i), i32_, 4)]
                    return [[w.choose(real, x, w.f32(0.0)) for x in w.halves_of_f16(word)] for word in found]

                scales, least = pairs("scale"), pairs("zero")
                both = zip(scales, least, strict=True)
                return [(made.middle, w.rounded(*x), made.middles(x, y)) for x, y in both]
            groups = h // (stream.group or h)
            group = arith.divui(w.times(part, UNIT), w.i32(h // groups))
            at = w.add(w.times(inside, groups), group)
            number = lambda what: _number(*one(what, token, at), real)  # noqa: E731
            scale, away, middle = number("scale"), made.middle, None
            if stream.zero == "least":
                middle = made.middles([scale], [number("zero")])
            elif stream.zero == "code":
                zero = arith.extui(i32_, *one("zero", token, at))
                away = w.add(w.or_(zero, arith.shli(zero, w.i32(16))), 0x43004300)
            return [(away, w.rounded(scale, scale), middle)] * (UNIT // 2)

        for i in range(plan.tiles.block_kv * h // UNIT // 128):
            unit = w.add(thread, 128 * i)
            token, part = arith.divui(unit, w.i32(h // UNIT)), arith.remui(unit, w.i32(h // UNIT))
            found = made.neighbours(words(token, part))
            if not stream.by_token:
                found = [made.number(x, y) for x, y in zip(found, steps(token, part), strict=True)]
            elif stream.code != "codebook4":
                found = [w.of_pairs("sub", x, made.middle) for x in found]
            for k in range(0, UNIT // 2, 4):
                at = swizzled(token, w.add(w.times(part, 2 * UNIT), 4 * k), 2 * h)
                w.store(to, at, [utils.bitcast(x, ir.F32Type.get()) for x in found[k : k + 4]])
        return ()

    make(codes, to, *small.values(), left)


def _number(x, real):
    """A number of 16 or 32 bits as float32, 0 where it is not `real`."""
    x = x if x.type == ir.F32Type.get() else arith.extf(ir.F32Type.get(), x)
    return w.choose(real, x, w.f32(0.0))


class _Compute:
    """A warpgroup that computes."""

    def __init__(self, kernel, where, wg, sinks, row_borders, borders, outputs, scratch):
        self.kernel, self.plan, self.where, self.wg, self.s = kernel, kernel.plan, where, wg, scratch
        self.sinks, self.row_borders, self.borders = sinks, row_borders, borders
        self.out, self.lse, self.parts, self.marks, self.chunk_parts, self.chunk_marks = outputs
        self.q_me, self.out_me, self.stage = (scratch[name].at[wg] for name in ("q_s", "out_s", "stage_s"))

    def run(self):
        s = self.s
        for slot in range(self.plan.tiles.stages):
            plgpu.barrier_arrive(s["k_free"].at[slot])
            plgpu.barrier_arrive(s["v_free"].at[slot])
        plgpu.barrier_arrive(s["q_free"])
        if self.plan.overlaps:
            pl.when(self.wg == COMPUTE - 1)(lambda: plgpu.barrier_arrive(s["turn"].at[0]))

        def unit(n, t):
            unit = self.where.unit(n)
            facts = self.where.facts(unit, range(FACTS))
            begin, end = self.where.span(unit, facts[STEPS])
            self.load_queries(facts[DECODE])
            pl.when(facts[DECODE] == 1)(lambda: self.decode(unit, facts, begin, end, t))
            pl.when(facts[DECODE] == 0)(lambda: self.chunk(unit, facts, begin, end, t))
            return t + end - begin

        lax.fori_loop(jnp.int32(0), self.where.count, unit, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if self.plan.overlaps:
            pl.when(self.wg == 0)(lambda: plgpu.barrier_wait(s["turn"].at[0]))

    def load_queries(self, decode):
        parts = self.plan.head_dim // self.kernel.width
        plgpu.commit_smem()  # all warps have read those of the unit before
        for c in range(parts):
            pl.when(decode == 1)(lambda: plgpu.barrier_wait(self.s["q_one"].at[self.wg]))
            pl.when(decode == 0)(lambda: plgpu.barrier_wait(self.s["q_full"].at[self.wg]))
            columns = pl.ds(c * self.kernel.width, self.kernel.width)
            self.q_me[:, columns] = plgpu.load(self.stage, layout=plgpu.Layout.WGMMA, optimized=False)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.s["q_free"])

    def start(self):
        """Values, maximum, sum, and what zero points of values take away, of no token."""
        of = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), by_row())  # noqa: E731
        values = plgpu.layout_cast(jnp.zeros((ROWS, self.plan.head_dim), jnp.float32), plgpu.Layout.WGMMA)
        return values, of(LOWEST), of(0.0), of(0.0) if self.plan.v_zero else jnp.int32(0)

    def q_sum(self):
        if not self.plan.k_zero:
            return None
        return jnp.sum(plgpu.load(self.q_me, layout=plgpu.Layout.WGMMA).astype(jnp.float32), axis=1)

    # --- One step --------------------------------------------------------------------------------------------------

    def vectors(self, t, first, count):
        """By cached token of the step: what the kernel was given, from box `first` on, float32 but for positions."""
        slot, box = _rem(t, self.kernel.ring), self.plan.box

        def load(ref):
            found = [
                plgpu.load(ref.at[slot, first + i, pl.ds(0, box)], layout=by_token(), optimized=False)
                for i in range(count)
            ]
            return found[0] if count == 1 else jnp.concatenate(found)

        each = lambda name: name[:2] not in ("k_", "v_") or getattr(self.plan, name[0]).by_token  # noqa: E731
        refs = zip(self.plan.names, self.s["token_s"], strict=True)
        named = {name: load(ref) for name, ref in refs if each(name)}
        named = {name: x if name == "at" else x.astype(jnp.float32) for name, x in named.items()}
        for x in "kv":
            if f"{x}_zero" in named and getattr(self.plan, x).zero == "least":
                named[f"{x}_zero"] = -named[f"{x}_zero"] / named[f"{x}_scale"]
        return named

    def logits(self, s, given, q_sum, seen):
        """Products -> logits in powers of 2 by `rate`, -inf where not seen."""
        plan = self.plan
        if plan.k_zero:
            s = s - _wide(q_sum, s.shape, 0) * _wide(given["k_zero"] - plan.shift, s.shape, 1)
        factor = None
        for name in ("k_scale", "logit_scale"):
            if name in given:
                factor = given[name] if factor is None else factor * given[name]
        if factor is not None:
            s = s * _wide(factor * self.fold, s.shape, 1)
        elif plan.softcap is not None or plan.scale <= 0:
            s = s * self.fold
        if (
            plan.softcap is not None
        ):  # c tanh(x / c) = c - 2c / (1 + exp(2x / c)); 1/y = rsqrt(y)^2 is one fast instruction
            inverse = lax.rsqrt(1 + jnp.exp2(s))
            s = plan.softcap * LOG2E * (1 - 2 * (inverse * inverse))
        return s if seen is None else jnp.where(seen, s, -jnp.inf)

    @property
    def fold(self) -> float:
        """What multiplies products before the softcap, in powers of 2."""
        plan = self.plan
        return plan.scale * LOG2E if plan.softcap is None else 2 * plan.scale * LOG2E / plan.softcap

    @property
    def rate(self) -> float:
        """What is left to multiply logits by inside the exponent."""
        plan = self.plan
        plain = plan.softcap is None and plan.scale > 0 and not plan.k_scaled and not plan.logit_scale
        return plan.scale * LOG2E if plain else 1.0

    def softmax(self, s, given, seen, state):
        """-> weights in 16 bits, and the state scaled down to the new maximum."""
        plan, rate = self.plan, self.rate
        acc, top, total, zeros = state
        higher = jnp.maximum(top, s.max(axis=1) * rate)
        shrink = jnp.exp2(top - higher)
        weights = jnp.exp2(s * rate - _wide(higher, s.shape, 0))
        total = total * shrink + weights.sum(axis=1)
        if "v_scale" in given:
            weights = weights * _wide(given["v_scale"], s.shape, 1)
            weights = weights if seen is None else jnp.where(seen, weights, 0.0)  # past the length a scale may be NaN
        weights = weights.astype(plan.dtype)
        if plan.v_zero:
            away = weights.astype(jnp.float32) * _wide(given["v_zero"] - plan.shift, s.shape, 1)
            zeros = zeros * shrink + jnp.sum(away if seen is None else jnp.where(seen, away, 0.0), axis=1)
        acc = acc * _wide(shrink, acc.shape, 0)
        return weights, (acc, higher, total, zeros)

    def multiply(self, acc, weights, values, through):
        """acc + weights values."""
        if not self.plan.tiles.interpretable:
            return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))
        through = self.s[through].at[self.wg]
        through[...] = weights
        plgpu.commit_smem()

        def product(ref):
            plgpu.wgmma(ref, through, values)
            return ref[...]

        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

    def clear(self, slot, left):
        """Zeroes values past the row's length: what lies there may be NaN, and 0 * NaN is NaN."""
        block = self.plan.tiles.block_kv

        @pl.when((left < block) & (_rem(left, self.plan.box) > 0) if not self.plan.packed else False)
        def _():
            for first in range(0, block, ROWS):
                part = self.s["v_s"].at[slot, pl.ds(first, ROWS)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                at = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA) + first
                part[...] = jnp.where(at < left, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def near(self, given, borders, shape):
        """Which cached tokens a window or the sinks hold, and no other call; borders: of `Plan.borders`, by row or for all."""
        mask = self.plan.mask
        at = _wide(given["at"], shape, 1)
        borders = [_wide(x, shape, 0) if x.shape else x for x in borders]
        found = []
        if self.plan.windowed:
            near = at >= borders[0]
            found.append(near | (at < mask.sinks) if mask.sinks else near)
        found += [at < borders[-1]] if mask.lag is not None else []
        found += [at >= mask.skip] if mask.skip else []
        return functools.reduce(operator.and_, found)

    # --- Decodes ---------------------------------------------------------------------------------------------------

    def decode(self, unit, facts, begin, end, t):
        """One query token; each warpgroup takes half of a step's cached tokens."""
        plan, s, wg = self.plan, self.s, self.wg
        block, piece = plan.tiles.block_kv, plan.piece
        shape, halved = (ROWS, piece), piece < block
        first_piece = wg * piece if halved else 0
        mine = pl.ds(pl.multiple_of(first_piece, piece), piece) if halved else slice(None)
        length, skip = facts[LENGTH], facts[SKIP]
        q_sum = self.q_sum()
        asking = [border[facts[TOKEN]] for border in self.borders]

        def step(i, state):
            now = t + i - begin
            slot = _rem(now, plan.tiles.stages)
            first = self.kernel.block(i, skip) * block
            plgpu.barrier_wait(s["k_full"].at[slot])

            def products(ref):
                plgpu.wgmma(ref, self.q_me, s["k_s"].at[slot, mine].T)
                return ref[...]

            logits = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
            boxes = piece // plan.box
            given = self.vectors(now, wg * boxes if halved else 0, boxes)
            plgpu.barrier_arrive(s["k_free"].at[slot])
            at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            seen = at < length - first - first_piece
            if plan.placed:
                seen = seen & self.near(given, asking, shape)
            logits = self.logits(logits, given, q_sum, seen)
            weights, (acc, *rest) = self.softmax(logits, given, seen, state)
            plgpu.barrier_wait(s["v_full"].at[slot])
            self.clear(slot, length - first)
            acc = self.multiply(acc, weights, s["v_s"].at[slot, mine], "half_s")
            plgpu.barrier_arrive(s["v_free"].at[slot])
            return acc, *rest

        def every_other(n, state):
            own = begin + 2 * n + wg
            pl.when(wg == 1)(lambda: self.pass_by(own - 1, None, offset=t - begin, turns=False))
            state = step(own, state)
            pl.when((wg == 0) & (own + 1 < end))(lambda: self.pass_by(own + 1, None, offset=t - begin, turns=False))
            return state

        if halved:
            state = lax.fori_loop(begin, end, step, self.start())
        else:
            count = end - begin
            state = lax.fori_loop(0, _div(count + 1 - wg, 2), every_other, self.start())
            last = (wg == 1) & (_rem(count, 2) == 1)
            pl.when(last)(lambda: self.pass_by(end - 1, None, offset=t - begin, turns=False))
        acc, top, total, zeros = state
        if plan.v_zero:
            acc = acc - _wide(zeros, acc.shape, 0)
        part = self.where.sm + unit
        self.marks.at[part, wg, 0][...] = top
        self.marks.at[part, wg, 1][...] = total
        through, columns = s["part_s"].at[wg], plan.tiles.columns
        for c in range(0, plan.head_dim, columns):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            through[...] = acc[:, c : c + columns]
            plgpu.commit_smem()
            target = self.parts.at[part, wg, :, pl.ds(c, columns)]
            plgpu.copy_smem_to_gmem(through.at[pl.ds(0, KEPT)], target)

    # --- Chunks ----------------------------------------------------------------------------------------------------

    def take_turn(self):
        if self.plan.tiles.turns:
            plgpu.barrier_arrive(self.s["turn"])
            plgpu.barrier_wait(self.s["turn"])

    def chunk(self, unit, facts, begin, end, t):
        """64 query rows a warpgroup, alternating between tensor cores and softmax."""
        plan, mask, wg = self.plan, self.plan.mask, self.wg
        block = plan.tiles.block_kv
        length, skip = facts[LENGTH], facts[SKIP]
        number = jnp.clip(facts[NUMBER] - wg * plan.per_wg, 0, plan.per_wg)
        newest = facts[NEWEST] + wg * plan.per_wg
        if mask.causal:  # steps below `whole` are seen by all queries of this warpgroup, those from `mine` on by none
            mine = _div(jnp.maximum(jnp.minimum(newest + number, length), 0) + block - 1, block)
            whole = _div(jnp.maximum(jnp.minimum(newest + 1, length), 0), block)
        else:
            mine, whole = _div(length + block - 1, block), _div(length, block)
        mine = jnp.where(number > 0, jnp.clip(mine - skip, begin, end), begin)
        whole = jnp.clip(whole - skip, begin, end if plan.overlaps else mine)
        how = {"length": length, "newest": newest, "skip": skip, "offset": t - begin}
        if plan.overlaps:
            state = self.overlapped(begin, end, whole, **how)
        else:
            asking = [plgpu.load(x.at[facts[ITEM], wg], layout=by_row(), optimized=False) for x in self.row_borders]
            step = functools.partial(self.chunk_step, q_sum=self.q_sum(), asking=asking, **how)
            pl.when(wg == 1)(self.take_turn)
            state = self.start()
            state = lax.fori_loop(begin, whole, functools.partial(step, edge=False), state)
            state = lax.fori_loop(whole, mine, functools.partial(step, edge=True), state)
            lax.fori_loop(mine, end, functools.partial(self.pass_by, offset=t - begin), None)
            pl.when(wg == 0)(self.take_turn)
        acc, top, total, zeros = state
        if plan.v_zero:
            acc = acc - _wide(zeros, acc.shape, 0)
        alone = facts[FROM] == facts[UPTO]

        @pl.when(alone)
        def _():
            self.finish(facts, number, acc, top, total)

        @pl.when(~alone)
        def _():
            part = 2 * self.where.sm + (begin == 0).astype(jnp.int32)
            self.chunk_marks.at[part, wg, 0][...] = top
            self.chunk_marks.at[part, wg, 1][...] = total
            self.chunk_parts.at[part, wg][...] = acc

    def chunk_step(self, i, state, *, edge, length, newest, skip, asking, q_sum, offset):
        plan, s = self.plan, self.s
        block = plan.tiles.block_kv
        shape, now = (ROWS, block), i + offset
        slot = _rem(now, plan.tiles.stages)
        first = self.kernel.block(i, skip) * block
        plgpu.barrier_wait(s["k_full"].at[slot])

        def products(ref):
            plgpu.wgmma(ref, self.q_me, s["k_s"].at[slot].T)
            self.take_turn()
            return ref[...]

        logits = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
        given = self.vectors(now, 0, plan.boxes)
        plgpu.barrier_arrive(s["k_free"].at[slot])
        seen = self.reached(first, length, newest) if edge else None
        if plan.placed:
            near = self.near(given, asking, shape)
            seen = near if seen is None else seen & near
        logits = self.logits(logits, given, q_sum, seen)
        weights, (acc, top, total, zeros) = self.softmax(logits, given, seen, state)
        acc, top, total, weights = lax.optimization_barrier((acc, top, total, weights))
        if plan.tiles.turns:
            plgpu.barrier_arrive(s["turn"])
        plgpu.barrier_wait(s["v_full"].at[slot])
        if edge:
            self.clear(slot, length - first)
        if plan.tiles.turns:
            plgpu.barrier_wait(s["turn"])
        acc = self.multiply(acc, weights, s["v_s"].at[slot], "p_s")
        plgpu.barrier_arrive(s["v_free"].at[slot])
        return acc, top, total, zeros

    def reached(self, first, length, newest):
        """Which of a step's cached tokens, from `first` on, a chunk's queries see by their order alone."""
        bound = jnp.full((ROWS,), length - 1 - first, jnp.int32)
        if self.plan.mask.causal:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row())
            bound = jnp.minimum(_div(row, self.plan.group) + (newest - first), bound)
        shape = (ROWS, self.plan.tiles.block_kv)
        at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        return at <= _wide(plgpu.layout_cast(bound, by_row()), shape, 0)

    def overlapped(self, begin, end, whole, *, length, newest, skip, offset):
        """Steps of a chunk: Q K of one and P V of the one before are in flight together, its softmax waits for the first alone.

        Both warpgroups take all steps; from `whole` on, queries of this one do not see all."""
        plan, s, wg = self.plan, self.s, self.wg
        block, shape = plan.tiles.block_kv, (ROWS, plan.tiles.block_kv)
        slot_of = lambda i: _rem(i + offset, plan.tiles.stages)  # noqa: E731
        first_of = lambda i: self.kernel.block(i, skip) * block  # noqa: E731
        take = lambda: plgpu.barrier_wait(s["turn"].at[wg])  # noqa: E731
        pass_on = lambda: plgpu.barrier_arrive(s["turn"].at[COMPUTE - 1 - wg])  # noqa: E731

        def keys_of(i):
            # A wait between the softmax and the wait for P V: ptxas would pull the latter before the softmax.
            pl.when(i < end)(lambda: plgpu.barrier_wait(s["k_full"].at[slot_of(i)]))

        def weights(logits, i, top, total):
            given = self.vectors(i + offset, 0, plan.boxes)
            plgpu.barrier_arrive(s["k_free"].at[slot_of(i)])

            logits = self.logits(logits, given, None, None)
            seen = functools.partial(self.reached, first_of(i), length, newest)
            logits = lax.cond(i >= whole, lambda x: jnp.where(seen(), x, -jnp.inf), lambda x: x, logits)
            higher = jnp.maximum(top, logits.max(axis=1) * self.rate)
            shrink = jnp.exp2(top - higher)
            found = jnp.exp2(logits * self.rate - _wide(higher, shape, 0))
            sums = [found[:, at : at + SUMS] for at in range(0, block, SUMS)]  # of what a thread holds
            while len(sums) > 1:
                sums = [functools.reduce(operator.add, sums[n : n + 2]) for n in range(0, len(sums), 2)]
            return found, shrink, higher, total * _wide(shrink, total.shape, 0) + sums[0]

        def only_keys(ref):
            plgpu.wgmma(ref, self.q_me, s["k_s"].at[slot_of(begin)].T)
            pass_on()
            return ref[...]

        acc, top, _, _ = self.start()
        total = plgpu.layout_cast(jnp.zeros((ROWS, SUMS), jnp.float32), plgpu.Layout.WGMMA)
        keys_of(begin)
        take()
        logits = pl.run_scoped(only_keys, plgpu.ACC(shape, jnp.float32))
        found, _, top, total = weights(logits, begin, top, total)
        keys_of(begin + 1)

        def step(i, state):
            acc, found, top, total = state
            before = slot_of(i - 1)

            def products(refs):
                logits_ref, acc_ref, shrink_ref, next_ref, top_ref, total_ref = refs
                plgpu.wgmma(logits_ref, self.q_me, s["k_s"].at[slot_of(i)].T)
                plgpu.barrier_wait(s["v_full"].at[before])
                plgpu.wgmma(acc_ref, found, s["v_s"].at[before])
                pass_on()
                logits = lax.optimization_barrier(plgpu.wgmma_accumulator_load(logits_ref, wait_n=1))
                new, shrink, top_ref[...], total_ref[...] = weights(logits, i, top_ref[...], total_ref[...])
                next_ref[...], shrink_ref[...] = lax.optimization_barrier((new, shrink))
                keys_of(i + 1)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(s["v_free"].at[before])

            take()  # before the zeros: without a wait between, ptxas has the first wgmma ignore its accumulator instead
            none = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            start = plgpu.ACC.init(none), plgpu.ACC.init(acc), top, none, top, total
            _, acc, shrink, new, top, total = pl.run_state(products)(start)
            acc = lax.optimization_barrier(acc) * _wide(shrink, acc.shape, 0)
            return acc, new.astype(plan.dtype), top, total

        acc, found, top, total = lax.fori_loop(begin + 1, end, step, (acc, found.astype(plan.dtype), top, total))
        slot = slot_of(end - 1)
        plgpu.barrier_wait(s["v_full"].at[slot])
        self.clear(slot, length - first_of(end - 1))
        acc = self.multiply(acc, found, s["v_s"].at[slot], "p_s")
        plgpu.barrier_arrive(s["v_free"].at[slot])
        return acc, top, jnp.sum(total, axis=1), jnp.int32(0)

    def pass_by(self, i, _, *, offset, turns=True):
        """Lets a step of the other warpgroup pass."""
        slot, s = _rem(i + offset, self.plan.tiles.stages), self.s
        take_turn = self.take_turn if turns else lambda: None
        plgpu.barrier_wait(s["k_full"].at[slot])
        take_turn()
        plgpu.barrier_arrive(s["k_free"].at[slot])
        plgpu.barrier_wait(s["v_full"].at[slot])
        take_turn()
        plgpu.barrier_arrive(s["v_free"].at[slot])

    def finish(self, facts, number, acc, top, total):
        """Results of a whole unit."""
        plan, wg = self.plan, self.wg
        head = facts[HEAD]
        if plan.sinks:
            logit = plgpu.load(self.sinks.at[head], layout=by_row(), optimized=False)
            higher = jnp.maximum(top, logit)
            shrink = jnp.exp2(top - higher)
            acc = acc * _wide(shrink, acc.shape, 0)
            total, top = total * shrink + jnp.exp2(logit - higher), higher
        some = total > 0
        total = jnp.where(some, total, 1.0)
        self.lse.at[pl.ds(facts[ROW] + wg * ROWS, ROWS)][...] = jnp.where(
            some, top * (1 / LOG2E) + jnp.log(total), -jnp.inf
        )
        acc = acc * _wide(1 / total, acc.shape, 0)
        token = facts[TOKEN] + wg * plan.per_wg
        plgpu.commit_smem()  # nobody reads queries any more
        self.out_me[...] = acc.astype(plan.dtype)
        plgpu.commit_smem()

        def store(i, _):
            at = pl.ds(pl.multiple_of(i * plan.group, plan.group), plan.group)
            target = self.out.at[token + i, pl.ds(head * plan.group, plan.group), :]
            plgpu.copy_smem_to_gmem(self.out_me.at[at], target)

        lax.fori_loop(0, number, store, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()


# --- The merge -------------------------------------------------------------------------------------------------------


def _merge(plan: Plan, out, lse, parts, units, cuts, sinks):
    """Writes the results of decodes and of units that were cut beside those of whole units -> out, lse."""
    h, dtype = plan.head_dim, jnp.dtype(plan.dtype)
    layout = plgpu.Layout.MMA_ACC(jnp.float32, m_warps=1)
    by_row = layout.reduce(1)
    decodes = plan.kv_heads * plan.decodes
    blocks = ROWS // KEPT  # of rows of a warpgroup
    full = lambda x: plgpu.layout_cast(jnp.full((KEPT,), x, jnp.float32), by_row)  # noqa: E731
    load = functools.partial(plgpu.load, optimized=False)

    def body(parts_g, marks_g, chunk_parts_g, chunk_marks_g, units_g, cuts_g, *refs):
        *sinks_g, out_g, lse_g, row_s = refs
        index = lax.axis_index("item")

        def merge(unit, wg, block, count, part, number):
            """`part(i)` -> (values, marks, part that wrote them) of partial result i, of `count`; `number`: real rows."""
            row = block * KEPT

            def add(i, carry):
                top, total, acc = carry
                values, marks, _ = part(i)
                m, l = (load(marks.at[n, pl.ds(row, KEPT)], layout=by_row) for n in range(2))
                higher = jnp.maximum(top, m)
                a, b = jnp.exp2(top - higher), jnp.exp2(m - higher)
                acc = acc * _wide(a, acc.shape, 0) + load(values, layout=layout) * _wide(b, acc.shape, 0)
                return higher, total * a + l * b, acc

            def step(i, carry):
                writer = part(i)[2]
                some = cuts_g[writer + 1, 2] > cuts_g[writer, 2]  # a part without steps wrote nothing
                return lax.cond(some, lambda: add(i, carry), lambda: carry)

            head = units_g[unit, HEAD]
            if plan.sinks:
                top, total = load(sinks_g[0].at[head, pl.ds(row, KEPT)], layout=by_row), full(1.0)
            else:
                top, total = full(LOWEST), full(0.0)
            none = plgpu.layout_cast(jnp.zeros((KEPT, h), jnp.float32), layout)
            top, total, acc = lax.fori_loop(0, count, step, (top, total, none))
            some = total > 0
            total = jnp.where(some, total, 1.0)
            at = units_g[unit, ROW] + wg * ROWS + row
            lse_g.at[pl.ds(at, KEPT)][...] = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
            row_s[...] = (acc * _wide(1 / total, acc.shape, 0)).astype(dtype)
            plgpu.commit_smem()
            token = units_g[unit, TOKEN] + wg * plan.per_wg
            for x in range(KEPT):
                which, query = _div(row + x, plan.group), _rem(row + x, plan.group)

                @pl.when(row + x < number)
                def _(x=x, which=which, query=query):
                    target = out_g.at[token + which, pl.ds(head * plan.group + query, 1), :]
                    plgpu.copy_smem_to_gmem(row_s.at[pl.ds(x, 1)], target)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(index < decodes)
        def _():
            first, last = units_g[index, FROM], units_g[index, UPTO]

            def part(i):
                writer, wg = first + _div(i, COMPUTE), _rem(i, COMPUTE)
                return parts_g.at[writer + index, wg], marks_g.at[writer + index, wg], writer

            @pl.when(units_g[index, DECODE] == 1)
            def _():
                merge(index, jnp.int32(0), jnp.int32(0), (last - first + 1) * COMPUTE, part, plan.group)

        @pl.when(index >= decodes)
        def _():
            inside = index - decodes
            cut = 1 + _div(inside, COMPUTE * blocks)
            wg, block = _rem(_div(inside, blocks), COMPUTE), _rem(inside, blocks)
            unit = jnp.minimum(cuts_g[cut, 0], plan.units - 1)
            first, last = units_g[unit, FROM], units_g[unit, UPTO]
            number = jnp.clip(units_g[unit, NUMBER] - wg * plan.per_wg, 0, plan.per_wg) * plan.group

            def part(i):
                at = 2 * (first + i) + (i == 0).astype(jnp.int32)
                return chunk_parts_g.at[at, wg, pl.ds(block * KEPT, KEPT)], chunk_marks_g.at[at, wg], first + i

            mine = (cuts_g[cut, 1] > 0) & (first == cut - 1) & (units_g[unit, DECODE] == 0)

            @pl.when(mine & (number > block * KEPT))
            def _():
                merge(unit, wg, block, last - first + 1, part, number)

    out, lse = jax.new_ref(out), jax.new_ref(lse)
    dependent(
        body,
        out_type=(),
        scratch_types=[plgpu.SMEM((KEPT, h), dtype)],
        grid=(decodes + (plan.tiles.sms - 1) * COMPUTE * blocks,),
        grid_names=("item",),
        num_threads=1,
        thread_name="wg",
        kernel_name=f"{OP}_merge",
    )(*parts, units, cuts, *([sinks] if plan.sinks else []), out, lse)
    return jax.freeze(out), jax.freeze(lse)
