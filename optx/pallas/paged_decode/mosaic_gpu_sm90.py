"""paged_decode on Hopper: each warpgroup streams an equal share of all listed tokens through TMA and tensor cores.

The tiles of all (row, kv head) units form one list that is cut into equal parts, one a warpgroup ("stream-K"), so ragged
lengths and small batches keep every SM busy. Of a unit that is cut each part leaves a partial result (weighted values, maximum,
sum); a second kernel merges them in a fixed order. Units that are whole leave as results. Query heads of a kv head and
query tokens are the 16 rows of mma.m16n8k16, whose operands a warp makes in registers from what lies in the pages: codes
become 16-bit numbers there. Scales and zero points of tokens act on logits and probabilities: of k = s c + m, c the code less the
middle one, q.k = s q.c + m sum(q), and sum_j p_j m_j joins the output; those of groups of numbers, or of channels over some
tokens (KIVI, Liu et al. 2024, arXiv:2402.02750), make numbers of the codes first. Codes of a codebook are looked up in registers.

The split follows Stream-K (Osama et al. 2023, arXiv:2301.03598); the online softmax FlashAttention-2 (Dao 2023,
arXiv:2307.08691); the bit tricks of the codes Kim et al. 2022, arXiv:2211.10017.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxlib.mlir import ir

from optx.errors import LoweringError
from optx.formats.codebook import centroids
from optx.pallas.attention.page_formats import FEW as FEW_BITS
from optx.pallas.attention.page_formats import Pages, pages_of, streams_of, unpacked
from optx.pallas.attention.reference import Mask, gather_pages, with_first
from optx.pallas.attention.words_sm90 import PERMUTES, Codes
from optx.pallas.attention.words_sm90 import add as _add
from optx.pallas.attention.words_sm90 import and_ as _and
from optx.pallas.attention.words_sm90 import choose as _choose
from optx.pallas.attention.words_sm90 import f32 as _f32
from optx.pallas.attention.words_sm90 import fma as _fma
from optx.pallas.attention.words_sm90 import halves_of_f16 as _halves_of_f16
from optx.pallas.attention.words_sm90 import i32 as _i32
from optx.pallas.attention.words_sm90 import less as _less
from optx.pallas.attention.words_sm90 import load as _load
from optx.pallas.attention.words_sm90 import of_pairs as _pair
from optx.pallas.attention.words_sm90 import or_ as _or
from optx.pallas.attention.words_sm90 import permute as _permute
from optx.pallas.attention.words_sm90 import pointer as _pointer
from optx.pallas.attention.words_sm90 import right as _right
from optx.pallas.attention.words_sm90 import rounded as _rounded
from optx.pallas.attention.words_sm90 import spread as _spread
from optx.pallas.attention.words_sm90 import store as _store
from optx.pallas.attention.words_sm90 import times as _times
from optx.pallas.late import arith, dependent, fragmented, launch_context, llvm, plgpu, scalar, scf, utils, vector
from optx.tensor import is_qtensor

OP = "paged_decode"
TILE = 16  # rows of the matrix instruction: query heads of a kv head x query tokens
ROWS = 64  # at most, of a warpgroup: more read the pages again
SMS = 132  # of H100 SXM and H200; on a part with fewer some blocks wait their turn
SHARED = 224 * 1024  # bytes of the 227 KB of a block that tiles may take
SHARE = 4 * 4 * 128  # numbers that the warps of a warpgroup exchange at a time
HEIGHTS = 4 * 2 * TILE  # and their rows' maxima and sums, behind which lie those over all warps
REGISTERS = {1: (240, 40), 2: (232, 40), 3: (160, 32)}  # by warpgroups: of each, of the one that copies
LOG2E = math.log2(math.e)
SLACK = 8.0  # powers of 2 that a weight may exceed 1 by before rows take a new maximum
NONE = 1 << 30  # more entries than there can be
FIRST = 8  # most first tokens that the merge attends to
FEW = 8  # lengths up to which kernels make the offsets of units themselves
HEAD_DIMS, PAGES, GROUPS, QUERIES = (64, 128, 256), (16, 32, 64, 128), 16, 8
SPANS = (32, 64, 128)
GRAIN = 16  # tokens that a copy takes where a listing ends
BOX = 256  # numbers of an axis that a copy takes at most
BF16 = jnp.dtype("bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the list of tiles is worked on."""

    tokens: int = 64  # a step; 64 or 128
    stages: int = 4  # steps in flight, at least 2
    wgs: int = 2  # warpgroups an SM, each with its own steps in flight
    sms: int = SMS
    registers: bool = True  # False: plain array operations, what the interpreter can run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entries:
    """Pages of an index over tokens, with the entries of several kv heads behind each other: a head of the kernel is several of
    the layer's, and of its slots a query sees those of its own."""

    each: int  # entries of a kv head in a page, a power of 2
    heads: int  # kv heads in a page, a power of 2
    every: int  # tokens of an entry, a power of 2
    first: int  # the first entry that there is


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
    k: Pages
    v: Pages
    small: tuple[str, ...]  # scales, zero points and the like, in the order of their copies
    small_dtypes: tuple[str, ...]
    dtype: str  # of queries, output and dense pools
    mask: Mask
    scale: float
    softcap: float | None
    sinks: bool  # sink logits
    tiles: Tiles
    keys_only: bool = False  # the pass over keys for scores
    entries: Entries | None = None  # None: a slot is a token
    first: tuple[int, int, int] | None = (
        None  # lists, pages a row and page size of the first tokens' table; None: no such tokens
    )

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
        """Rows of a block."""
        return min(ROWS, self.rows)

    @property
    def row_warps(self) -> int:
        """Warps that share out the rows of a block."""
        tiles = -(-self.kept // TILE)
        return tiles if tiles <= 2 else 4

    @property
    def staged(self) -> int:
        """Words of q in SMEM: all where the head dim is 256."""
        return self.row_warps * TILE * self.head_dim // 2 if self.head_dim > 128 else 128

    @property
    def direct(self) -> bool:
        """Whether a warpgroup that has a unit to itself writes its results, and the merge leaves them."""
        return self.tiles.registers and self.row_warps < 4 and not self.sinks and self.first is None

    @property
    def units(self) -> int:
        return self.batch * self.kv_heads * self.blocks

    @property
    def slots(self) -> int:
        """Of a row's listing."""
        return self.width * self.page

    @property
    def workers(self) -> int:
        return self.tiles.sms * self.tiles.wgs

    @property
    def format(self) -> str:
        """Codes of keys and of values."""
        return self.k.code

    @property
    def wide(self) -> int:
        """Entries of a stored token along its last axis."""
        return self.head_dim if self.format == "dense" else self.head_dim * self.k.bits // 8

    @property
    def itemsize(self) -> int:
        return 2 if self.format == "dense" else 1

    @property
    def shift(self) -> float:
        """Code that is multiplied as 0 where it is not known which one stands for it."""
        return float(2 ** (self.k.bits - 1))

    def zeroed(self, stream: Pages) -> bool:
        """Whether zero points act on logits or weights."""
        return stream.by_token and stream.zero is not None

    def small_dtype(self, name: str) -> str:
        return self.small_dtypes[self.small.index(name)]

    def numbers(self, name: str, tokens: int) -> int:
        """How many of `small` there are in `tokens` tokens."""
        if name in ("logit_scale", "position"):
            return tokens
        return (self.k if name[0] == "k" else self.v).scales(tokens, self.head_dim)

    def small_size(self, tokens: int) -> int:
        """Bytes of shared memory that `small` takes in a step of so many tokens."""
        piece = min(tokens, self.page)
        sizes = [
            self.numbers(n, piece) * jnp.dtype(x).itemsize for n, x in zip(self.small, self.small_dtypes, strict=True)
        ]
        return sum(-(-max(128, size) // 128) * 128 for size in sizes) * (tokens // piece)


def tiles(
    head_dim: int,
    format: str = "dense",
    small: int = 0,
    rows: int = TILE,
    window: int | None = None,
    span: int | None = None,
) -> Tiles:
    """As many steps in flight as SMEM holds. small: bytes of scales, zero points and positions of 64 tokens.

    128 tokens a step for 64, on an H100, 32 x 8k: 2.5% faster with bytes of 128 dims, 0.5% slower with int4 (one run); 1%
    faster with 64 dense dims (across two runs: within their spread). Short windows take 64: a step is read whole. With scales of
    channels, shared by `span` tokens, a warp makes operands of them for 32 tokens of 128.
    """
    step = 2 * 64 * head_dim * Pages(code=format).bits // 8
    longer = (
        span is not None
        or format in ("int3", "int2")
        or (step == 16384 and Pages(code=format).bits > 4 and (window is None or window >= 512))
    )
    step = (step + small) * (2 if longer else 1)
    staged = (4 if rows > 2 * TILE else 2) * TILE * head_dim * 2 if head_dim > 128 else 512
    stages = {wgs: min(8, (SHARED // wgs - 4 * SHARE - 1024 - staged) // step) for wgs in (2, 1)}
    wgs = 2 if stages[2] >= 2 else 1
    return Tiles(tokens=128 if longer else 64, stages=stages[wgs], wgs=wgs)


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
    streams = streams_of(cache)
    if isinstance(streams, str):
        return streams
    if reason := _layout_reason(*streams.values(), args["head_dim"]):
        return reason
    if cache.dtype not in (("bfloat16", "float16") if not cache.packed else ("bfloat16",)):
        return f"pages and queries of {cache.dtype}; allowed: bfloat16, and float16 where pages are dense"
    page = args.get("page_size")
    if page is not None and page not in PAGES:
        return f"page size {page}; allowed: 16, 32, 64, 128"
    return "adds no bias to keys" if args.get("key_bias") else None


def _layout_reason(k: Pages, v: Pages, head_dim: int) -> str | None:
    """Why pages are not read that lie so, or None."""
    if k.bits * head_dim < 32 * 8:
        return f"{k.code} of {head_dim} numbers a head; allowed: at least 32 bytes a token and head"
    if k.code == "int8" and k.zero != v.zero:
        return "zero points of keys or values alone; allowed: both or none in 8 bits"
    if v.span is not None:
        return "scales by channel of values; allowed: of keys"
    if k.span is not None and k.span not in SPANS:
        return f"scales shared by {k.span} tokens; allowed: {', '.join(map(str, SPANS))}"
    least = head_dim // 8
    for group in (k.group, v.group):
        if group is not None and group % least:
            return f"groups of {group} numbers; allowed: multiples of {least} with heads of {head_dim}"
    return None


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
    first=None,
    tiles: Tiles | None = None,
):
    """Attention of Q = 1 .. 8 new tokens a row over its cached tokens, their own included.

    q [B, Q, N, H]; pools [pages + 1, K, P, H], dense or QTensor (page_formats.py); positions int32[pages + 1, P];
    table int32[G, B, pages]; lengths int32[G, B]; q_positions int32[B, Q], -1 where there is no query: a row's queries are
    its newest slots; logit_scale [pages, K, P]. -> (out [B, Q, N, H], lse float32[B, Q, N], scores float32[B, S, K] or None).
    first: as of the reference; a pass of its own, and a merge, where there are more than 8.
    Scores cost one more pass over the keys (by XLA where query tokens x query heads a kv head exceed 16, or scores 2 GB).
    Raises: LoweringError for what the kernel does not take.
    """
    _check(q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale, value_dim)
    plan = _plan(q, k_pool, v_pool, table, mask, scale, softcap, sink_logits is not None, logit_scale, tiles)
    _check_plan(plan)
    args = (q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale)
    if first is None or want_scores or not _in_merge(plan, first):
        alone = functools.partial(run, plan, want_scores, *args)
        own = {"scale": scale, "softcap": softcap, "tiles": tiles, "q_positions": q_positions}
        return with_first(alone(), first, mask, functools.partial(paged_decode, q, **own))
    plan = dataclasses.replace(plan, first=(*first["table"].shape[::2], first["k_pool"].shape[2]))
    return run(plan, want_scores, *args, first)


def _refuse(argument: str, got, allowed: str):
    raise LoweringError(f"{OP}: {argument} {got}; allowed: {allowed}")


def _check(q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale, value_dim):
    if v_pool is None or value_dim is not None:
        _refuse("v_pool", "None (latents)", "a pool of values of the keys' head dim")
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
    if table.ndim != 3 or table.shape[0] not in (1, kv_heads) or table.shape[1] != b:
        _refuse("table", table.shape, f"[1 or {kv_heads}, {b}, pages]")
    wanted = {
        "positions": (positions, (pages, page)),
        "lengths": (lengths, table.shape[:2]),
        "q_positions": (q_positions, (b, queries)),
    }
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            _refuse(name, x.shape, str(shape))
    for name, x in (("table", table), *((name, x) for name, (x, _) in wanted.items())):
        if x.dtype != jnp.int32:
            _refuse(f"dtype of {name}", x.dtype, "int32")
    if sink_logits is not None and sink_logits.shape != (n,):
        _refuse("sink_logits", sink_logits.shape, f"({n},)")
    if logit_scale is not None and (
        logit_scale.shape[1:] != (kv_heads, page) or logit_scale.dtype not in (jnp.float32, jnp.float16, BF16)
    ):
        _refuse("logit_scale", f"{logit_scale.dtype}{logit_scale.shape}", f"floating [pages, {kv_heads}, {page}]")
    formats = [x.format if is_qtensor(x) else None for x in (k_pool, v_pool)]
    k, v = (pages_of(x) for x in formats)
    if k is None or v is None or k.code != v.code:
        _refuse("formats", f"{formats[0]} and {formats[1]}", "what `supports` takes, codes alike for keys and values")
    if reason := _layout_reason(k, v, h):
        _refuse("formats", reason, "what `supports` takes")
    if k.span is not None and page % k.span:
        _refuse("page size", page, f"a multiple of the {k.span} tokens that share scales")
    if is_qtensor(k_pool):
        if q.dtype != BF16:
            _refuse("dtype of q", q.dtype, "bfloat16 over packed pages")
    elif not (q.dtype == k_pool.dtype == v_pool.dtype and q.dtype in (BF16, jnp.dtype("float16"))):
        _refuse("dtypes", f"q {q.dtype}, pools {k_pool.dtype}, {v_pool.dtype}", "all bfloat16 or all float16")


def _plan(q, k_pool, v_pool, table, mask, scale, softcap, sinks, logit_scale, chosen) -> Plan:
    b, queries, n, h = q.shape
    small = {name: str(x.dtype) for name, x in _small(k_pool, v_pool, logit_scale).items()}
    if mask.window is not None:
        small["position"] = "int32"
    k, v = (pages_of(x.format if is_qtensor(x) else None) for x in (k_pool, v_pool))
    plan = Plan(
        batch=b,
        queries=queries,
        heads=n,
        kv_heads=k_pool.shape[1],
        head_dim=h,
        page=k_pool.shape[2],
        width=table.shape[2],
        groups=table.shape[0],
        k=k,
        v=v,
        small=tuple(small),
        small_dtypes=tuple(small.values()),
        dtype=str(q.dtype),
        mask=mask,
        scale=float(1 / math.sqrt(h) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        sinks=sinks,
        tiles=chosen or Tiles(),
    )
    rule = tiles(h, k.code, plan.small_size(64), queries * n // k_pool.shape[1], mask.window, k.span)
    return dataclasses.replace(plan, tiles=chosen or rule)


def _in_merge(plan: Plan, first) -> bool:
    """Whether the merge attends to the first tokens: a warp has all numbers of a row, and offsets are of 32 bits."""
    pools = [first["k_pool"], first["v_pool"]]
    plain = all(not is_qtensor(x) and x.dtype == BF16 and x.nbytes < 1 << 31 for x in pools)
    return plain and plan.dtype == "bfloat16" and plan.mask.skip <= FIRST and plan.head_dim <= 128


def _small(k_pool, v_pool, logit_scale) -> dict[str, jax.Array]:
    """What belongs to tokens of a head beside their numbers, [pages, K, numbers of a page]."""
    found = {}
    for part in ("scale", "zero"):
        found |= {f"{x}_{part}": getattr(pool, part) for x, pool in (("k", k_pool), ("v", v_pool)) if is_qtensor(pool)}
    found["logit_scale"] = logit_scale
    return {name: x.reshape(*x.shape[:2], -1) for name, x in found.items() if x is not None}


def _check_plan(plan: Plan):
    """Tiles that a block cannot hold, and sizes beyond the kernels' 32-bit offsets."""
    t = plan.tiles
    if t.wgs not in REGISTERS or t.tokens not in (64, 128) or t.stages < 2 or t.sms < 1:
        _refuse("tiles", t, f"wgs of {tuple(REGISTERS)}, tokens of 64, 128, stages of 2 or more")
    small = plan.small_size(t.tokens)
    size = t.stages * (2 * t.tokens * plan.wide * plan.itemsize + small + 16) + 4 * (
        SHARE + HEIGHTS + 4 * TILE + plan.staged
    )
    if plan.k.span is not None and t.tokens % plan.k.span:
        _refuse("tiles", t, f"tokens a multiple of the {plan.k.span} that share scales")
    if t.wgs * size > 226 * 1024:
        _refuse("tiles", f"{t}: {t.wgs * size} bytes of shared memory", f"{226 * 1024}")
    parts = (plan.workers + plan.units) * plan.kept * plan.head_dim * 4
    if parts >= 1 << 31:
        _refuse("rows", f"{plan.batch}: {parts} bytes of partial results", "less than 2^31")


def _span(plan: Plan, length):
    """Of a row with `length` slots: (tiles that hold sinks, first tile of the window, tiles in all)."""
    t = jnp.int32(plan.tiles.tokens)
    last = lax.div(length + (t - 1), t)
    if plan.mask.window is None:
        zero = length * 0
        return zero, zero, last
    # Positions may have holes but no two slots share one: the window holds at most as many slots.
    first = lax.div(jnp.maximum(length - (plan.mask.span + plan.queries - 1), 0), t)
    first = last if plan.mask.span == 0 else first
    sinks = jnp.minimum(first, -(-plan.mask.sinks // plan.tiles.tokens))
    return sinks, first, sinks + last - first


def _offsets(plan: Plan, lengths):
    """int32[units + 1]: where each unit's tiles begin in the list of all tiles. One reduction, to be one kernel of XLA.

    Few lengths are returned as they are: kernels make the offsets of them (`_offset_of`).
    """
    if lengths.size <= FEW:
        return lengths.reshape(-1)
    count = _span(plan, jnp.minimum(lengths, plan.slots))[2].T.reshape(-1)  # [B, G]
    each = plan.units // count.size  # units that keep the same pages
    unit = jnp.arange(plan.units + 1, dtype=jnp.int32)[:, None]
    before = jnp.clip(unit - each * jnp.arange(count.size, dtype=jnp.int32), 0, each)
    return jnp.sum(before * count, axis=1, dtype=jnp.int32)


def _shares(plan: Plan, offsets):
    """Of all warpgroups [start, stop) in the list of tiles, the first unit that each works on and the one past its last, int32[
    workers, 4]. Of many lengths a search in the kernel is a load after a load."""
    start, stop = _tiles_of(plan, jnp.arange(plan.workers, dtype=jnp.int32)[:, None], offsets[-1])
    first = jnp.sum(offsets <= start, axis=1, dtype=jnp.int32) - 1
    last = jnp.sum(offsets < stop, axis=1, dtype=jnp.int32)
    start, stop = start[:, 0], stop[:, 0]
    return jnp.stack([start, stop, jnp.minimum(first, plan.units - 1), jnp.where(stop > start, last, 0)], axis=1)


def _tiles_of(plan: Plan, worker, total):
    """[start, stop) of a warpgroup's part of the list of tiles."""
    size, rest = lax.div(total, jnp.int32(plan.workers)), lax.rem(total, jnp.int32(plan.workers))
    start = worker * size + jnp.minimum(worker, rest)
    return start, start + size + (worker < rest).astype(jnp.int32)


def _offset_of(plan: Plan, offsets):
    """In a kernel: unit -> where its tiles begin. offsets: ref of what `_offsets` returned."""
    lists = plan.batch * plan.groups
    if lists > FEW:
        return lambda unit: offsets[unit]
    each = plan.units // lists
    places = [g * plan.batch + b for b in range(plan.batch) for g in range(plan.groups)]
    counts = [_span(plan, jnp.minimum(offsets[i], plan.slots))[2] for i in places]
    return lambda unit: sum(jnp.clip(unit - each * i, 0, each) * count for i, count in enumerate(counts))


def _borders(plan: Plan, positions, table, lengths, q_positions):
    """Positions ascend along a listing, so what `lag` and `skip` leave to a query are neighbouring slots: -> the slot where
    they begin int32[G, B], and how many there are int32[G, B, Q]."""
    at = jnp.take(positions, table, axis=0, mode="clip").reshape(*table.shape[:2], -1)
    at = jnp.where(jnp.arange(at.shape[-1]) < lengths[..., None], at, jnp.iinfo(jnp.int32).max)
    below = lambda border: jnp.sum(at[:, :, None] < border[..., None], axis=-1, dtype=jnp.int32)  # noqa: E731
    skip = jnp.full((1, 1, 1), plan.mask.skip, jnp.int32)
    first = below(skip)[..., 0] if plan.mask.skip else jnp.zeros_like(lengths)
    if plan.mask.causal or plan.mask.lag is not None:
        last = below(plan.mask.end(q_positions)[None])
    else:
        last = jnp.where(q_positions >= 0, lengths[..., None], 0)
    return [first, jnp.maximum(last - first[..., None], 0)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    plan, want_scores, q, k_pool, v_pool, positions, table, lengths, q_positions, sink_logits, logit_scale, first=None
):
    aux, seen = [], lengths
    if plan.mask.apart:
        aux = _borders(plan, positions, table, lengths, q_positions)
        seen = jnp.max(aux[1], axis=-1) + aux[0]
    if plan.entries is not None:
        aux = [(jnp.max(q_positions, axis=1) + 1) // plan.entries.every]
    offsets = _offsets(plan, seen)
    shares = [_shares(plan, offsets)] if seen.size > FEW else []
    aux = [q_positions, table, seen, offsets, *shares, *aux]
    aux = [x.reshape(-1) for x in aux]
    if plan.mask.window is not None:
        aux.append(positions)
    pools = [x.data if is_qtensor(x) else x for x in (k_pool, v_pool)]
    pools += _small(k_pool, v_pool, logit_scale).values()
    near = []
    if first is not None:
        at = [x.reshape(-1) for x in (first["positions"], first["table"], first["lengths"], q_positions)]
        near = [q, first["k_pool"], first["v_pool"], *at]
    parts, marks, *results = _attend(plan, q, pools, aux)
    out, lse = _merge(plan, parts, marks, offsets, sink_logits, near, results)
    scores = None
    if want_scores:
        small = plan.batch * plan.slots * plan.kv_heads * 4 < 1 << 31
        if plan.tiles.registers and plan.rows <= TILE and small and not plan.mask.apart:
            scores = _scores(plan, q, pools, positions, table, lengths, q_positions, lse)
        else:
            scores = _scores_by_xla(plan, q, k_pool, positions, table, lengths, q_positions, lse, logit_scale)
    return out, lse, scores


# --- Attention over pages ---------------------------------------------------------------------------------------------


def _tiling(width: int, itemsize: int):
    """SMEM layout of rows of `width` entries: tiles of 8 rows, swizzled by their bytes; one after the other where no power of 2
    divides into them (two planes of codes)."""
    swizzle = min(128, width * itemsize)
    if swizzle & (swizzle - 1):
        return ()
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def _attend(plan: Plan, q, pools, aux):
    """-> values of each part float32[parts, kept, H], their (maximum, sum) float32[parts, 2, kept], logits in powers of 2; where
    it is `direct`, out and lse of units that are not cut."""
    t, wide = plan.tiles, plan.wide
    slots = t.wgs * t.stages
    per, piece = max(1, t.tokens // plan.page), min(t.tokens, plan.page)  # pages a step, slots of each
    small = list(pools[2:]) + ([aux[-1]] if plan.mask.window is not None else [])
    stored = pools[0].dtype
    layout = _tiling(wide, stored.itemsize)
    scratch = {
        "k_s": plgpu.SMEM((slots, t.tokens, wide), stored, transforms=layout),
        "v_s": plgpu.SMEM((slots, t.tokens, wide), stored, transforms=layout),
        # A copy's target must be 128-byte aligned: the numbers of a page lie apart.
        "small_s": [
            plgpu.SMEM((slots, per, max(plan.numbers(name, piece), 128 // x.dtype.itemsize)), x.dtype)
            for name, x in zip(plan.small, small, strict=True)
        ],
        "barriers": [
            plgpu.SMEM((2, slots, 2), jnp.int32)  # of words; filled, free again
            if t.registers
            else (
                plgpu.Barrier(num_arrivals=per * (2 + len(small)), num_barriers=slots),
                plgpu.Barrier(num_barriers=slots),
            )
        ],
        "sum_s": plgpu.SMEM((t.wgs, SHARE), jnp.float32),
        "top_s": plgpu.SMEM((t.wgs, HEIGHTS + 2 * 2 * TILE), jnp.float32),
        "q_s": plgpu.SMEM((t.wgs, plan.staged), jnp.int32),
    }
    parts = plan.workers + plan.units
    return dependent(
        functools.partial(_attend_body, plan, len(pools), len(aux), per, piece),
        out_type=(
            jax.ShapeDtypeStruct((parts, plan.kept, plan.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((parts, 2, plan.kept), jnp.float32),
            *(_results(plan) if plan.direct else ()),
        ),
        grid=(t.sms,),
        grid_names=("sm",),
        num_threads=t.wgs + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )(q, *pools, *aux)


def _results(plan: Plan):
    """out and lse."""
    shape = (plan.batch, plan.queries, plan.heads)
    out = jax.ShapeDtypeStruct((*shape, plan.head_dim), jnp.dtype(plan.dtype))
    return out, jax.ShapeDtypeStruct(shape, jnp.float32)


def _attend_body(plan, pool_count, aux_count, per, piece, q_g, *refs, k_s, v_s, small_s, barriers, sum_s, top_s, q_s):
    pools, (qpos_g, table_g, lengths_g, offsets_g, *position_g), results_g = (
        refs[:pool_count],
        refs[pool_count : pool_count + aux_count],
        refs[pool_count + aux_count :],
    )
    shares_g = [position_g.pop(0)] if plan.batch * plan.groups > FEW else []
    border_g = [position_g.pop(0) for _ in range(2 if plan.mask.apart else 0)]
    entries_g = [] if plan.entries is None else [position_g.pop(0)]  # of rows
    t = plan.tiles
    sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
    consumer, producer = REGISTERS[t.wgs]
    offset_of = _offset_of(plan, offsets_g)
    sources = (*pools, *position_g)
    step = (_Warps if t.registers else _Plain)(plan, per, piece, barriers[0])

    def share(wg):
        """A warpgroup's part of the list of tiles: (its number, first tile, end, first unit, end of units)."""
        worker = sm * t.wgs + wg
        if shares_g:
            return worker, *(shares_g[0][4 * worker + i] for i in range(4))
        start, stop = _tiles_of(plan, worker, offset_of(plan.units))
        first, last = jnp.int32(0), jnp.int32(0)  # units that begin at or before the first tile, before the end
        for bit in reversed(range(plan.units.bit_length())):
            for_first, for_last = (jnp.minimum(x + (1 << bit), plan.units) for x in (first, last))
            first = jnp.where(offset_of(for_first) <= start, for_first, first)
            last = jnp.where(offset_of(for_last) < stop, for_last, last)
        return worker, start, stop, jnp.minimum(first, plan.units - 1), jnp.where(stop > start, last + 1, 0)

    def enter(unit, start, stop):
        """Of a unit: where its tiles begin in the list, [begin, end) of a share's, its index into [G, B], its slots."""
        row, head, _ = _locate(plan, unit)
        listed = head * plan.batch + row if plan.groups > 1 else row
        offset, end = offset_of(unit), offset_of(unit + 1)
        length = jnp.minimum(lengths_g[listed], plan.slots)
        return offset, jnp.maximum(offset, start), jnp.minimum(end, stop), listed, length

    def first_token(tile, length):
        sinks, first, _ = _span(plan, length)
        return (tile if plan.mask.window is None else jnp.where(tile < sinks, tile, first + tile - sinks)) * t.tokens

    def slot_of(wg, step):
        return wg * t.stages + lax.rem(step, jnp.int32(t.stages))

    def pages_of(tile, listed, length):
        """Pages of a unit's tile; past its last one, that one again."""
        last = lax.div(length - 1, jnp.int32(plan.page))
        first = lax.div(first_token(tile, length), jnp.int32(plan.page))
        return tuple(table_g[listed * plan.width + jnp.minimum(first + j, last)] for j in range(per))

    def produce(wg):
        """Keeps the copies of a warpgroup's tiles under way."""
        _, start, stop, first_unit, last_unit = share(wg)

        def unit_loop(unit, _):
            _, head, _ = _locate(plan, unit)
            offset, begin, end, listed, length = enter(unit, start, stop)

            def tile_loop(i, pages):
                following = pages_of(i + 1 - offset, listed, length)  # under way while this tile waits for room
                token = first_token(i - offset, length)
                inside, left = lax.rem(token, jnp.int32(plan.page)), length - token
                step.copy(sources, (k_s, v_s, *small_s), pages, head, inside, slot_of(wg, i - start), i - start, left)
                return following

            lax.fori_loop(begin, end, tile_loop, pages_of(begin - offset, listed, length))

        lax.fori_loop(first_unit, last_unit, unit_loop, None)

    def consume():
        worker, start, stop, first_unit, last_unit = share(wg)

        def unit_loop(unit, _):
            row, head, block = _locate(plan, unit)
            offset, begin, end, listed, length = enter(unit, start, stop)
            origin = border_g[0][listed] if plan.mask.apart else None  # slots are counted from there
            asked = step.ask(q_g, q_s.at[wg], qpos_g, row, head, block, length, border_g[1:], listed)
            count = length if origin is None else length - origin
            count = entries_g[0][row] if entries_g else count

            def tile_loop(i, state):
                token, slot = first_token(i - offset, length), slot_of(wg, i - start)
                buffers = [ref.at[slot] for ref in (k_s, v_s, *small_s)]
                token = token if origin is None else token - origin
                return step.tile(buffers, q_s.at[wg], asked, state, token, count, slot, i - start)

            state = lax.fori_loop(begin, end, tile_loop, step.empty())

            @pl.when(begin < end)
            def _():
                whole = (begin == offset) & (end == offset_of(unit + 1))
                step.finish(state, sum_s.at[wg], top_s.at[wg], results_g, worker + unit, (row, head, block), whole)

        lax.fori_loop(first_unit, last_unit, unit_loop, None)

    step.begin()

    @pl.when(wg == t.wgs)
    def _():
        plgpu.set_max_registers(producer, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp < t.wgs)(lambda: produce(warp))

    @pl.when(wg < t.wgs)
    def _():
        plgpu.set_max_registers(consumer, action="increase")
        consume()


def _locate(plan, unit):
    """Row, kv head and block of query rows of a unit."""
    head = lax.div(unit, jnp.int32(plan.blocks))
    kv_heads = jnp.int32(plan.kv_heads)
    return lax.div(head, kv_heads), lax.rem(head, kv_heads), lax.rem(unit, jnp.int32(plan.blocks))


def located(entries: Entries, slots):
    """Slots of a listing int32[...] -> (which entry lies there, one past all where it is none; which of the page's kv heads)."""
    entry = slots // (entries.each * entries.heads) * entries.each + slots % entries.each
    return jnp.where(entry < entries.first, NONE, entry), slots // entries.each % entries.heads


class _Plain:
    """One tile by plain array operations: what the warps compute, for the interpreter."""

    def __init__(self, plan, per, piece, barriers):
        self.plan, self.per, self.piece = plan, per, piece
        self.full, self.free = barriers

    def begin(self):
        pass

    def copy(self, sources, to, pages, head, inside, slot, step, left):
        @pl.when(step >= self.plan.tiles.stages)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        for j, page in enumerate(pages):
            for n, (source, target) in enumerate(zip(sources, to, strict=True)):
                name = self.plan.small[n - 2] if n >= 2 else None
                source = source.at[page] if name == "position" else source.at[page, head]
                count, first = self.piece, inside
                if name:
                    count = self.plan.numbers(name, self.piece)
                    first = lax.div(inside, jnp.int32(self.piece)) * count
                at = target.at[slot, j, :count] if name else target.at[slot, pl.ds(j * count, count)]
                plgpu.copy_gmem_to_smem(source.at[pl.ds(first, count)], at, self.full.at[slot])

    def empty(self):
        kept = self.plan.kept
        zeros = jnp.zeros((kept, 1), jnp.float32)
        return zeros - jnp.inf, zeros, jnp.zeros((kept, self.plan.head_dim), jnp.float32)

    def ask(self, q_g, q_s, qpos_g, row, head, block, length, limits_g=(), listed=None):
        plan = self.plan
        q, limits, positions = [], [], []
        at = [qpos_g[row * plan.queries + i] for i in range(plan.queries)]
        for i, mine in enumerate(at):
            later = sum(jnp.int32(other > mine) for other in at)
            limit = length - (later if plan.mask.causal else 0)
            limit = limits_g[0][listed * plan.queries + i] if limits_g else limit
            limit = limit if plan.entries is None else lax.div(mine + 1, jnp.int32(plan.entries.every))
            for g in range(plan.group):
                q.append(q_g[row, i, head * plan.group + g])
                limits.append(jnp.where(mine >= 0, limit, 0))
                positions.append(mine)
        pad = plan.blocks * plan.kept - len(q)
        stacked = [jnp.stack(x + x[-1:] * pad) for x in (q, limits, positions)]
        return [lax.dynamic_slice_in_dim(x, block * plan.kept, plan.kept) for x in stacked]

    def values(self, stream: Pages, ref, scale, zero):
        """[tokens, H] but for scales of tokens; what those scale is the code, less its zero point."""
        x, bits = ref[...], stream.bits
        if bits < 8:
            x = unpacked(x, bits)
        x = x.astype(jnp.int32) if stream.code == "int8" else x
        if stream.code == "codebook4":
            return sum(jnp.where(x == i, jnp.float32(c), 0) for i, c in enumerate(centroids(4)))
        x = x.astype(jnp.float32)
        if stream.zero is None:
            return x if stream.code not in FEW_BITS else self.scaled(stream, x - self.plan.shift, scale)
        zero = self.wide(stream, zero)
        if stream.zero == "least":
            zero = -zero / self.wide(stream, scale)
        return self.scaled(stream, x - zero, scale)

    def scaled(self, stream: Pages, x, scale):
        return x if stream.by_token else x * self.wide(stream, scale)

    def wide(self, stream: Pages, ref):
        """Of scales or zero points: by number, float32[tokens, H], or by token where there is one a token."""
        count, h = stream.scales(self.piece, self.plan.head_dim), self.plan.head_dim
        found = jnp.concatenate([ref[j, :count] for j in range(self.per)]).astype(jnp.float32)
        if stream.span is not None:
            return jnp.repeat(found.reshape(-1, h), stream.span, axis=0)
        found = found.reshape(self.plan.tiles.tokens, -1)
        return found if stream.by_token else jnp.repeat(found, h // found.shape[1], axis=1)

    def row(self, ref):
        return jnp.concatenate([ref[j, : self.piece] for j in range(self.per)]).astype(jnp.float32)[None]

    def tile(self, buffers, q_s, asked, state, token, length, slot, step):
        plan = self.plan
        plgpu.barrier_wait(self.full.at[slot])
        k_s, v_s, *small = buffers
        (q, limits, positions), (top, total, out) = asked, state
        at, own = token + jnp.arange(plan.tiles.tokens), True
        if plan.entries is not None:
            at, kv_head = located(plan.entries, at)
            own = kv_head[None] == (jnp.arange(plan.kept) % plan.group // (plan.group // plan.entries.heads))[:, None]
        small = dict(zip(plan.small, small, strict=True))
        k, v = (
            self.values(stream, ref, small.get(f"{n}_scale"), small.get(f"{n}_zero"))
            for n, stream, ref in (("k", plan.k, k_s), ("v", plan.v, v_s))
        )
        v = jnp.where(at[:, None] < length, v, 0)
        logits = jnp.dot(q.astype(jnp.float32), k.T) * plan.scale
        for name in ("k_scale", "logit_scale"):
            logits = logits * self.row(small[name]) if name in small and self.each(name) else logits
        if plan.softcap is not None:
            logits = plan.softcap * jnp.tanh(logits / plan.softcap)
        seen = (at[None] >= 0) & (at[None] < limits[:, None]) & own
        if plan.mask.window is not None:
            key = self.row(small["position"])
            seen = seen & ((key >= plan.mask.oldest(positions)[:, None]) | (key < plan.mask.sinks))
        logits = jnp.where(seen, logits * LOG2E, -jnp.inf)
        new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        p, alpha = jnp.exp2(logits - base), jnp.exp2(top - base)
        total = total * alpha + jnp.sum(p, axis=1, keepdims=True)
        p = jnp.where(seen, p * self.row(small["v_scale"]), 0) if "v_scale" in small and self.each("v_scale") else p
        plgpu.barrier_arrive(self.free.at[slot])
        return new, total, out * alpha + jnp.dot(p.astype(plan.dtype).astype(jnp.float32), v)

    def each(self, name: str) -> bool:
        """Whether there is one a token."""
        return name == "logit_scale" or (self.plan.k if name[0] == "k" else self.plan.v).by_token

    def finish(self, state, sum_s, top_s, results, part, where, whole):
        (top, total, out), (parts_g, marks_g) = state, results
        parts_g[part] = out
        marks_g[part, 0] = top[:, 0]
        marks_g[part, 1] = total[:, 0]


# --- What a warp does -------------------------------------------------------------------------------------------------
#
# Written in the registers of a thread. Of a warp's 16 query rows by 8 tokens (or head dims) an accumulator of mma.m16n8k16
# gives thread 4 g + c rows g, g + 8 and columns 2 c, 2 c + 1. Which numbers of the head dim a product of 16 takes, and in
# which order the columns of the output come, is free: a thread reads contiguous bytes of a token, and the queries follow.


def _exp2(x):
    return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=x.type)


def _below(a, b):
    """0 <= a < b for b >= 0."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _finite_base(top):
    """The maximum, or 0 where nothing has been seen."""
    return _choose(arith.cmpf(arith.CmpFPredicate.OEQ, top, _f32(-math.inf)), _f32(0.0), top)


def _capped(plan, x):
    """A logit (in powers of 2) under the softcap c: c tanh(x / c) = c - 2 c / (1 + exp(2 x / c))."""
    if plan.softcap is None:
        return x
    cap = plan.softcap * LOG2E
    grown = arith.addf(_exp2(arith.mulf(x, _f32(2 / plan.softcap))), _f32(1.0))
    inverse = utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", grown, result_types=x.type)
    return _fma(inverse, _f32(-2 * cap), _f32(cap))


def _array(registers, dtype):
    """Values of a thread as an array of one number a thread and value."""
    vec = ir.VectorType.get((1,), registers[0].type)
    packed = np.array([vector.broadcast(vec, r) for r in registers], dtype=object)
    layout = fragmented.WGStridedFragLayout((128 * len(registers),), 1)
    signed = True if jnp.issubdtype(dtype, jnp.integer) else None
    return fragmented.FragmentedArray(_registers=packed, _layout=layout, _is_signed=signed)


def _values(array):
    return [vector.extract(r, [], [0]) for r in array.registers]


def _threadwise(count: int, dtype):
    return plgpu.ShapeDtypeStruct((128 * count,), dtype, _threadwise_layout(count))


def _threadwise_layout(count: int):
    return plgpu.Layout.WG_STRIDED((128 * count,), vec_size=1)


class _Warps:
    """One tile by a warpgroup: warps share out the tokens, or (rows > 16) the query rows."""

    def __init__(self, plan, per, piece, barriers):
        self.plan, self.per, self.piece, self.barriers = plan, per, piece, barriers
        self.row_warps = plan.row_warps
        self.token_warps = 4 // self.row_warps
        self.mine = plan.tiles.tokens // self.token_warps  # tokens of a warp
        self.itemsize, self.bits, self.codes = plan.itemsize, plan.k.bits, Codes(plan.k)
        self.transforms = _tiling(plan.wide, self.itemsize)
        size = plan.wide * self.itemsize
        self.swizzle = min(128, size) if self.transforms else size  # bytes of a row of an SMEM tile
        self.columns = size // self.swizzle
        self.numbers = plan.head_dim // self.columns  # of a row of an SMEM tile
        self.outs = plan.head_dim // 8  # accumulators of the output
        self.halves = 1 if plan.kept <= 8 else 2  # of the 16 rows: of few, rows g + 8 are nobody's
        self.state = 4 * self.outs + 3 * self.halves  # and rows' maxima, sums, sums of what middle codes stand for
        self.staged = plan.staged > 128  # q waits in SMEM: it would not fit in registers
        # Words of q; rows' limits, positions, sums of q.
        self.asked = 3 * self.halves + (0 if self.staged else plan.head_dim // 4)
        self.kind = "f16" if plan.dtype == "float16" else "bf16"

    # Thread and places

    def thread(self):
        thread = _and(utils.thread_idx(), 127)
        lane = _and(thread, 31)
        self.warp, self.g, self.c = _right(thread, 5), _right(lane, 2), _and(lane, 3)
        row_warp = arith.remui(self.warp, _i32(self.row_warps))
        self.first_row = _times(row_warp, TILE)
        self.token_warp = arith.divui(self.warp, _i32(self.row_warps))
        self.first = _times(self.token_warp, self.mine)  # first token

    def rows(self):
        return [_add(self.first_row, _add(self.g, 8 * r)) for r in range(2)]

    def places(self, token):
        """Slots of the thread's tokens of a tile that begins at `token`."""
        at = _add(_add(token, self.first), _times(self.c, 2))
        return [[_add(at, 8 * j + e) for e in range(2)] for j in range(self.mine // 8)]

    def located(self, places):
        """What masks compare with rows' limits, and whether a row's kv head is that of the slot; as `located`."""
        entries = self.plan.entries
        if entries is None:
            return places, None
        each, heads = (x.bit_length() - 1 for x in (entries.each, entries.heads))
        member = [arith.remui(row, _i32(self.plan.group)) for row in self.rows()]
        mine = [arith.divui(x, _i32(self.plan.group // entries.heads)) for x in member]

        def of(at):
            entry = _or(arith.shli(_right(at, each + heads), _i32(each)), _and(at, entries.each - 1))
            return _choose(_less(entry, _i32(entries.first)), _i32(NONE), entry) if entries.first else entry

        def own(at):
            head = _and(_right(at, each), entries.heads - 1)
            return [arith.cmpi(arith.CmpIPredicate.eq, head, row) for row in mine]

        return [[of(at) for at in pair] for pair in places], [[own(at) for at in pair] for pair in places]

    def swizzled(self, row, byte):
        """Offset of byte `byte` of row `row` (0 to 7) in an SMEM tile of 8 rows."""
        at = _add(_times(row, self.swizzle), byte)
        if not self.transforms:
            return at
        mask = self.swizzle // 16 - 1
        return arith.xori(at, arith.shli(_and(_right(at, 7), mask), _i32(4)))

    def read(self, ref, base, row, shares: int, part):
        """Words of a thread's share of a token's row: a `shares`-th of each SMEM tile of the row, or of each plane of codes.

        base: offset (i32) of the 8 tokens."""
        i32 = ir.IntegerType.get_signless(32)
        if not self.transforms:
            return self.read_planes(ref, _add(base, _times(row, self.swizzle)), shares, part)
        words, share = [], self.swizzle // shares
        size = min(share, 16)
        for chunk in range(share // size):
            at = _add(base, self.swizzled(row, _add(_times(part, share), chunk * size)))
            for column in range(self.columns):
                words.append((column, chunk, _load(ref, _add(at, column * 8 * self.swizzle), i32, size // 4)))
        return [w for _, _, ws in sorted(words, key=lambda x: x[:2]) for w in ws]

    def read_planes(self, ref, row, shares: int, part):
        """Two bits of each code, then the third. Of few numbers that is half a word."""
        i32, words = ir.IntegerType.get_signless(32), []
        for first, bits in ((0, 2), (self.plan.head_dim // 4, 1)):
            size = self.plan.head_dim * bits // 8 // shares
            element = ir.IntegerType.get_signless(8 * min(size, 4))
            found = _load(ref, _add(_add(row, first), _times(part, size)), element, max(1, size // 4))
            words += [x if element == i32 else arith.extui(i32, x) for x in found]
        return words

    def small_numbers(self, ref, dtype, j):
        """Numbers of the thread's two tokens of tokens 8 j .. 8 j + 7, as float32 or i32."""
        itemsize = jnp.dtype(dtype).itemsize
        pitch = max(self.piece * itemsize, 128)
        at = _add(self.first, 8 * j)
        page = _right(at, self.piece.bit_length() - 1)
        at = _add(_and(at, self.piece - 1), _times(self.c, 2))
        element = utils.dtype_to_ir_type(jnp.dtype(dtype))
        found = _load(ref, _add(_times(page, pitch), _times(at, itemsize)), element, 2)
        f32 = ir.F32Type.get()
        if jnp.dtype(dtype) == jnp.int32 or element == f32:
            return found
        if jnp.issubdtype(jnp.dtype(dtype), jnp.integer):
            return [arith.uitofp(f32, x) for x in found]
        return [arith.extf(f32, x) for x in found]

    # Scales of groups of numbers and of channels, as words of two bfloat16 that numbers are made with

    def place(self, name, token, at):
        """Byte of number `at` (i32) of those that belong to token `token` (i32) of the step, in `name` of `small`."""
        plan, itemsize = self.plan, jnp.dtype(self.plan.small_dtype(name)).itemsize
        pitch = max(plan.numbers(name, self.piece) * itemsize, 128)
        page = _times(_right(token, self.piece.bit_length() - 1), pitch)
        return _add(page, _times(at, itemsize))

    def of_group(self, name: str, refs, tokens, part, shares: int, real=None):
        """(what codes are less, scale, number of the middle code or None) for each group in part `part` of `shares` of the
        numbers of one token, or of two, one in each half; real: whether they are tokens of the row."""
        plan, stream = self.plan, getattr(self.plan, name)
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        groups, share = plan.head_dim // (stream.group or plan.head_dim), plan.head_dim // shares
        first = arith.divui(_times(part, share), _i32(plan.head_dim // groups))
        inside = [_add(_times(_and(token, self.piece - 1), groups), first) for token in tokens]

        def load(what, i):
            ref, element = refs[what], utils.dtype_to_ir_type(jnp.dtype(plan.small_dtype(what)))
            at = [self.place(what, token, _add(x, i)) for token, x in zip(tokens, inside, strict=True)]
            return [_load(ref, x, element)[0] for x in at]

        def numbers(what, i):
            found = [x if x.type == f32 else arith.extf(f32, x) for x in load(what, i)]
            return found if real is None else [_choose(r, x, _f32(0.0)) for r, x in zip(real, found, strict=True)]

        def away(i):
            if stream.zero != "code":
                return self.codes.middle
            low, *high = (arith.extui(i32, x) for x in load(f"{name}_zero", i))
            high = arith.shli(high[0] if high else low, _i32(16))
            return _add(_or(low, high), 0x43004300)

        found = []
        for i in range(max(1, share * groups // plan.head_dim)):
            scale, middle = numbers(f"{name}_scale", i), None
            if stream.zero == "least":
                middle = self.codes.middles(scale, numbers(f"{name}_zero", i))
            found.append((away(i), _rounded(scale[0], scale[-1]), middle))
        return found

    def of_channels(self, refs, token):
        """The same for each pair of `key_operands` of the thread's share of numbers, from the scales that `token` shares."""
        plan, i32 = self.plan, ir.IntegerType.get_signless(32)
        share = plan.head_dim // 4
        span = arith.divui(_and(token, self.piece - 1), _i32(plan.k.span))

        def pairs(what):
            at = self.place(what, token, _add(_times(span, plan.head_dim), _times(self.c, share)))
            found = [w for i in range(0, share * 2, 16) for w in _load(refs[what], _add(at, i), i32, 4)]
            return [_halves_of_f16(w) for w in found]

        scales = pairs("k_scale")
        middles = [self.codes.middles(*both) for both in zip(scales, pairs("k_zero"), strict=True)]
        words = (self.query_operands(x) for x in ([_rounded(*x) for x in scales], middles))
        return [(self.codes.middle, *both) for both in zip(*words, strict=True)]

    # Codes to 16-bit numbers

    def bf16_of_bytes(self, word, high: bool):
        """Bytes (0, 1), or (2, 3) where `high`, of a word -> two bfloat16."""
        if self.plan.format == "int8":  # 128 + the low 7 bits, less 128 or, where bit 7 is set, 256
            code = _permute(word, self.magic, 0x4342 if high else 0x4140)
            return _pair("sub", _and(code, 0xFF7FFF7F), _and(code, 0xFF80FF80))
        # e4m3 shifted into place is 2^-120 of the number
        code = _permute(word, word, 0x3727 if high else 0x1505)
        bits = _or(_and(code, 0x80008000), _and(_right(code, 4), 0x07F007F0))
        return _pair("mul", bits, _i32(0x7B807B80))

    def signed(self, word):
        """Asymmetric int8 as signed bytes."""
        return arith.xori(word, _i32(0x80808080)) if self.plan.format == "int8" and self.plan.k.zero else word

    def key_operands(self, words, steps=None):
        """Words of a token's share -> second operands, two a product of 16; steps: of groups, or of each pair."""
        if self.plan.format == "dense":
            return words
        if self.plan.format == "codebook4":
            return [pair for w in words for pair in self.codes.looked_up(w)]
        if self.bits < 8:
            pairs = [pair for found in self.codes.pairs(words) for pair in found]
            return (
                pairs
                if steps is None
                else [self.codes.number(x, y) for x, y in zip(pairs, _spread(steps, pairs), strict=True)]
            )
        return [self.bf16_of_bytes(self.signed(w), high) for w in words for high in (False, True)]

    def query_operands(self, words):
        """Words (pairs) of a query's share in the order of `key_operands`."""
        if self.bits > 4 or self.plan.format == "codebook4":
            return words
        found, half = [], 8 // self.codes.plane
        for i in range(0, len(words), 2 * half):
            for a in range(half):
                found += [_permute(words[i + a], words[i + a + half], s) for s in PERMUTES.values()]
        return found

    def fresh(self, word):
        """The same word by way of a shuffle: else the assembler keeps q as it was loaded and moves it for each product."""
        lane = _add(_times(self.g, 4), self.c)
        ptx = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return utils.inline_ptx(ptx, word, lane, result_types=word.type, has_side_effects=True, convergent=True)

    def value_operands(self, one, two, steps=None):
        """Words of two tokens' shares -> a word of both for each head dim; steps: of groups."""
        found = self.codes.beside(one, two) if self.plan.format in FEW_BITS else []
        for a, b in () if found else zip(one, two, strict=True):
            if self.plan.format == "dense":
                found += [_permute(a, b, s) for s in PERMUTES.values()]
            elif self.plan.format == "codebook4":
                pairs = zip(self.codes.looked_up(a), self.codes.looked_up(b), strict=True)
                found += [_permute(*pair, s) for pair in pairs for s in PERMUTES.values()]
            else:
                a, b = self.signed(a), self.signed(b)
                for selector in (0x5140, 0x7362):
                    both = _permute(a, b, selector)
                    found += [self.bf16_of_bytes(both, high) for high in (False, True)]
        if self.plan.format not in FEW_BITS:
            return found
        if steps is None:
            middle = self.codes.middle
            return [_pair("sub", x, middle) for x in found]
        return [self.codes.number(x, y) for x, y in zip(found, _spread(steps, found), strict=True)]

    def multiply(self, acc, a, b):
        f32 = ir.F32Type.get()
        ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{self.kind}.{self.kind}.f32 "
        ptx += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        return list(utils.inline_ptx(ptx, *a, *b, *acc, result_types=[f32] * 4))

    def across(self, x, op):
        """Reduction over the four threads of a row."""
        for distance in (1, 2):
            x = op(x, utils.shfl_bfly(x, distance))
        return x

    # Copies and their barriers: a lane alone arrives, where Pallas has every thread arrive for every copy.

    def begin(self):
        """Makes the barriers: one arrival fills a slot, each warp's frees it."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=())
        def make(_, barriers):
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), _i32(0))
            slots = self.plan.tiles.wgs * self.plan.tiles.stages
            for i in range(2 * slots):
                ptx = f"mbarrier.init.shared::cta.b64 [$0], {1 if i < slots else 4};"
                utils.inline_ptx(ptx, _pointer(barriers, _i32(8 * i)), predicate=first, has_side_effects=True)
            utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
            utils.inline_ptx("bar.sync 0;", has_side_effects=True, convergent=True)
            return ()

        make(self.barriers)

    def barrier(self, barriers, slot, *, free: bool):
        slots = self.plan.tiles.wgs * self.plan.tiles.stages
        pointer = _pointer(barriers, _times(_add(slot, slots if free else 0), 8))
        return utils.BarrierRef(pointer, _i32(0), None, 1)

    def parity(self, step, turns: int):
        """How often a slot has been used before, odd or even."""
        use = _add(arith.divui(step, _i32(self.plan.tiles.stages)), turns)
        return arith.trunci(ir.IntegerType.get_signless(1), _and(use, 1))

    def copy(self, sources, to, pages, head, inside, slot, step, left=None):
        """One lane waits for room and starts the copies of a step; left: tokens from its first to the end of the listing, past
        which nothing is copied but what the last `GRAIN` tokens hold (None: all are)."""
        plan, tokens = self.plan, self.plan.tiles.tokens
        blocks = plgpu.RefType(self.transforms)
        count = 1 if plan.keys_only else 2
        token_bytes = count * plan.wide * self.itemsize
        sizes = zip(plan.small, plan.small_dtypes, strict=True)
        fixed = sum(plan.numbers(name, tokens) * jnp.dtype(x).itemsize for name, x in sizes)
        cut = left is not None and bool(self.transforms) and plan.entries is None

        @plgpu.inline_mgpu(
            arg_types=(
                [plgpu.RefType()] * len(sources),
                [*[blocks] * count, *[plgpu.RefType()] * len(plan.small)],
                plgpu.RefType(),
                [scalar()] * (4 + self.per + cut),
            ),
            return_type=(),
        )
        def start(context, sources, to, barriers, scalars):
            head, inside, slot, step, *pages = (x.registers.item() for x in scalars)
            index = lambda x: arith.index_cast(ir.IndexType.get(), x)  # noqa: E731
            real, size = [None] * self.per, _i32(tokens * token_bytes + fixed)
            if cut:
                left = pages.pop()
                real = [self.copied(_add(left, -j * self.piece)) for j in range(self.per)]
                size = _add(_times(functools.reduce(arith.addi, real), token_bytes), fixed)
            again = arith.cmpi(arith.CmpIPredicate.sge, step, _i32(plan.tiles.stages))
            with utils.when(again):
                self.barrier(barriers, slot, free=True).wait_parity(self.parity(step, 1))
            full = self.barrier(barriers, slot, free=False)
            lane = arith.cmpi(arith.CmpIPredicate.eq, _and(utils.thread_idx(), 31), _i32(0))
            full.arrive_expect_tx(size, predicate=lane)
            copy = functools.partial(context.async_copy, barrier=full, arrive=False)
            tiling = launch_context.TileTransform((8, self.swizzle // self.itemsize))
            kwargs = {"gmem_transform": (tiling,), "swizzle": self.swizzle} if self.transforms else {}

            def pages_part(at, j, first, number, predicate):
                """`number` tokens from `first` on of page j of the step."""
                for source, target in zip(sources[:count], to[:count], strict=True):
                    rows = j * self.piece + first
                    rows, groups = (rows // 8, number // 8) if self.transforms else (rows, number)
                    target = utils.memref_slice(target, (index(slot), utils.DynamicSlice(rows, groups)))
                    tokens = utils.DynamicSlice(index(_add(inside, first) if first else inside), number)
                    copy(src_ref=source, dst_ref=target, gmem_slice=(*at, tokens), predicate=predicate, **kwargs)

            for j, page in enumerate(pages):
                at = (index(page), index(head))
                if real[j] is None:
                    pages_part(at, j, 0, self.piece, lane)
                else:
                    whole = arith.cmpi(arith.CmpIPredicate.eq, real[j], _i32(self.piece))
                    pages_part(at, j, 0, self.piece, arith.andi(lane, whole))
                    with utils.when(_less(real[j], _i32(self.piece))):
                        for first in range(0, self.piece - GRAIN, GRAIN):
                            pages_part(at, j, first, GRAIN, arith.andi(lane, _less(_i32(first), real[j])))
                for n, (source, target) in enumerate(zip(sources[count:], to[count:], strict=True)):
                    name = plan.small[n]
                    at = (index(page),) if name == "position" else (index(page), index(head))
                    numbers = plan.numbers(name, self.piece)
                    first = inside
                    if numbers != self.piece:
                        first = _times(arith.divui(inside, _i32(self.piece)), numbers)
                    for start in range(0, numbers, BOX):
                        stop = min(start + BOX, numbers)
                        part = utils.memref_slice(target, (index(slot), j, slice(start, stop)))
                        box = utils.DynamicSlice(index(_add(first, start) if start else first), stop - start)
                        copy(src_ref=source, dst_ref=part, gmem_slice=(*at, box), predicate=lane)
            return ()

        scalars = [head, inside, slot, step, *pages]
        start(list(sources), list(to), self.barriers, [*scalars, left] if cut else scalars)

    def copied(self, left):
        """Tokens of a page's part that are copied, where `left` are real: whole grains."""
        some = arith.maxsi(_i32(0), arith.minsi(left, _i32(self.piece)))
        return _and(_add(some, GRAIN - 1), -GRAIN)

    # The steps

    def empty(self):
        @plgpu.inline_mgpu(return_type=_threadwise(self.state, jnp.float32))
        def make(_):
            n = self.halves
            values = [_f32(0.0)] * (4 * self.outs) + [_f32(-math.inf)] * n + [_f32(0.0)] * (2 * n)
            return _array(values, jnp.float32)

        return make()

    def ask(self, q_g, q_s, qpos_g, row, head, block, length, limits_g=(), listed=None):
        """Of the thread's query rows: their share of q, how many slots they see, their position, the sum of q.

        limits_g: that number by listing and query, where it is not what causality gives."""
        plan = self.plan
        refs = (plgpu.RefType(),) * (3 + len(limits_g))
        count = 5 if limits_g else 4

        @plgpu.inline_mgpu(arg_types=(*refs, *(scalar(),) * count), return_type=_threadwise(self.asked, jnp.int32))
        def make(_, q, staged, qpos, *rest):
            row, head, block, length, *listed = (x.registers.item() for x in rest[len(limits_g) :])
            self.thread()
            if self.staged:
                utils.warpgroup_barrier()  # the unit before has been read, by all warps
            i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
            words, limits, positions, sums = [], [], [], []
            share = self.numbers // 4
            for local in self.rows():
                at = arith.minui(_add(local, _times(block, plan.kept)), _i32(plan.rows - 1))
                query, member = arith.divui(at, _i32(plan.group)), arith.remui(at, _i32(plan.group))
                at = _add(_times(_add(_times(row, plan.queries), query), plan.heads), _times(head, plan.group))
                at = _add(_times(_add(at, member), self.columns), 0)
                mine = []
                for column in range(self.columns):
                    byte = _times(_add(_times(_add(at, column), 4), self.c), 2 * share)
                    for chunk in range(2 * share // 16):
                        mine += _load(q, _add(byte, 16 * chunk), i32, 4)
                words.append([self.fresh(w) for w in self.query_operands(mine)])
                if len(words) > self.halves:
                    continue
                base = _times(row, plan.queries * 4)
                asked = [_load(qpos, _add(base, 4 * i), i32)[0] for i in range(plan.queries)]
                own = asked[0]
                for i in range(1, plan.queries):
                    own = _choose(arith.cmpi(arith.CmpIPredicate.eq, query, _i32(i)), asked[i], own)
                limit = length
                if plan.entries is not None:
                    limit = _right(_add(own, 1), plan.entries.every.bit_length() - 1)
                elif limits_g:
                    at = _add(_times(listed[0], plan.queries), query)
                    [limit] = _load(rest[0], _times(at, 4), i32)
                elif plan.mask.causal:
                    for other in asked if plan.queries > 1 else ():
                        limit = arith.subi(limit, arith.extui(i32, _less(own, other)))
                limits.append(_choose(_less(own, _i32(0)), _i32(0), limit))
                positions.append(self.reach(own))
                total = _f32(0.0)
                if plan.k.by_token and (plan.k.zero or plan.format in FEW_BITS):
                    for word in mine:
                        for half in (arith.shli(word, _i32(16)), _and(word, 0xFFFF0000)):
                            total = arith.addf(total, utils.bitcast(half, f32))
                    total = self.across(total, arith.addf)
                sums.append(utils.bitcast(total, i32))
            if self.staged:
                for s in range(plan.head_dim // 16):
                    _store(staged, self.staged_at(s), [utils.bitcast(w, f32) for w in self.left(words, s)])
                words = [[], []]
            return _array([*words[0], *words[1], *limits, *positions, *sums], jnp.int32)

        return make(q_g, q_s, qpos_g, *limits_g, row, head, block, length, *([listed] if limits_g else []))

    def reach(self, position):
        """The query's position, or one from which a window of that length begins where its own does, on the border of a block."""
        mask = self.plan.mask
        if mask.window is None or mask.block == 1 or mask.lag is not None:
            return position
        first = _times(arith.divsi(_add(position, 1 - mask.window), _i32(mask.block)), mask.block)
        return _add(first, mask.window - 1)

    def left(self, words, s):
        """First operand of product s of q k^T, from the words of the thread's two rows."""
        return [words[0][2 * s], words[1][2 * s], words[0][2 * s + 1], words[1][2 * s + 1]]

    def staged_at(self, s):
        lane = _add(_times(self.g, 4), self.c)
        return _add(_times(_add(_right(self.first_row, 4), s * self.row_warps), 512), _times(lane, 16))

    def tile(self, buffers, q_s, asked, state, token, length, slot, step):
        plan = self.plan
        ref = plgpu.RefType(self.transforms)

        @plgpu.inline_mgpu(
            arg_types=(
                [ref, ref, *[plgpu.RefType()] * len(plan.small)],
                plgpu.RefType(),
                plgpu.RefType(),
                _threadwise_layout(self.asked),
                _threadwise_layout(self.state),
                [scalar()] * 4,
            ),
            return_type=_threadwise(self.state, jnp.float32),
        )
        def make(_, buffers, barriers, staged, asked, state, scalars):
            self.thread()
            k, v, *small = buffers
            token, length, slot, step = (x.registers.item() for x in scalars)
            if plan.format == "int8":  # an instruction takes one constant, the selector: this must not look like one
                self.magic = arith.xori(_i32(0x43434343), arith.shrsi(step, _i32(31)))  # steps are counted from 0
            self.barrier(barriers, slot, free=False).wait_parity(self.parity(step, 0))
            state = _values(state)
            q, limits, positions, sums = self.answers(_values(asked), staged)
            outs = [state[4 * i : 4 * i + 4] for i in range(self.outs)]
            top, total, zeros = self.of_rows(state[4 * self.outs :])
            small = dict(zip(plan.small, small, strict=True))
            numbers = self.by_token(small)
            places, own = self.located(self.places(token))
            logits = self.logits(k, q, sums, small)
            self.mask_(logits, numbers, places, limits, positions, sums, own)
            ahead = self.value_pairs(v, 0, places, length, small) if self.bits <= 4 and not self.staged else None
            outs, top, total, zeros = self.rebased(logits, outs, top, total, zeros)
            p, total, zeros = self.softmax(logits, numbers, places, length, top, total, zeros)
            outs = self.values(v, p, outs, places, length, small, ahead)
            self.release(barriers, slot)
            return _array([x for out in outs for x in out] + top + total + zeros, jnp.float32)

        return make(buffers, self.barriers, q_s, asked, state, [token, length, slot, step])

    def of_rows(self, values):
        """Three numbers of each of the thread's rows."""
        return [values[self.halves * i : self.halves * (i + 1)] for i in range(3)]

    def heights(self, lse_g, row, head):
        """What the exponents of a thread's rows are taken against; infinite where a row counts for nothing."""
        plan = self.plan

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), scalar(), scalar()), return_type=_threadwise(self.halves, jnp.float32)
        )
        def make(_, lse, row, head):
            row, head, f32 = row.registers.item(), head.registers.item(), ir.F32Type.get()
            self.thread()
            found = []
            for local in self.rows()[: self.halves]:
                at = arith.minui(local, _i32(plan.rows - 1))
                query, member = arith.divui(at, _i32(plan.group)), arith.remui(at, _i32(plan.group))
                place = _add(_times(_add(_times(row, plan.queries), query), plan.heads), _times(head, plan.group))
                [value] = _load(lse, _times(_add(place, member), 4), f32)
                some = arith.cmpf(arith.CmpFPredicate.OGT, value, _f32(-math.inf))
                some = arith.andi(some, _less(local, _i32(plan.rows)))
                found.append(_choose(some, arith.mulf(value, _f32(LOG2E)), _f32(math.inf)))
            return _array(found, jnp.float32)

        return make(lse_g, row, head)

    def mass(self, buffers, q_s, asked, heights, scores_g, row, head, token, slot, step):
        """The attention mass of a tile's tokens, summed over rows; zeros where `buffers` is None."""
        plan, refs = self.plan, [self.barriers, q_s, scores_g]
        blocks = [] if buffers is None else [plgpu.RefType(self.transforms)]
        blocks += [plgpu.RefType()] * (len(plan.small) if blocks else 0)

        @plgpu.inline_mgpu(
            arg_types=(
                blocks,
                [plgpu.RefType()] * 3,
                _threadwise_layout(self.asked),
                _threadwise_layout(self.halves),
                [scalar()] * 5,
            ),
            return_type=(),
        )
        def make(_, buffers, refs, asked, heights, scalars):
            self.thread()
            barriers, staged, scores = refs
            row, head, token, slot, step = (x.registers.item() for x in scalars)
            count = self.mine // 8
            sums = [[_f32(0.0)] * 2 for _ in range(count)]
            places = self.places(token)
            if buffers:
                if plan.format == "int8":
                    self.magic = arith.xori(_i32(0x43434343), arith.shrsi(token, _i32(31)))
                self.barrier(barriers, slot, free=False).wait_parity(self.parity(step, 0))
                k, *small = buffers
                small = dict(zip(plan.small, small, strict=True))
                numbers = self.by_token(small)
                q, limits, positions, q_sums = self.answers(_values(asked), staged)
                logits = self.logits(k, q, q_sums, small)
                at, own = self.located(places)
                self.mask_(logits, numbers, at, limits, positions, q_sums, own)
                self.release(barriers, slot)
                heights = _values(heights)
                for j, tile in enumerate(logits):
                    for e in range(2):
                        p = [_exp2(arith.subf(tile[2 * r + e], height)) for r, height in enumerate(heights)]
                        sums[j][e] = functools.reduce(arith.addf, p)
                        for distance in (4, 8, 16):
                            sums[j][e] = arith.addf(sums[j][e], utils.shfl_bfly(sums[j][e], distance))
            leads = arith.cmpi(arith.CmpIPredicate.eq, self.g, _i32(0))
            slots = plan.slots
            for j in range(count):
                for e in range(2):
                    at = _times(_add(_times(_add(_times(row, slots), places[j][e]), plan.kv_heads), head), 4)
                    when = arith.andi(leads, _less(places[j][e], _i32(slots)))
                    _store(scores, at, [sums[j][e]], when)
            return ()

        make([] if buffers is None else buffers, refs, asked, heights, [row, head, token, slot, step])

    def answers(self, asked, staged):
        """What `ask` found: operands of q by product, rows' limits, positions and sums of q."""
        count = 0 if self.staged else self.plan.head_dim // 8
        words = [asked[:count], asked[count : 2 * count]]
        limits, positions, sums = self.of_rows(asked[2 * count :])
        i32 = ir.IntegerType.get_signless(32)
        q = [
            _load(staged, self.staged_at(s), i32, 4) if self.staged else self.left(words, s)
            for s in range(self.plan.head_dim // 16)
        ]
        return q, limits, positions, [utils.bitcast(x, ir.F32Type.get()) for x in sums]

    def release(self, barriers, slot):
        """The warp has read a slot."""
        utils.warp_barrier()
        lane = arith.cmpi(arith.CmpIPredicate.eq, _and(utils.thread_idx(), 31), _i32(0))
        self.barrier(barriers, slot, free=True).arrive(predicate=lane)

    def group(self, j):
        """Offset of tokens 8 j .. of the warp."""
        pitch = self.columns * 8 * self.swizzle
        return _add(_times(_right(self.first, 3), pitch), j * pitch)

    def by_token(self, small) -> dict[str, list]:
        """`small_numbers` of the warp's tokens, of what there is one a token of."""
        streams = {"k": self.plan.k, "v": self.plan.v}
        found = {
            name: [self.small_numbers(ref, self.plan.small_dtype(name), j) for j in range(self.mine // 8)]
            for name, ref in small.items()
            if name[:2] not in ("k_", "v_") or streams[name[0]].by_token
        }
        for x, stream in streams.items():
            if stream.by_token and f"{x}_zero" in found:
                both = zip(found.pop(f"{x}_zero"), found[f"{x}_scale"], strict=True)
                found[f"{x}_middle"] = [
                    [self.middle(stream, *each) for each in zip(*pair, strict=True)] for pair in both
                ]
        return found

    def middle(self, stream: Pages, zero, scale):
        """What the code stands for that is multiplied as 0."""
        shift = _f32(self.plan.shift)
        return _fma(shift, scale, zero) if stream.zero == "least" else arith.mulf(arith.subf(shift, zero), scale)

    def key_steps(self, j: int, small, before):
        """What makes numbers of the codes of keys 8 j .. 8 j + 7; before: of the last eight."""
        stream, token = self.plan.k, _add(self.first, 8 * j)
        if stream.by_token:
            return None
        if stream.span is None:
            return self.of_group("k", small, [_add(token, self.g)], self.c, 4)
        return before if 8 * j % stream.span else self.of_channels(small, token)

    def logits(self, k, q, sums, small):
        """q k^T, of codes with a scale a token q (k - middle)^T: [tokens / 8][4] float32."""
        found, steps = [], None
        start = [_f32(0.0)] * 4
        if self.plan.k.by_token and self.plan.format in FEW_BITS:  # keys are code + 128
            start = [arith.mulf(sums[r], _f32(-128.0 - self.plan.shift)) for r in (0, 0, -1, -1)]
        for j in range(self.mine // 8):
            steps = self.key_steps(j, small, steps)
            b = self.key_operands(self.read(k, self.group(j), self.g, 4, self.c), steps)
            chains = [start, [_f32(0.0)] * 4]  # two products wait for nothing but each other's loads
            for s in range(self.plan.head_dim // 16):
                chains[s % 2] = self.multiply(chains[s % 2], q[s], b[2 * s : 2 * s + 2])
            found.append([arith.addf(x, y) for x, y in zip(*chains, strict=True)])
        return found

    def mask_(self, logits, numbers, places, limits, positions, sums, own=None):
        """Scales logits (in powers of 2), and sets those that a row does not see to -inf, in place. own: of `located`."""
        plan = self.plan
        sums = [arith.mulf(x, _f32(plan.scale * LOG2E)) for x in sums]
        for j, tile in enumerate(logits):
            for e in range(2):
                factor, middle = _f32(plan.scale * LOG2E), numbers["k_middle"][j][e] if "k_middle" in numbers else None
                for name in ("k_scale", "logit_scale"):
                    factor = arith.mulf(factor, numbers[name][j][e]) if name in numbers else factor
                if middle is not None and "logit_scale" in numbers:
                    middle = arith.mulf(middle, numbers["logit_scale"][j][e])
                for r in range(self.halves):
                    x = tile[2 * r + e]
                    x = arith.mulf(x, factor) if middle is None else _fma(x, factor, arith.mulf(sums[r], middle))
                    x = _capped(plan, x)
                    seen = _below(places[j][e], limits[r]) if plan.mask.apart else _less(places[j][e], limits[r])
                    if plan.mask.window is not None:
                        key = numbers["position"][j][e]
                        near = _less(_add(positions[r], -plan.mask.window), key)
                        if plan.mask.sinks:
                            near = arith.ori(near, _less(key, _i32(plan.mask.sinks)))
                        seen = arith.andi(seen, near)
                    seen = seen if own is None else arith.andi(seen, own[j][e][r])
                    tile[2 * r + e] = _choose(seen, x, _f32(-math.inf))

    def rebased(self, logits, outs, top, total, zeros):
        """The state as it is, most often; multiplied anew where a logit exceeds what exponents are taken against (`top`) by so
        much that weights would grow beyond 2^SLACK."""
        n, high = self.halves, []
        for r in range(n):
            high.append(functools.reduce(arith.maxnumf, [tile[2 * r + e] for tile in logits for e in range(2)]))
        above = [
            arith.cmpf(arith.CmpFPredicate.OGT, x, arith.addf(y, _f32(SLACK))) for x, y in zip(high, top, strict=True)
        ]
        i32 = ir.IntegerType.get_signless(32)
        above = arith.extui(i32, functools.reduce(arith.ori, above))
        ptx = "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        moved = utils.inline_ptx(ptx, above, result_types=i32, convergent=True, has_side_effects=True)
        flat = [x for out in outs for x in out]
        state = [*top, *total, *zeros, *flat]
        condition = arith.cmpi(arith.CmpIPredicate.ne, moved, _i32(0))
        branch = scf.IfOp(condition, [x.type for x in state], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            new = [arith.maxnumf(top[r], self.across(high[r], arith.maxnumf)) for r in range(n)]
            alpha = [_exp2(arith.subf(top[r], _finite_base(new[r]))) for r in range(n)]
            sums = [arith.mulf(x, alpha[r % n]) for r, x in enumerate(total + zeros)]
            decayed = [arith.mulf(x, alpha[i % 4 // 2]) if i % 4 // 2 < n else x for i, x in enumerate(flat)]
            scf.yield_([*new, *sums, *decayed])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(state)
        (*state,) = branch.results
        top, total, zeros = self.of_rows(state[: 3 * n])
        return [state[i : i + 4] for i in range(3 * n, len(state), 4)], top, total, zeros

    def softmax(self, logits, numbers, places, length, top, total, zeros):
        """-> first operands of the product with values, rows' sums, and of what middle codes of values stand for."""
        i32 = ir.IntegerType.get_signless(32)
        base, total, zeros = [_finite_base(x) for x in top], list(total), list(zeros)
        words = []
        for j, tile in enumerate(logits):
            real = [_less(at, length) for at in places[j]]
            # Past the length they may be NaN.
            scales, middles = (
                [_choose(real[e], numbers[name][j][e], _f32(0.0)) for e in range(2)] if name in numbers else None
                for name in ("v_scale", "v_middle")
            )
            for r in range(self.halves):
                p = [_exp2(arith.subf(tile[2 * r + e], base[r])) for e in range(2)]
                total[r] = arith.addf(total[r], arith.addf(*p))
                if middles is not None:
                    zeros[r] = _fma(p[1], middles[1], _fma(p[0], middles[0], zeros[r]))
                if scales is not None:
                    p = [arith.mulf(p[e], scales[e]) for e in range(2)]
                ptx = f"cvt.rn.{self.kind}x2.f32 $0, $1, $2;"
                words.append(utils.inline_ptx(ptx, p[1], p[0], result_types=i32))
            words += [_i32(0)] * (2 - self.halves)
        return words, total, zeros

    def value_pairs(self, v, s: int, places, length, small):
        """Second operands of the products with values 16 s .. 16 s + 15."""
        tokens = []
        for j in (2 * s, 2 * s + 1):
            for e in range(2):
                row = _add(_times(self.c, 2), e)
                words = self.read(v, self.group(j), row, 8, self.g)
                if self.plan.format == "dense":  # past the length may lie NaN, and 0 * NaN is NaN
                    mask = _choose(_less(places[j][e], length), _i32(0xFFFFFFFF), _i32(0))
                    words = [arith.andi(w, mask) for w in words]
                tokens.append(words)
        steps = [self.value_steps(j, small, places, length) for j in (2 * s, 2 * s + 1)]
        first, second = self.value_operands(*tokens[:2], steps[0]), self.value_operands(*tokens[2:], steps[1])
        return list(zip(first, second, strict=True))

    def values(self, v, p, outs, places, length, small, ahead=None):
        """ahead: the first `value_pairs`, made while logits were waited for."""
        for s in range(self.mine // 16):
            pairs = self.value_pairs(v, s, places, length, small) if s or ahead is None else ahead
            a = p[4 * s : 4 * s + 4]  # rows g and g + 8 of eight tokens, then of the next eight
            outs = [self.multiply(out, a, b) for out, b in zip(outs, pairs, strict=True)]
        return outs

    def value_steps(self, j: int, small, places, length):
        """What makes numbers of the codes of the thread's two values of 8 j .. 8 j + 7; past the length scales may be NaN."""
        if self.plan.v.by_token:
            return None
        tokens = [_add(_add(self.first, 8 * j + e), _times(self.c, 2)) for e in range(2)]
        real = [_less(at, length) for at in places[j]]
        return self.of_group("v", small, tokens, self.g, 8, real)

    def finish(self, state, sum_s, top_s, results, part, where, whole):
        """Stores what the warpgroup found of a unit: as a part of it or, where it has the `whole`, as its results."""
        plan = self.plan
        numbers = [part, *where, whole.astype(jnp.int32)]

        @plgpu.inline_mgpu(
            arg_types=(
                _threadwise_layout(self.state),
                plgpu.RefType(),
                plgpu.RefType(),
                [plgpu.RefType()] * len(results),
                [scalar()] * len(numbers),
            ),
            return_type=(),
        )
        def make(_, state, sum_s, top_s, results, numbers):
            self.thread()
            parts, marks, *results = results
            part, *where, whole = (x.registers.item() for x in numbers)
            state, whole = _values(state), arith.cmpi(arith.CmpIPredicate.ne, whole, _i32(0))
            outs = [state[4 * i : 4 * i + 4] for i in range(self.outs)]
            top, total, zeros = self.of_rows(state[4 * self.outs :])
            total = [self.across(x, arith.addf) for x in total]
            if plan.zeroed(plan.v):
                zeros = [self.across(x, arith.addf) for x in zeros]
                outs = [[arith.addf(x, zeros[min(i // 2, self.halves - 1)]) for i, x in enumerate(out)] for out in outs]
            rows = self.rows()[: self.halves]
            kept = [_less(row, _i32(plan.kept)) for row in rows]
            leads = arith.cmpi(arith.CmpIPredicate.eq, self.c, _i32(0))
            if self.token_warps > 1:
                top, total, factors = self.exchange(top_s, top, total, rows, leads)
                outs = [
                    [arith.mulf(x, factors[min(i // 2, self.halves - 1)]) for i, x in enumerate(out)] for out in outs
                ]
                leads = arith.andi(leads, arith.cmpi(arith.CmpIPredicate.eq, self.token_warp, _i32(0)))
            for r in range(self.halves):
                at = _add(_times(part, 2 * plan.kept * 4), _times(rows[r], 4))
                when = arith.andi(leads, kept[r])
                _store(marks, at, [top[r]], when)
                _store(marks, _add(at, 4 * plan.kept), [total[r]], when)
                if plan.direct:
                    at = _add(_times(rows[r], 4), 4 * HEIGHTS)
                    _store(top_s, at, [top[r]], when)
                    _store(top_s, _add(at, 4 * 2 * TILE), [total[r]], when)
            base = _times(part, plan.kept * plan.head_dim * 4)
            if self.token_warps == 1:
                for i, out in enumerate(outs):
                    for k, x in enumerate(out[: 2 * self.halves]):
                        r, e = divmod(k, 2)
                        at = _add(_times(rows[r], plan.head_dim), self.column(_i32(i), _add(_times(self.c, 2), e)))
                        _store(parts, _add(base, _times(at, 4)), [x], kept[r])
                return ()
            for local, column, values, inside in self.summed(sum_s, outs, rows, kept):
                at = _add(_times(local, plan.head_dim), column)
                if not plan.direct:
                    _store(parts, _add(base, _times(at, 4)), values, inside)
                    continue
                cut = arith.xori(whole, arith.constant(whole.type, 1))
                _store(parts, _add(base, _times(at, 4)), values, arith.andi(inside, cut))
                row, _, place = _place(plan, *where, local)
                with utils.when(functools.reduce(arith.andi, (whole, inside, _less(row, _i32(plan.rows))))):
                    at = _add(_times(local, 4), 4 * HEIGHTS)
                    top, total = (_load(top_s, _add(at, x), ir.F32Type.get())[0] for x in (0, 4 * 2 * TILE))
                    _write(plan, *results, place, column, values, top, total)
            return ()

        make(state, sum_s, top_s, list(results), numbers)

    def column(self, i, place):
        """Of the output, accumulator i of a thread's columns (`place`: 2 c, or 2 c + 1)."""
        share = self.numbers // 8
        at = _add(_times(arith.divui(i, _i32(share)), self.numbers), arith.remui(i, _i32(share)))
        return _add(at, _times(place, share))

    def summed(self, sum_s, outs, rows, kept):
        """Adds up the outputs of warps that share out tokens, as many accumulators at a time as shared memory holds of the rows
        that are kept: yields (row, column, four numbers from there on, whether they are a row's)."""
        wide = 1 << (self.plan.kept - 1).bit_length()
        count = min(self.outs, SHARE // (self.token_warps * wide * 8))  # accumulators, a multiple of 4
        size, pitch, quads = wide * 8 * count * 4, 8 * count * 4, count // 4
        thread = _and(utils.thread_idx(), 127)
        for start in range(0, self.outs, count):
            if start:
                utils.warpgroup_barrier()
            for r in range(self.halves):
                at = _add(_times(self.token_warp, size), _times(rows[r], pitch))
                for e in range(2):
                    mine = _add(at, _times(_add(_times(self.c, 2), e), 4 * count))
                    for i in range(0, count, 4):
                        values = [out[2 * r + e] for out in outs[start + i : start + i + 4]]
                        _store(sum_s, _add(mine, 4 * i), values, kept[r])
            utils.warpgroup_barrier()
            for first in range(0, size // 16, 128):
                vector = arith.minui(_add(thread, first), _i32(size // 16 - 1))
                found = [
                    _load(sum_s, _add(_times(vector, 16), warp * size), ir.F32Type.get(), 4)
                    for warp in range(self.token_warps)
                ]
                values = [functools.reduce(arith.addf, x) for x in zip(*found, strict=True)]
                local, rest = (op(vector, _i32(8 * quads)) for op in (arith.divui, arith.remui))
                place, quad = arith.divui(rest, _i32(quads)), arith.remui(rest, _i32(quads))
                inside = arith.andi(_less(local, _i32(self.plan.kept)), _less(_add(thread, first), _i32(size // 16)))
                yield local, self.column(_add(_times(quad, 4), start), place), values, inside

    def exchange(self, top_s, top, total, rows, leads):
        """Maximum and sum of rows over the warps that share out the tokens, and what a warp's values are multiplied by."""
        f32 = ir.F32Type.get()
        local = [_add(self.g, 8 * r) for r in range(self.halves)]
        here = [_add(_times(self.warp, 2 * TILE * 4), _times(row, 4)) for row in local]
        for r in range(self.halves):
            _store(top_s, here[r], [top[r]], leads)
            _store(top_s, _add(here[r], TILE * 4), [total[r]], leads)
        utils.warpgroup_barrier()
        tops, totals, factors = [], [], []
        for r in range(self.halves):
            found = []
            for other in range(self.token_warps):
                warp = _add(arith.remui(self.warp, _i32(self.row_warps)), other * self.row_warps)
                at = _add(_times(warp, 2 * TILE * 4), _times(local[r], 4))
                found.append((_load(top_s, at, f32)[0], _load(top_s, _add(at, TILE * 4), f32)[0]))
            high = functools.reduce(arith.maxnumf, [x for x, _ in found])
            base = _finite_base(high)
            summed = _f32(0.0)
            for x, y in found:
                summed = _fma(y, _exp2(arith.subf(x, base)), summed)
            tops.append(high)
            totals.append(summed)
            factors.append(_exp2(arith.subf(top[r], base)))
        return tops, totals, factors


# --- The merge of parts -----------------------------------------------------------------------------------------------


def _merge(plan: Plan, parts, marks, offsets, sink_logits, near=(), results=()):
    """Parts of each unit -> out [B, Q, N, H], lse float32[B, Q, N]. near: q, pools, positions, table, lengths, q_positions, where
    first tokens take part; results: those of whole units."""
    vectors = plan.kept * plan.head_dim // 4
    args = [parts, marks, offsets] + ([sink_logits.astype(jnp.float32)] if plan.sinks else []) + list(near)
    refs = [jax.new_ref(x) for x in results]

    def body(parts_g, marks_g, offsets_g, *refs):
        sink_g, near_g, (out_g, lse_g) = refs[: plan.sinks], refs[plan.sinks : -2], refs[-2:]
        unit = lax.axis_index("unit")
        offset_of = _offset_of(plan, offsets_g)
        begin, end, total = offset_of(unit), offset_of(unit + 1), offset_of(plan.units)
        share, rest = lax.div(total, jnp.int32(plan.workers)), lax.rem(total, jnp.int32(plan.workers))

        def worker(tile):
            long = rest * (share + 1)
            late = rest + lax.div(tile - long, jnp.maximum(share, 1))
            return jnp.where(tile < long, lax.div(tile, share + 1), late)

        first = worker(begin)
        count = jnp.where(end > begin, worker(end - 1) - first + 1, 0)
        merge = _merge_threads if plan.tiles.registers else _merge_plainly
        work = functools.partial(merge, plan, parts_g, marks_g, sink_g, near_g, out_g, lse_g, unit)
        pl.when(not plan.direct or count != 1)(lambda: work(lax.axis_index("part"), first + unit, count))

    found = dependent(
        body,
        out_type=() if refs else _results(plan),
        grid=(plan.units, -(-vectors // 128) if plan.tiles.registers else 1),
        grid_names=("unit", "part"),
        num_threads=1,
        thread_name="wg",
        kernel_name="paged_decode_merge",
    )(*args, *refs)
    return [jax.freeze(ref) for ref in refs] or found


def _merge_plainly(plan, parts_g, marks_g, sink_g, near_g, out_g, lse_g, unit, _, first, count):
    batch_row, head, block = _locate(plan, unit)

    def step(i, carry):
        top, total, out = carry
        m, l = marks_g[first + i, 0], marks_g[first + i, 1]
        new = jnp.maximum(top, m)
        base = jnp.where(new == -jnp.inf, 0.0, new)
        a, b = jnp.exp2(top - base), jnp.exp2(m - base)
        return new, total * a + l * b, out * a[:, None] + parts_g[first + i] * b[:, None]

    zeros = jnp.zeros((plan.kept,), jnp.float32)
    empty = zeros - jnp.inf, zeros, jnp.zeros((plan.kept, plan.head_dim), jnp.float32)
    tops, totals, outs = lax.fori_loop(0, count, step, empty)
    for local in range(plan.kept):
        row = block * plan.kept + local
        query, member = lax.div(row, jnp.int32(plan.group)), lax.rem(row, jnp.int32(plan.group))
        at = head * plan.group + member

        @pl.when(row < plan.rows)
        def _(local=local, query=query, at=at):
            top, total, out = tops[local], totals[local], outs[local]
            if plan.sinks:
                sink = sink_g[0][at] * LOG2E
                new = jnp.maximum(top, sink)
                total, out = total * jnp.exp2(top - new) + jnp.exp2(sink - new), out * jnp.exp2(top - new)
                top = new
            for i in range(plan.mask.skip if near_g else 0):
                logit, value = _first_plainly(plan, near_g, i, batch_row, query, head, at)
                new = jnp.maximum(top, logit)
                base = jnp.where(new == -jnp.inf, 0.0, new)
                a, b = jnp.exp2(top - base), jnp.exp2(logit - base)
                top, total, out = new, total * a + b, out * a + value * b
            out_g[batch_row, query, at] = (out / jnp.where(total > 0, total, 1)).astype(out_g.dtype)
            lse_g[batch_row, query, at] = jnp.where(total > 0, (top + jnp.log2(total)) / LOG2E, -jnp.inf)


def _first_plainly(plan, near_g, i, row, query, head, at):
    """Logit (in powers of 2) and value of first token i for a query head."""
    q_g, k_g, v_g, positions_g, table_g, lengths_g, qpos_g = near_g
    lists, width, size = plan.first
    listed = head * plan.batch + row if lists > 1 else row
    stored = i < lengths_g[listed]
    page = jnp.where(stored, table_g[listed * width + i // size], 0)
    position, own = positions_g[page * size + i % size], qpos_g[row * plan.queries + query]
    seen = stored & (position >= 0) & (position < plan.mask.skip) & (position <= own)
    k, v = (ref[page, head, i % size].astype(jnp.float32) for ref in (k_g, v_g))
    x = jnp.sum(q_g[row, query, at].astype(jnp.float32) * k) * plan.scale
    x = x if plan.softcap is None else plan.softcap * jnp.tanh(x / plan.softcap)
    return jnp.where(seen, x * LOG2E, -jnp.inf), jnp.where(seen, v, 0)


def _first_of_threads(plan, near, row, head, at, column):
    """(logit in powers of 2, the thread's four numbers of the value) of each first token for row `at` of a kv head."""
    q, k, v, positions, table, lengths, qpos = near
    lists, width, size = plan.first
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

    def numbers(ref, place):
        words = _load(ref, _times(_add(_times(place, plan.head_dim), column), 2), i32, 2)
        halves = [half for w in words for half in (arith.shli(w, _i32(16)), _and(w, 0xFFFF0000))]
        return [utils.bitcast(half, f32) for half in halves]

    number = lambda ref, index: _load(ref, _times(index, 4), i32)[0]  # noqa: E731
    query, member = arith.divui(at, _i32(plan.group)), arith.remui(at, _i32(plan.group))
    asked = _add(_times(row, plan.queries), query)
    mine = numbers(q, _add(_times(asked, plan.heads), _add(_times(head, plan.group), member)))
    own = number(qpos, asked)
    listed = _add(_times(head, plan.batch), row) if lists > 1 else row
    length, found = number(lengths, listed), []
    for i in range(plan.mask.skip):
        stored = _less(_i32(i), length)
        page = number(table, _add(_times(listed, width), i // size))
        page = _choose(stored, page, _i32(0))
        position = number(positions, _add(_times(page, size), i % size))
        seen = arith.andi(stored, _below(position, _i32(plan.mask.skip)))
        seen = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.sle, position, own))
        place = _add(_times(_add(_times(page, plan.kv_heads), head), size), i % size)
        x = functools.reduce(arith.addf, [arith.mulf(a, b) for a, b in zip(mine, numbers(k, place), strict=True)])
        for bit in range((plan.head_dim // 4).bit_length() - 1):
            x = arith.addf(x, utils.shfl_bfly(x, 1 << bit))
        x = _capped(plan, arith.mulf(x, _f32(plan.scale * LOG2E)))
        value = [_choose(seen, number, _f32(0.0)) for number in numbers(v, place)]
        found.append((_choose(seen, x, _f32(-math.inf)), value))
    return found


def _merge_threads(plan, parts_g, marks_g, sink_g, near_g, out_g, lse_g, unit, part, first, count):
    """A thread merges four numbers of a row. Loads of several parts are under way at a time."""
    batch_row, head, block = _locate(plan, unit)
    unroll = 4 if plan.workers < 4 * plan.units else 16
    refs = (plgpu.RefType(),) * (4 + len(sink_g) + len(near_g))

    @plgpu.inline_mgpu(arg_types=(*refs, *(scalar(),) * 6), return_type=())
    def merge(_, parts, marks, *rest):
        out, lse = rest[-8:-6]
        row, head, block, part, first, count = (x.registers.item() for x in rest[-6:])
        f32 = ir.F32Type.get()
        thread = utils.thread_idx()
        flat = _times(_add(_times(part, 128), thread), 4)
        local, column = arith.divui(flat, _i32(plan.head_dim)), arith.remui(flat, _i32(plan.head_dim))
        at, query_head, place = _place(plan, row, head, block, local)
        real = arith.andi(_less(local, _i32(plan.kept)), _less(at, _i32(plan.rows)))
        tokens = []
        if near_g:  # whole warps take part in their sums
            near = rest[len(sink_g) : len(sink_g) + len(near_g)]
            tokens = _first_of_threads(plan, near, row, head, arith.minui(at, _i32(plan.rows - 1)), column)
        with utils.when(real):
            rounds = _right(_add(count, unroll - 1), unroll.bit_length() - 1)
            top, total = _f32(-math.inf), _f32(0.0)
            if plan.sinks:
                top, total = arith.mulf(_load(rest[0], _times(query_head, 4), f32)[0], _f32(LOG2E)), _f32(1.0)
            values = [_f32(0.0)] * 4
            if tokens:
                before, top = top, functools.reduce(arith.maxnumf, [x for x, _ in tokens], top)
                base = _finite_base(top)
                total = arith.mulf(total, _exp2(arith.subf(before, base)))
                for x, numbers in tokens:
                    weight = _exp2(arith.subf(x, base))
                    total = arith.addf(total, weight)
                    values = [_fma(weight, y, value) for y, value in zip(numbers, values, strict=True)]

            @utils.fori(rounds, [top, total, *values])
            def summed(i, carry):
                top, total, *values = carry
                loaded = []
                for k in range(unroll):
                    at = _add(_times(i, unroll), k)
                    inside = _less(at, count)
                    index = _add(first, _choose(inside, at, _i32(0)))
                    mark = _times(_add(_times(index, 2 * plan.kept), local), 4)
                    m, l = _load(marks, mark, f32)[0], _load(marks, _add(mark, 4 * plan.kept), f32)[0]
                    at = _add(_times(_add(_times(index, plan.kept), local), plan.head_dim), column)
                    loaded.append((_choose(inside, m, _f32(-math.inf)), l, _load(parts, _times(at, 4), f32, 4)))
                new = functools.reduce(arith.maxnumf, [m for m, _, _ in loaded], top)
                base = _finite_base(new)
                decay = _exp2(arith.subf(top, base))
                total, *values = (arith.mulf(x, decay) for x in (total, *values))
                for m, l, numbers in loaded:
                    weight = _exp2(arith.subf(m, base))
                    total = _fma(weight, l, total)
                    values = [_fma(weight, x, value) for x, value in zip(numbers, values, strict=True)]
                return [new, total, *values]

            top, total, *values = summed.results
            _write(plan, out, lse, place, column, values, top, total)
        return ()

    merge(parts_g, marks_g, *sink_g, *near_g, out_g, lse_g, batch_row, head, block, part, first, count)


def _place(plan, row, head, block, local):
    """Of a row of a unit: which it is of its kv head's (of `rows` at most), its query head, and which of all queries' heads."""
    at = _add(_times(block, plan.kept), local)
    query, member = arith.divui(at, _i32(plan.group)), arith.remui(at, _i32(plan.group))
    head = _add(_times(head, plan.group), member)
    return at, head, _add(_times(_add(_times(row, plan.queries), query), plan.heads), head)


def _write(plan, out, lse, place, column, values, top, total):
    """Four numbers of a head's output, from weighted values and the sum of weights; by the thread of the first, its lse."""
    some = arith.cmpf(arith.CmpFPredicate.OGT, total, _f32(0.0))
    inverse = arith.divf(_f32(1.0), _choose(some, total, _f32(1.0)))
    half = ir.F16Type.get() if plan.dtype == "float16" else ir.BF16Type.get()
    values = [arith.truncf(half, arith.mulf(x, inverse)) for x in values]
    packed = utils.vector_concat([vector.broadcast(ir.VectorType.get((1,), half), x) for x in values])
    at = _pointer(out, _times(_add(_times(place, plan.head_dim), column), 2))
    llvm.store(packed, at, alignment=8)
    log = utils.inline_ptx("lg2.approx.ftz.f32 $0, $1;", total, result_types=ir.F32Type.get())
    value = _choose(some, arith.mulf(arith.addf(top, log), _f32(1 / LOG2E)), _f32(-math.inf))
    _store(lse, _times(place, 4), [value], arith.cmpi(arith.CmpIPredicate.eq, column, _i32(0)))


# --- Attention mass ---------------------------------------------------------------------------------------------------


def _scores(plan: Plan, q, pools, positions, table, lengths, q_positions, lse):
    """Attention mass by slot float32[B, S, K] from the log-sums that attention returned: one more pass over the keys.

    The list is of all tiles of the tables, in equal parts; those that no query sees are written as zeros.
    """
    named = dict(zip(plan.small, (*pools[2:], positions), strict=False))
    named = {name: x for name, x in named.items() if not name.startswith("v_")}
    plan = dataclasses.replace(
        plan, keys_only=True, small=tuple(named), small_dtypes=tuple(str(x.dtype) for x in named.values())
    )
    t, piece = plan.tiles, min(plan.tiles.tokens, plan.page)
    per, slots = t.tokens // piece, t.wgs * t.stages
    sources = (pools[0], *named.values())
    scratch = {
        "k_s": plgpu.SMEM(
            (slots, t.tokens, plan.wide), pools[0].dtype, transforms=_tiling(plan.wide, pools[0].dtype.itemsize)
        ),
        "small_s": [plgpu.SMEM((slots, per, max(piece, 128 // x.dtype.itemsize)), x.dtype) for x in named.values()],
        "barriers": plgpu.SMEM((2, slots, 2), jnp.int32),
        "q_s": plgpu.SMEM((t.wgs, plan.staged), jnp.int32),
    }
    shape = (plan.batch, plan.slots, plan.kv_heads)
    return dependent(
        functools.partial(_scores_body, plan, len(sources), per, piece),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(t.sms,),
        grid_names=("sm",),
        num_threads=t.wgs + 1,
        thread_name="wg",
        scratch_types=scratch,
        kernel_name="paged_decode_scores",
    )(*sources, q, q_positions.reshape(-1), table.reshape(-1), lengths.reshape(-1), lse)


def _scores_body(plan, count, per, piece, *refs, k_s, small_s, barriers, q_s):
    sources, (q_g, qpos_g, table_g, lengths_g, lse_g, scores_g) = refs[:count], refs[count:]
    t, wg = plan.tiles, lax.axis_index("wg")
    step = _Warps(plan, per, piece, barriers)
    tiles = -(-plan.slots // t.tokens)  # of a unit
    size, rest = divmod(tiles * plan.units, plan.workers)
    div, rem = (lambda x, y: lax.div(x, jnp.int32(y))), (lambda x, y: lax.rem(x, jnp.int32(y)))

    def each_tile(wg, enter, work):
        """work(what enter(row, head, ...) returned, ...) for a warpgroup's tiles, with how many were seen before."""
        worker = lax.axis_index("sm") * t.wgs + wg
        start = worker * size + jnp.minimum(worker, rest)
        stop = start + size + jnp.where(worker < rest, 1, 0)

        def unit_loop(unit, before):
            row, head, _ = _locate(plan, unit)
            listed = head * plan.batch + row if plan.groups > 1 else row
            length = jnp.minimum(lengths_g[listed], plan.slots)
            sinks, first, _ = _span(plan, length)
            entered = enter(row, head, length)

            def tile_loop(i, before):
                tile = i - unit * tiles
                seen = tile * t.tokens < length
                if plan.mask.window is not None:
                    seen = seen & ((tile < sinks) | (tile >= first))
                slot = wg * t.stages + rem(before, t.stages)
                work(entered, row, head, listed, length, tile * t.tokens, seen, slot, before)
                return before + jnp.where(seen, 1, 0)

            return lax.fori_loop(
                jnp.maximum(unit * tiles, start), jnp.minimum((unit + 1) * tiles, stop), tile_loop, before
            )

        lax.fori_loop(div(start, tiles), div(stop + (tiles - 1), tiles), unit_loop, jnp.int32(0))

    def copy(_, row, head, listed, length, token, seen, slot, before):
        @pl.when(seen)
        def _():
            last, first = div(length - 1, plan.page), div(token, plan.page)
            pages = [table_g[listed * plan.width + jnp.minimum(first + j, last)] for j in range(per)]
            step.copy(sources, (k_s, *small_s), pages, head, rem(token, plan.page), slot, before)

    def ask(row, head, length):
        return step.ask(q_g, q_s.at[wg], qpos_g, row, head, jnp.int32(0), length), step.heights(lse_g, row, head)

    def add(entered, row, head, listed, length, token, seen, slot, before):
        args = (q_s.at[wg], *entered, scores_g, row, head, token, slot, before)
        buffers = [ref.at[slot] for ref in (k_s, *small_s)]
        pl.when(seen)(lambda: step.mass(buffers, *args))
        pl.when(jnp.logical_not(seen))(lambda: step.mass(None, *args))

    step.begin()

    @pl.when(wg == t.wgs)
    def _():
        @plgpu.warp_map
        def _(warp):
            pl.when(warp < t.wgs)(lambda: each_tile(warp, lambda *_: None, copy))

    pl.when(wg < t.wgs)(lambda: each_tile(wg, ask, add))


def _scores_by_xla(plan: Plan, q, k_pool, positions, table, lengths, q_positions, lse, logit_scale):
    """The same from dense keys: for more rows of a kv head than one warp takes, and for the interpreter."""
    k = gather_pages(k_pool, table).astype(jnp.float32)  # [B, S, K, H]
    q = q.reshape(plan.batch, plan.queries, plan.kv_heads, plan.group, plan.head_dim)
    logits = jnp.einsum("bqkgh,bskh->bkqgs", q.astype(jnp.float32), k) * plan.scale
    if logit_scale is not None:
        factors = gather_pages(logit_scale[..., None], table)[..., 0]
        logits = logits * jnp.moveaxis(factors, 2, 1)[:, :, None, None]
    if plan.softcap is not None:
        logits = plan.softcap * jnp.tanh(logits / plan.softcap)
    at = jnp.take(positions, table, axis=0, mode="clip").reshape(*table.shape[:2], -1)
    asked = q_positions[None, :, :, None]
    stored = jnp.arange(at.shape[-1]) < lengths[..., None]
    seen = plan.mask(asked, at[:, :, None, :]) & (asked >= 0) & stored[:, :, None, :]  # [G, B, Q, S]
    seen = jnp.moveaxis(seen, 0, 1)[:, :, :, None]
    if plan.entries is not None:
        at, kv_head = located(plan.entries, jnp.arange(plan.slots))
        mine = jnp.arange(plan.group) // (plan.group // plan.entries.heads)
        seen = at < ((q_positions + 1) // plan.entries.every)[:, None, :, None, None]
        seen = seen & (kv_head == mine[:, None]) & (q_positions >= 0)[:, None, :, None, None]
    lse = jnp.moveaxis(lse.reshape(plan.batch, plan.queries, plan.kv_heads, plan.group), 1, 2)[..., None]
    weights = jnp.where(seen, jnp.exp(logits - jnp.where(seen, lse, 0)), 0)
    return jnp.moveaxis(jnp.sum(weights, axis=(2, 3)), 2, 1)
