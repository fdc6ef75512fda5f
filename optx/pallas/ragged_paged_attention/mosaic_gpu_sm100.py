"""`ragged_paged_attention` and `paged_decode` for Blackwell: attention over pages by tcgen05 (`attention/inner_sm100.py`).

A unit of work is a kv head of a row's next new tokens, with their query heads side by side: two tiles of 128 query rows that
share keys and values (chunks of prompts), or one tile, whose steps two warpgroups take in turn, each with sums of its own
(decodes). One warp copies pages by the page table, one issues the products; where pages are packed, a warpgroup widens them to
16 bits in shared memory first. Steps of a unit may be shared out over `parts` thread blocks; sums of all parts are merged by XLA
(FlashAttention-2, arXiv:2307.08691, section 3.1).

Masks reach the kernel as borders in slots: positions ascend along a row's listing, so what a query sees of it are the slots
lo .. hi - 1, and with a window those of the first tokens. A factor of logits a token goes into the scales of packed keys.
Declined are factors over dense pages, which spill beside the softmax, and scales by channel over groups of tokens (KIVI,
arXiv:2402.02750): a thread widens a token, and each of its numbers would take two factors of its own from shared memory, whose
traffic binds already (`optx.bench.estimate`). Never run on hardware so far.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.cache import Ragged
from optx.errors import LoweringError
from optx.pallas.attention import inner_sm100 as inner
from optx.pallas.attention.inner_sm100 import BLOCK, COLUMNS, LOWEST, ROWS, SHARED
from optx.pallas.attention.page_formats import Pages, pages_of, streams_of
from optx.pallas.attention.reference import Mask
from optx.pallas.late import plgpu
from optx.pallas.matmul.gemm_sm100 import SMS
from optx.pallas.paged_decode.mosaic_gpu_mma import merge
from optx.tensor import is_qtensor

HEAD_DIMS = (64, 128, 256)
PAGES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
CODES = ("dense", "int8", "fp8", "int4")
FACTORS = "multiplies logits by no factor a token over dense pages, where registers spill; packed keys take it into their scales"
UNIT = 4  # steps that a unit's begin and end take as long as
REGISTERS = {  # of a thread that copies or multiplies, of the softmax, that widens
    "dense": (88, 208, 0),
    "rows": (64, 176, 96),  # packed pages, two tiles of other rows
    "steps": (64, 160, 128),  # packed pages, two tiles of the same rows
}
# Columns of the table of units.
FACTS = 9
ROW, STEPS, AHEAD, FIRST, WHOLE, LENGTH, HIDDEN, SUNK, LIVE = range(FACTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one call is cut."""

    tiles: int  # sums of 128 rows that a thread block has at once
    stages: int  # steps of 16-bit keys and values in shared memory
    shared: bool  # True: tiles are other rows; False: the same, in other steps
    raw: int = 0  # packed pages: steps of codes in flight
    parts: int = 1  # thread blocks that share out the steps of a unit
    interpreted: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on; hashable, a static argument."""

    heads: int
    kv_heads: int
    head_dim: int
    page: int
    lists: int  # G: page lists, one for all heads or one a kv head
    tokens: int  # T
    batch: int
    longest: int | None  # tokens of each row where all have as many, else None
    mask: Mask
    scale: float
    softcap: float | None
    k: Pages
    v: Pages
    tiles: Tiles

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a unit."""
        return ROWS * (self.tiles.tiles if self.tiles.shared else 1)

    @property
    def per(self) -> int:
        """Tokens of a unit, at most."""
        most = self.rows // self.group
        return most if self.longest is None else min(most, self.longest)

    @property
    def kept(self) -> int:
        """Rows that leave the kernel."""
        return self.rows if self.tiles.shared else -(-self.per * self.group // 8) * 8

    @property
    def units(self) -> int:
        """Bound on units of one kv head."""
        if self.longest is not None:
            return self.batch * -(-self.longest // self.per)
        return self.tokens // self.per + min(self.batch, self.tokens)

    @property
    def sums(self) -> int:
        """Parts that leave the kernel."""
        return self.tiles.parts * (1 if self.tiles.shared else self.tiles.tiles)

    @property
    def code(self) -> str:
        return self.k.code

    @property
    def packed(self) -> bool:
        return self.code != "dense"

    @property
    def zeros(self) -> bool:
        """Whether codes have a zero point: those of int4 do always."""
        return self.k.zero is not None or self.code == "int4"

    @property
    def inner(self) -> inner.Inner:
        tiles = self.tiles
        return inner.Inner(
            tiles=tiles.tiles,
            stages=tiles.stages,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            scale=self.scale,
            softcap=self.softcap,
            wide=8 if self.packed else inner.WIDE,  # a warpgroup more: fewer registers each
            shared=tiles.shared,
            interpreted=tiles.interpreted,
        )


def supports(args, target) -> str | None:
    """None, or why this kernel declines the call site. Reads cache, heads, kv_heads, head_dim, page_size, value_dim, mask."""
    cache = args["cache"]
    if cache is None or cache.kind != "paged":
        return f"reads paged keys and values, not a {cache.kind if cache is not None else 'missing'} cache"
    streams = streams_of(cache)
    if isinstance(streams, str):
        return streams
    if jnp.dtype(cache.dtype) not in (DTYPES if not cache.packed else DTYPES[:1]):
        return f"pages and queries of {cache.dtype}; allowed: bfloat16, and float16 where pages are dense"
    heads, kv_heads, head_dim = args["heads"], args["kv_heads"], args["head_dim"]
    if reason := _shape_reason(heads, kv_heads, head_dim, args.get("page_size"), *streams.values()):
        return reason
    if args.get("value_dim") not in (None, head_dim):
        return "values must be as wide as keys"
    if args.get("key_bias"):
        return "adds no bias to keys"
    if (args.get("logit_scale") or args.get("logit_scales")) and not cache.packed:
        return FACTORS
    if args.get("logit_scales", 0) not in (0, kv_heads):
        return f"{args['logit_scales']} scales of logits a token over {kv_heads} kv heads; allowed: as many"
    return "returns no scores" if args.get("want_scores") else None


def _shape_reason(heads: int, kv_heads: int, head_dim: int, page: int | None, k: Pages, v: Pages) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    if heads // kv_heads > ROWS:
        return f"{heads // kv_heads} query heads a kv head; at most {ROWS}"
    if page not in (None, *PAGES):
        return f"page size {page}; allowed: {', '.join(map(str, PAGES))}"
    if k.code not in CODES or not (k.by_token and v.by_token) or "least" in (k.zero, v.zero):
        return f"pages of {k.code}, scales not a token's alone; allowed: {', '.join(CODES)} with one scale a token and head"
    if k != v:
        return "keys and values that lie differently; allowed: one format for both"
    if k.code != "dense" and (head_dim > 128 or head_dim * k.bits < 64 * 8):
        return f"{k.code} of {head_dim} numbers a head; allowed: 64 to 128 bytes a token and head"
    return None


def tiles_for(head_dim: int, stored: Pages, blocks: int, steps: int, few: bool) -> Tiles:
    """blocks: units of all kv heads; steps: of a unit; few: whether a unit's query rows fit one tile."""
    tiles = 2 if 2 * (BLOCK + head_dim) <= COLUMNS else 1
    rows = 1 if few else tiles
    packed = stored.code != "dense"
    stage, code = 4 * BLOCK * head_dim, BLOCK * (head_dim * stored.bits // 4 + 16)
    left = SHARED - 2 * rows * ROWS * head_dim
    stages = max(1, min(4, (left - 2 * packed * code) // stage))
    stages -= 0 if packed else stages % tiles  # a slot of 16-bit pages has one tile that cleans it
    raw = min(4, (left - stages * stage) // code) if packed else 0
    work = lambda parts: -(-blocks * parts // SMS) * (steps / parts + UNIT)  # noqa: E731
    parts = min(range(1, max(1, min(steps, 32)) + 1), key=work)
    return Tiles(tiles=tiles, stages=stages, raw=raw, shared=not few, parts=parts)


def paged_decode(q, k_pool, v_pool, *, q_positions, table, tiles: Tiles | None = None, **kwargs):
    """Attention of Q new tokens a row over its cached tokens, their own included: `reference.paged_attention`.

    q [B, Q, N, H]; q_positions int32[B, Q], -1 where there is no query; the rest as `ragged_paged_attention` has it.
    -> (out [B, Q, N, H], lse float32[B, Q, N], None). Raises: LoweringError naming the argument for what it does not take.
    """
    batch, queries, n, h = q.shape
    ragged = Ragged.dense(batch, queries)
    ragged = dataclasses.replace(ragged, positions=q_positions.reshape(-1))
    newest = jnp.max(q_positions, axis=1)
    flat = q.reshape(-1, n, h)
    found = _attend("paged_decode", flat, k_pool, v_pool, ragged, newest, table=table, tiles=tiles, **kwargs)
    out, lse = (x.reshape(batch, queries, *x.shape[1:]) for x in found)
    real = (q_positions >= 0)[..., None]
    nothing = -jnp.inf if (sinks := kwargs.get("sink_logits")) is None else sinks.astype(jnp.float32)
    return jnp.where(real[..., None], out, 0), jnp.where(real, lse, nothing), None


def ragged_paged_attention(q, k_pool, v_pool, *, ragged: Ragged, tiles: Tiles | None = None, **kwargs):
    """Attention of T ragged tokens over their rows' cached pages, causal inside a chunk: `reference.ragged_paged_attention`.

    q [T, N, H]; pools [pages + 1, K, P, H] in q's dtype, or QTensor with one scale a token and head (q in bfloat16); positions
    int32[pages + 1, P]; table int32[G, B, pages]; lengths int32[G, B]; sink_logits [N]; logit_scale [pages + 1, K, P]. A row's
    tokens are its newest slots.
    -> (out [T, N, H], lse float32[T, N], None); what padding tokens get is unspecified.
    Raises: LoweringError naming the argument for what it does not take.
    """
    last = jnp.clip(ragged.starts + ragged.counts - 1, 0, len(q) - 1)
    found = _attend("ragged_paged_attention", q, k_pool, v_pool, ragged, ragged.positions[last], tiles=tiles, **kwargs)
    return *found, None


def _attend(
    op: str,
    q,
    k_pool,
    v_pool,
    ragged: Ragged,
    newest,
    *,
    positions,
    table,
    lengths,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    logit_scale=None,
    value_dim=None,
    want_scores=False,
    tiles: Tiles | None,
):
    if reason := _refusal(q, k_pool, v_pool, logit_scale, value_dim, want_scores):
        raise LoweringError(f"{op} (mosaic_gpu/sm100): {reason}")
    tokens, heads, head_dim = q.shape
    kv_heads, page = k_pool.shape[1:3]
    k, v = (pages_of(x.format if is_qtensor(x) else None) for x in (k_pool, v_pool))
    if logit_scale is not None:  # packed keys take the factor into their scales
        k, v = (dataclasses.replace(pages, scaled=True) for pages in (k, v))
    longest = ragged.longest if ragged.rectangular else None
    group = heads // kv_heads
    few = longest is not None and longest * group <= ROWS
    if tiles is None:
        per = ROWS * (1 if few else 2) // group
        units = ragged.batch if few else tokens // per + ragged.batch
        steps = -(-table.shape[2] * page // BLOCK)
        tiles = tiles_for(head_dim, k, units * kv_heads, steps, few)
    plan = Plan(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page=page,
        lists=table.shape[0],
        tokens=tokens,
        batch=ragged.batch,
        longest=longest,
        mask=mask,
        scale=float(1 / math.sqrt(head_dim) if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        k=k,
        v=v,
        tiles=tiles,
    )
    return _run(plan, q, k_pool, v_pool, ragged, newest, positions, table, lengths, sink_logits, logit_scale)


def _refusal(q, k_pool, v_pool, logit_scale, value_dim, want_scores) -> str | None:
    if v_pool is None or value_dim not in (None, q.shape[-1]) or want_scores:
        return (
            f"v_pool {v_pool is not None}, value_dim {value_dim}, want_scores {want_scores}; allowed: a pool of values as wide "
            "as keys, no scores"
        )
    if k_pool.ndim != 4 or k_pool.shape != v_pool.shape:
        return f"pools are {k_pool.shape} and {v_pool.shape}; allowed: two of [pages, K, P, H]"
    if logit_scale is not None and not is_qtensor(k_pool):
        return FACTORS
    if logit_scale is not None and logit_scale.shape != k_pool.shape[:3]:
        return f"logit_scale is {list(logit_scale.shape)}; allowed: [pages, K, P], {list(k_pool.shape[:3])}"
    stored = [pages_of(x.format if is_qtensor(x) else None) for x in (k_pool, v_pool)]
    if None in stored or (
        reason := _shape_reason(q.shape[1], *k_pool.shape[1:2], q.shape[2], k_pool.shape[2], *stored)
    ):
        return f"pools of {k_pool.dtype}{k_pool.shape}: {reason if None not in stored else 'a format that it does not read'}"
    dtypes = [q.dtype] if is_qtensor(k_pool) else [q.dtype, k_pool.dtype, v_pool.dtype]
    if len(set(dtypes)) > 1 or q.dtype not in (DTYPES[:1] if is_qtensor(k_pool) else DTYPES):
        return f"q and pools are {', '.join(map(str, dtypes))}; allowed: all bfloat16 or float16, bfloat16 where pages are packed"
    return None


# --- Units, and their borders ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Units:
    """U units of one kv head, up to `per` tokens each."""

    row: jax.Array  # int32[U]
    token: jax.Array  # int32[U, per]: which of T
    real: jax.Array  # bool[U, per]
    of: tuple[jax.Array, jax.Array]  # int32[T] each: a token's unit and place in it


def units_of(plan: Plan, ragged: Ragged) -> Units:
    per, place = plan.per, jnp.arange(plan.per, dtype=jnp.int32)
    each = (ragged.counts + per - 1) // per
    end = jnp.cumsum(each)
    unit = jnp.arange(plan.units, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(end, unit, side="right"), plan.batch - 1).astype(jnp.int32)
    begin = (end - each)[row]
    within = (unit - begin)[:, None] * per + place
    real = (unit < end[-1])[:, None] & (within < ragged.counts[row][:, None])
    token = jnp.clip(ragged.starts[row][:, None] + within, 0, plan.tokens - 1)
    mine = jnp.minimum(ragged.rows, plan.batch - 1)
    offset = jnp.arange(plan.tokens, dtype=jnp.int32) - ragged.starts[mine]
    at = jnp.clip((end - each)[mine] + offset // per, 0, plan.units - 1), jnp.clip(offset % per, 0, per - 1)
    return Units(row=row, token=token, real=real & (ragged.positions[token] >= 0), of=at)


def borders(plan: Plan, units: Units, asked, newest, positions, table, lengths):
    """Of queries at positions asked [U, per]: (lo, hi) int32[G, U, per], the slots that they see, and the same of all
    queries: (first slots that are hidden, first slots that a window's sinks end at) int32[G, U]."""
    mask, length = plan.mask, lengths[:, units.row]
    wide = jnp.broadcast_to(length[..., None], (plan.lists, *asked.shape))

    def before(position):
        """int32[G, U, n] -> how many slots of the row hold positions below: they ascend."""
        row, group = units.row[None, :, None], jnp.arange(plan.lists)[:, None, None]

        def halve(_, ends):
            low, high = ends
            middle = (low + high) // 2
            found = positions[table[group, row, middle // plan.page], middle % plan.page]
            less = (found < position) & (low < high)
            return jnp.where(less, middle + 1, low), jnp.where(less | (low >= high), high, middle)

        ends = jnp.zeros_like(position), jnp.broadcast_to(length[..., None], position.shape)
        return lax.fori_loop(0, (table.shape[2] * plan.page).bit_length(), halve, ends)[0]

    each = lambda position: before(jnp.broadcast_to(position, wide.shape))  # noqa: E731
    alike = lambda position: before(jnp.full((*length.shape, 1), position))[..., 0]  # noqa: E731
    if mask.lag is not None:
        hi = each(jnp.minimum(asked + 1, mask.end(asked)) if mask.causal else mask.end(asked))
    elif mask == Mask():  # queries are the newest slots
        hi = wide - (newest[units.row][:, None] - asked)
    else:
        hi = each(asked + 1) if mask.causal else wide
    hidden = alike(mask.skip) if mask.skip else jnp.zeros_like(length)
    lo = jnp.broadcast_to(hidden[..., None], wide.shape)
    if mask.window is not None:
        lo = jnp.maximum(lo, each(mask.oldest(asked)))
    sunk = alike(mask.sinks) if mask.window is not None and mask.sinks else jnp.zeros_like(length)
    return lo, hi, hidden, sunk


def facts_of(plan: Plan, units: Units, length, lo, hi, hidden, sunk):
    """int32[G, U, FACTS]: the steps of each unit."""
    some = jnp.any(units.real, axis=1)
    most = jnp.max(jnp.where(units.real, hi, 0), axis=2)
    last = (most + BLOCK - 1) // BLOCK
    oldest = jnp.min(jnp.where(units.real, lo, most[..., None]), axis=2)
    ahead = jnp.minimum((sunk + BLOCK - 1) // BLOCK, last)
    first = jnp.maximum(jnp.minimum(oldest // BLOCK, last), ahead)
    seen_by_all = jnp.min(jnp.where(units.real, hi, jnp.iinfo(jnp.int32).max), axis=2)
    bare = plan.mask.window is None and not plan.mask.skip
    whole = jnp.minimum(seen_by_all // BLOCK, last) if bare else jnp.zeros_like(last)
    live = (jnp.sum(units.real, axis=1) * plan.group + ROWS - 1) // ROWS
    wide = lambda x: jnp.broadcast_to(x, last.shape)  # noqa: E731
    columns = {
        ROW: units.row,
        STEPS: jnp.where(some, ahead + last - first, 0),
        AHEAD: ahead,
        FIRST: first,
        WHOLE: whole,
        LENGTH: length,
        HIDDEN: hidden,
        SUNK: sunk,
        LIVE: live,
    }
    return jnp.stack([wide(columns[i]) for i in range(FACTS)], axis=-1).astype(jnp.int32)


# --- The kernel --------------------------------------------------------------------------------------------------------


def _body(q, k_pool, v_pool, table, facts, lo, hi, /, *refs, plan: Plan, **held):
    tiles, form, held = plan.tiles, plan.inner, types.SimpleNamespace(**held)
    *factors, out, lse = refs
    wg, part, head, unit = (lax.axis_index(name) for name in ("wg", "part", "head", "unit"))
    listed = head if plan.lists > 1 else 0
    fact = lambda i: facts[listed, unit, i]  # noqa: E731
    native = plgpu.Layout.TCGEN05_TMEM_NATIVE
    windowed = plan.mask.window is not None
    raw = "raw_" if plan.packed else ""

    def reach():
        """(how many of the unit's steps are this block's, which is the first, step -> block of slots): made by each role, as
        what all share is spilled."""
        every = fact(STEPS)
        ahead = fact(AHEAD) if windowed and plan.mask.sinks else 0
        first = fact(FIRST) if windowed or plan.mask.skip else 0
        each = lax.div(every + tiles.parts - 1, tiles.parts)
        begin = lax.min(part * each, every)

        def block(i):
            late = first + begin + i - ahead
            return late if isinstance(ahead, int) else jnp.where(begin + i < ahead, begin + i, late)

        return lax.min(each, every - begin), begin, block

    def fetch():
        steps, _, block_of = reach()
        row, last = fact(ROW), lax.max(lax.div(fact(LENGTH) - 1, plan.page), 0)
        for t in range(held.q.shape[0]):
            for c in range(form.strips):
                numbers = q.at[unit, head, pl.ds(t * ROWS, ROWS), pl.ds(c * form.strip, form.strip)]
                plgpu.copy_gmem_to_smem(numbers, held.q.at[t, c], held.loaded.at[t])
        slots, pages = tiles.raw or tiles.stages, BLOCK // plan.page

        def step(i, _):
            slot, block = lax.rem(i, slots), block_of(i)
            number = lambda j: table[listed, row, lax.min(block * pages + j, last)]  # noqa: E731
            # Read together, they wait for memory once; where tiles have rows of their own the assembler spills then.
            found = [] if plan.packed and form.shared else [number(j) for j in range(pages)]
            for pool, name, mine in ((k_pool, f"{raw}k", factors[::2]), (v_pool, f"{raw}v", factors[1::2])):
                full, empty = getattr(held, f"{name}_full").at[slot], getattr(held, f"{name}_empty").at[slot]
                pl.when(i >= slots)(functools.partial(plgpu.barrier_wait, empty))
                for j in range(pages):
                    page = found[j] if found else number(j)
                    tokens = getattr(held, name).at[slot, pl.ds(j * plan.page, plan.page)]
                    plgpu.copy_gmem_to_smem(pool.at[page, head], tokens, full)
                for n, factor in enumerate(mine):
                    numbers = factor.at[row, head, pl.ds(block * BLOCK, BLOCK)]
                    plgpu.copy_gmem_to_smem(numbers, getattr(held, f"{name}_factors").at[slot, n], full)

        lax.fori_loop(0, steps, step, None)
        for name in (f"{raw}k", f"{raw}v"):
            inner.drain(slots, steps, getattr(held, f"{name}_empty"))

    def clean(slot, left):
        """Values of all but the first `left` tokens become 0: weights of 0 times what was never written may be NaN."""

        @pl.when(left < BLOCK)
        def _():
            for c in range(0, plan.head_dim, 64):
                values = held.v.at[slot, :, pl.ds(c, 64)]
                some = plgpu.layout_cast(plgpu.load(values, layout=native(8), optimized=False), native)
                token = plgpu.broadcasted_iota(jnp.int32, some.shape, 0, layout=native)
                some = jnp.where(token < left, some, jnp.zeros((), some.dtype))
                values[...] = plgpu.layout_cast(some, native(8))
            plgpu.commit_smem()

    def widen():
        steps, _, block_of = reach()
        length = fact(LENGTH)

        def step(i, at):
            slot, left = lax.rem(i, tiles.stages), length - block_of(i) * BLOCK
            for name in "kv":
                codes, to = getattr(held, f"raw_{name}"), getattr(held, name)
                plgpu.barrier_wait(getattr(held, f"raw_{name}_full").at[at])
                free = functools.partial(plgpu.barrier_wait, getattr(held, f"{name}_empty").at[slot])
                pl.when(i >= tiles.stages)(free)
                load = lambda n, name=name: plgpu.load(  # noqa: E731
                    getattr(held, f"raw_{name}_factors").at[at, n], layout=native.reduce(1), optimized=False
                )
                scale = load(0) if plan.k.scaled else None
                zero = load(1) if plan.zeros else None
                for c in range(0, codes.shape[-1], 64):
                    some = plgpu.load(codes.at[at, :, pl.ds(c, 64)], layout=native(16), optimized=False)
                    some = plgpu.layout_cast(some, native)
                    for half, value in enumerate(widened(some, scale, zero, plan.k.bits)):
                        columns = pl.ds(half * codes.shape[-1] + c, 64)
                        to.at[slot, :, columns][...] = plgpu.layout_cast(value, native(8))
                plgpu.commit_smem()
                if name == "v":
                    clean(slot, left)
                plgpu.barrier_arrive(getattr(held, f"raw_{name}_empty").at[at])
                plgpu.barrier_arrive(getattr(held, f"{name}_full").at[slot])
            return lax.select(at == tiles.raw - 1, 0, at + 1)

        lax.fori_loop(0, steps, step, 0)
        for barrier in (held.k_empty, held.v_empty):
            inner.drain(tiles.stages, steps, barrier)

    def softmax(t):
        steps, begin, block_of = reach()
        length, hidden, sunk = fact(LENGTH), fact(HIDDEN), fact(SUNK)
        at = pl.ds(t * ROWS if form.shared else 0, ROWS)
        load = lambda ref: plgpu.load(ref.at[listed, unit, at], layout=native.reduce(1), optimized=False)  # noqa: E731
        oldest, behind = load(lo) if windowed or plan.mask.skip else None, load(hi)

        def seen(i, c, size):
            base = block_of(form.step(i, t)) * BLOCK + c
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=native)
            spread = lambda slot: lax.broadcast_in_dim(slot - base, column.shape, (0,))  # noqa: E731
            there = column < spread(behind)
            if oldest is None:
                return there
            late = column >= spread(oldest)
            if windowed and plan.mask.sinks:
                late = late | ((column < sunk - base) & (column >= hidden - base))
            return there & late

        def after(i):
            step = form.step(i, t)
            slot = lax.rem(step, tiles.stages)

            @pl.when((t == 0) | (not form.shared))
            def _():
                plgpu.barrier_wait(held.v_full.at[slot])
                clean(slot, length - block_of(step) * BLOCK)

        bare = form.steps(lax.max(lax.min(fact(WHOLE) - begin, steps), 0), t)
        runs = [(0, bare, False), (bare, form.steps(steps, t), True)]
        carry = inner.softmax(
            held, form, t, (inner.full(LOWEST), inner.full(0.0)), runs, seen, *[] if plan.packed else [after]
        )
        sums = part if form.shared else part * form.tiles + t
        kept = pl.ds(t * ROWS if form.shared else 0, min(plan.kept, ROWS))
        inner.store(held, form, t, carry, out.at[sums, unit, head, kept], lse.at[sums, unit, head, at])

    registers = REGISTERS["dense" if not plan.packed else "rows" if form.shared else "steps"]

    @pl.when(wg == 0)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(fetch)
            pl.when(warp == 1)(lambda: inner.multiply(held, form, reach()[0], fact(LIVE) if form.shared else None))

    @pl.when((wg > 0) & (wg <= form.tiles))
    def _():
        plgpu.set_max_registers(registers[1], action="increase")
        pl.when(wg <= (fact(LIVE) if form.shared else form.tiles))(lambda: softmax(wg - 1))

    if plan.packed:

        @pl.when(wg > form.tiles)
        def _():
            plgpu.set_max_registers(registers[2], action="decrease")
            widen()


def packed_scratch(plan: Plan, k_pool, v_pool) -> dict:
    """Shared memory of codes and of what multiplies them, and its barriers."""
    raw, count = plan.tiles.raw, plan.k.scaled + plan.zeros
    found = {}
    for name, pool in (("raw_k", k_pool), ("raw_v", v_pool)):
        width = pool.shape[-1]
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64))
        found[name] = plgpu.SMEM((raw, BLOCK, width), pool.dtype, transforms=transforms)
        found[f"{name}_full"] = plgpu.Barrier(num_arrivals=BLOCK // plan.page + count, num_barriers=raw)
        found[f"{name}_empty"] = plgpu.Barrier(num_arrivals=1, num_barriers=raw)
        if count:
            found[f"{name}_factors"] = plgpu.SMEM((raw, count, BLOCK), jnp.float32)
    return found


def widened(codes, scale, zero, bits: int):
    """codes [tokens, n] in bytes, float32 scale and zero [tokens] or None -> bfloat16 (code - zero) scale [tokens, n], rounded
    once; of four bits even numbers of a head, and odd ones. Integers become floats by their bits: 1.5 2^23 + n is
    0x4b400000 + n."""
    spread = lambda x: lax.broadcast_in_dim(x, codes.shape, (0,))  # noqa: E731

    def value(number, base: float):
        below = base if zero is None else spread(zero + base)
        number = number if zero is None and not base else number - below
        return (number if scale is None else number * spread(scale)).astype(jnp.bfloat16)

    if codes.dtype == jnp.float8_e4m3fn:
        return (value(codes.astype(jnp.float32), 0.0),)
    wide = codes.astype(jnp.int32)
    parts = (wide,) if bits == 8 else (wide & 15, wide >> 4)
    return tuple(value(lax.bitcast_convert_type(part + 0x4B400000, jnp.float32), 1.5 * 2**23) for part in parts)


def factors_of(plan: Plan, pool, table, more=None) -> list[jax.Array]:
    """Scales, and zero points if there are some, of all listed tokens in order: float32 [B, K, S] each, S whole blocks; more
    [pages, K, P]: multiplies scales."""

    def listed(part):
        part = part[..., 0]
        if plan.lists == 1:
            found = jnp.moveaxis(part[table[0]], 2, 1)
        else:
            found = jnp.stack([part[at, head] for head, at in enumerate(table)], axis=1)
        found = found.reshape(*found.shape[:2], -1).astype(jnp.float32)
        return jnp.pad(found, ((0, 0), (0, 0), (0, -found.shape[2] % BLOCK)))

    zero = jnp.full_like(pool.scale, 8) if plan.zeros and pool.zero is None else pool.zero
    scale = jnp.ones((*pool.shape[:-1], 1)) if pool.scale is None and plan.k.scaled else pool.scale
    scale = scale if more is None else scale.astype(jnp.float32) * more[..., None]
    return [listed(part) for part in (scale, zero) if part is not None]


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, q, k_pool, v_pool, ragged: Ragged, newest, positions, table, lengths, sink_logits, logit_scale):
    """The kernel's call, alike for all layers of a model: assembled once; and the merge of its parts."""
    tiles, form, group, h = plan.tiles, plan.inner, plan.group, plan.head_dim
    units = units_of(plan, ragged)
    asked = ragged.positions[units.token]
    lo, hi, hidden, sunk = borders(plan, units, asked, newest, positions, table, lengths)
    facts = facts_of(plan, units, lengths[:, units.row], lo, hi, hidden, sunk)
    by_row = lambda x: jnp.pad(  # noqa: E731
        jnp.repeat(jnp.where(units.real, x, 0), group, axis=-1), ((0, 0), (0, 0), (0, plan.rows - plan.per * group))
    )
    mine = jnp.where(units.real[..., None, None], q[units.token], 0).reshape(
        *units.token.shape, plan.kv_heads, group, h
    )
    mine = jnp.moveaxis(mine, 2, 1).reshape(plan.units, plan.kv_heads, plan.per * group, h)
    mine = jnp.pad(mine, ((0, 0), (0, 0), (0, plan.rows - mine.shape[2]), (0, 0)))
    halves = plan.k.bits == 4
    mine = jnp.concatenate([mine[..., ::2], mine[..., 1::2]], axis=-1) if halves else mine
    factors, pools = [], (k_pool, v_pool)
    scratch = inner.scratch(form, q.dtype, 1 if plan.packed else BLOCK // plan.page)
    if plan.packed:
        pairs = zip(factors_of(plan, k_pool, table, logit_scale), factors_of(plan, v_pool, table), strict=True)
        factors = [factor for pair in pairs for factor in pair]
        pools = (k_pool.data, v_pool.data)
        scratch |= packed_scratch(plan, *pools)
    kernel = plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct((plan.sums, plan.units, plan.kv_heads, plan.kept, h), q.dtype),
            jax.ShapeDtypeStruct((plan.sums, plan.units, plan.kv_heads, plan.rows), jnp.float32),
        ),
        grid=(tiles.parts, plan.kv_heads, plan.units),
        grid_names=("part", "head", "unit"),
        num_threads=1 + form.tiles + plan.packed,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="paged_attention_sm100",
    )
    out, lse = kernel(mine, *pools, table, facts, by_row(lo), by_row(hi), *factors)

    def by_token(x):
        """[sums, U, K, rows, ...] -> [sums, T, N, ...]."""
        x = x[:, :, :, : plan.per * group].reshape(*x.shape[:3], plan.per, group, *x.shape[4:])
        unit, place = units.of
        x = x[:, unit, :, place]  # the two indices stand apart: tokens come first
        return jnp.moveaxis(x, 0, 1).reshape(plan.sums, plan.tokens, plan.heads, *x.shape[4:])

    out, lse = merge(by_token(out), by_token(lse), sink_logits, q.dtype)
    return (jnp.stack(jnp.split(out, 2, axis=-1), axis=-1).reshape(out.shape) if halves else out), lse
