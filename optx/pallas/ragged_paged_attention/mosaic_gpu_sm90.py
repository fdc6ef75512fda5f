"""`ragged_paged_attention` on Hopper: prefill chunks and decodes in one launch over paged keys and values.

A work item is (kv head, row, tile of the row's new tokens). The query heads of a kv head lie beside each other in a
tile of 2 x 64 query rows, so a page is read once for all of them. Two warpgroups compute (64 rows each, taking turns on
the tensor cores), a third copies pages through the page table by TMA. The list of items is made by XLA from `Ragged`:
its length is a static bound, items without work exit at once.
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

from optx.cache import Ragged
from optx.pallas.attention.reference import Mask
from optx.tensor import is_qtensor

ROWS = 64  # query rows of a warpgroup: the M of wgmma
COMPUTE = 2  # warpgroups that compute
LOG2E = math.log2(math.e)
LOWEST = -1e30  # below any logit, and finite: exp2(LOWEST - LOWEST) is 1, not NaN
FULL = Mask()
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes of one call."""

    block_kv: int  # cached tokens a step
    stages: int  # steps in flight
    take_turns: bool = True  # the two compute warpgroups alternate between tensor cores and softmax


def tiles(head_dim: int, page_size: int) -> Tiles:
    """Tile sizes by abstract shape; shared memory (227 KiB) bounds them."""
    return Tiles(block_kv=128 if head_dim <= 128 else 64, stages=2)


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why this kernel does not take the call site."""
    if getattr(target, "platform", None) != "gpu" or getattr(target, "arch", None) != "sm90":
        return "needs a Hopper GPU (sm90)"
    cache = args["cache"]
    if cache is None or cache.kind != "paged":
        return f"takes paged caches, not {cache.kind if cache is not None else 'none'}"
    if cache.format is not None:
        return f"takes caches without a format, not {cache.format}"
    if cache.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16 caches, not {cache.dtype}"
    heads, kv_heads, head_dim = args["heads"], args["kv_heads"], args["head_dim"]
    if args.get("value_dim") not in (None, head_dim):
        return "values must be as wide as keys"
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if heads % kv_heads or heads // kv_heads > ROWS:
        return f"takes at most {ROWS} query heads a kv head, got {heads} over {kv_heads}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """What a compiled kernel is made for, shapes apart."""

    mask: Mask
    scale: float
    softcap: float | None
    tiles: Tiles
    interpretable: bool = False  # P through shared memory: what the interpreter can run


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
    _tiles: Tiles | None = None,
    _interpretable: bool = False,
):
    """Attention of T ragged tokens over their rows' cached pages, causal inside a chunk.

    q [T, N, H]; pools [pages + 1, K, P, H] in q's dtype; positions int32[pages + 1, P]; table int32[G, B, pages];
    lengths int32[G, B]; sink_logits [N]. A row's tokens are its newest slots. H is 64, 128 or 256, P 16, 32, 64 or 128.
    -> (out [T, N, H], lse float32[T, N], None); what padding tokens get is unspecified.
    Raises: ValueError for arguments outside this, naming the argument.
    Method: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), one pass over pages with an online softmax.
    """
    _check(q, k_pool, v_pool, ragged, table, lengths, sink_logits, logit_scale, value_dim, want_scores)
    head_dim, page_size = q.shape[-1], k_pool.shape[-2]
    static = _Static(
        mask=mask,
        scale=1 / math.sqrt(head_dim) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        tiles=_tiles or tiles(head_dim, page_size),
        interpretable=_interpretable,
    )
    out, lse = _call(q, k_pool, v_pool, ragged, positions, table, lengths, sink_logits, static=static)
    return out, lse, None


def _check(q, k_pool, v_pool, ragged, table, lengths, sink_logits, logit_scale, value_dim, want_scores):
    def refuse(argument, got, allowed):
        raise ValueError(f"ragged_paged_attention (mosaic_gpu/sm90): {argument} {got}; allowed: {allowed}")

    if q.ndim != 3 or q.dtype not in (jnp.bfloat16, jnp.float16):
        refuse("q", f"{q.dtype}{list(q.shape)}", "bfloat16 or float16 [T, N, H]")
    if v_pool is None:
        refuse("v_pool", "None (latents)", "a pool of values")
    if is_qtensor(k_pool) or is_qtensor(v_pool):
        refuse("k_pool, v_pool", "packed", "dense pools")
    tokens, heads, head_dim = q.shape
    if k_pool.ndim != 4 or k_pool.shape != v_pool.shape or k_pool.shape[-1] != head_dim:
        refuse("k_pool, v_pool", f"{list(k_pool.shape)}, {list(v_pool.shape)}", f"two of [pages + 1, K, P, {head_dim}]")
    if k_pool.dtype != q.dtype or v_pool.dtype != q.dtype:
        refuse("k_pool, v_pool", f"{k_pool.dtype}, {v_pool.dtype}", f"q's dtype {q.dtype}")
    _, kv_heads, page_size, _ = k_pool.shape
    if head_dim not in HEAD_DIMS:
        refuse("q", f"of head dim {head_dim}", f"{HEAD_DIMS}")
    if page_size not in PAGE_SIZES:
        refuse("k_pool", f"of page size {page_size}", f"{PAGE_SIZES}")
    if heads % kv_heads or heads // kv_heads > ROWS:
        refuse("q", f"of {heads} heads over {kv_heads} kv heads", f"a multiple, at most {ROWS} times as many")
    if table.ndim != 3 or table.shape[0] not in (1, kv_heads) or table.shape[1] != ragged.batch:
        refuse("table", f"{list(table.shape)}", f"[1 or {kv_heads}, {ragged.batch}, pages]")
    if lengths.shape != table.shape[:2]:
        refuse("lengths", f"{list(lengths.shape)}", f"{list(table.shape[:2])}")
    if sink_logits is not None and sink_logits.shape != (heads,):
        refuse("sink_logits", f"{list(sink_logits.shape)}", f"[{heads}]")
    if logit_scale is not None:
        refuse("logit_scale", "given", "None")
    if value_dim not in (None, head_dim):
        refuse("value_dim", value_dim, f"None or {head_dim}")
    if want_scores:
        refuse("want_scores", True, "False")


# --- The list of items -----------------------------------------------------------------------------------------------


def _items(ragged: Ragged, tokens: int, tile: int):
    """Items int32[bound, 4]: row, first token, tokens (0: no work), tokens of the row from the first on.

    Decodes are spread evenly between prefill tiles, so that chips read pages for some while they multiply for others;
    later tiles of a chunk, which see more, come first.
    -> (items, item of the first tile of each row int32[B])
    """
    batch = ragged.batch
    bound = tokens // tile + batch
    count = -(-ragged.counts // tile)  # tiles a row
    stop = jnp.cumsum(count)
    start = stop - count
    index = jnp.arange(bound, dtype=jnp.int32)
    row = jnp.sum(index[:, None] >= stop[None, :], axis=1, dtype=jnp.int32)  # [bound], B past the end
    real = row < batch
    row = jnp.minimum(row, batch - 1)
    within = count[row] - 1 - (index - start[row])  # last tile first
    counts = ragged.counts[row]
    number = jnp.where(real, jnp.clip(counts - within * tile, 0, tile), 0)
    items = jnp.stack([row, ragged.starts[row] + within * tile, number, counts - within * tile], axis=1)
    single = real & (counts == 1)
    other = real & (counts != 1)
    # Where an item runs: the k-th of n of its kind at (k + 1/2) / n.
    rank = jnp.where(single, jnp.cumsum(single), jnp.cumsum(other)) - 0.5
    at = jnp.where(real, rank / jnp.where(single, jnp.sum(single), jnp.sum(other)), 2.0 + index)
    place = jnp.sum((at[None, :] < at[:, None]) | ((at[None, :] == at[:, None]) & (index[None, :] < index[:, None])), 1)
    items = jnp.zeros_like(items).at[place].set(items.astype(jnp.int32))
    return items, place.astype(jnp.int32), start.astype(jnp.int32), count.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("static",))
def _call(q, k_pool, v_pool, ragged, positions, table, lengths, sink_logits, *, static):
    tokens, heads, head_dim = q.shape
    pool_pages, kv_heads, page_size, _ = k_pool.shape
    group = heads // kv_heads
    per_wg = ROWS // group
    tile = COMPUTE * per_wg
    items, place, start, count = _items(ragged, tokens, tile)
    window = static.mask.window is not None
    extra = []
    if sink_logits is not None:  # one logit a query row of a tile
        rows = jnp.tile(sink_logits.astype(jnp.float32).reshape(kv_heads, 1, group), (1, per_wg, 1))
        rows = rows.reshape(kv_heads, per_wg * group) * LOG2E
        extra.append(jnp.pad(rows, ((0, 0), (0, ROWS - per_wg * group))))
    if window:
        rows = jnp.repeat(ragged.positions, group)
        extra += [jnp.pad(rows, (0, COMPUTE * ROWS)), positions]
    kernel = _kernel(
        static,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        pool_pages=pool_pages,
        table_pages=table.shape[2],
        table_heads=table.shape[0],
        items=items.shape[0],
        sink=sink_logits is not None,
        dtype=q.dtype,
    )
    out, lse = kernel(
        q.reshape(tokens, kv_heads, group, head_dim),
        k_pool.reshape(pool_pages * kv_heads, page_size, head_dim),
        v_pool.reshape(pool_pages * kv_heads, page_size, head_dim),
        items,
        table,
        lengths,
        *extra,
    )
    # lse [items, K, 2 * 64] -> [T, N]
    row = jnp.minimum(ragged.rows, ragged.batch - 1)
    offset = jnp.clip(jnp.arange(tokens, dtype=jnp.int32) - ragged.starts[row], 0, ragged.longest - 1)
    item = place[jnp.clip(start[row] + count[row] - 1 - offset // tile, 0, items.shape[0] - 1)]
    wg, at = (offset % tile) // per_wg, (offset % per_wg) * group
    column = (wg * ROWS + at)[:, None] + jnp.arange(group)
    lse = lse[item[:, None, None], jnp.arange(kv_heads)[None, :, None], column[:, None, :]]
    return out.reshape(tokens, heads, head_dim), lse.reshape(tokens, heads)


# --- The kernel ------------------------------------------------------------------------------------------------------


def _kernel(
    static,
    *,
    tokens,
    heads,
    kv_heads,
    head_dim,
    page_size,
    pool_pages,
    table_pages,
    table_heads,
    items,
    sink,
    dtype,
):
    cfg, mask = static.tiles, static.mask
    block, stages = cfg.block_kv, cfg.stages
    group = heads // kv_heads
    per_wg = ROWS // group
    width = 64 if head_dim > 128 else head_dim  # columns of q and out that pass through shared memory at once
    window = mask.window is not None
    box = min(page_size, block)  # slots a copy; pages larger than a block are copied in parts
    boxes = block // box
    parts = page_size // box
    sink_blocks = -(-mask.sinks // block) if window else 0
    wgmma_layout = plgpu.Layout.WGMMA
    rows_layout, columns_layout = wgmma_layout.reduce(1), wgmma_layout.reduce(0)
    div = lambda x, y: lax.div(x, jnp.int32(y))  # noqa: E731
    rem = lambda x, y: lax.rem(x, jnp.int32(y))  # noqa: E731

    def body(q_ref, k_ref, v_ref, items_ref, table_ref, lengths_ref, *rest, scratch):
        rest = list(rest)
        sink_ref = rest.pop(0) if sink else None
        q_positions_ref, positions_ref = (rest.pop(0), rest.pop(0)) if window else (None, None)
        out_ref, lse_ref = rest
        q_smem, stage_smem, k_smem, v_smem, lse_smem, at_smem, p_smem = scratch[:7]
        q_full, k_full, v_full, k_free, v_free, turn = scratch[7:]
        head, item = lax.axis_index("heads"), lax.axis_index("items")
        wg = lax.axis_index("wg")
        list_head = head if table_heads > 1 else 0
        row, tile_token, tile_number, behind = (items_ref[item, i] for i in range(4))

        def block_at(step, skip):
            return jnp.where(step < sink_blocks, step, step + skip) if window else step

        def copy(length, steps, skip):
            plgpu.set_max_registers(40, action="decrease")
            block_of = functools.partial(block_at, skip=skip)

            def pages(step):
                """Rows of the pools that hold the step's boxes; past the length: beyond the pool, where TMA gives zeros."""
                slots = block_of(step) * block
                found = []
                for i in range(boxes):
                    slot = slots + i * box
                    page = table_ref[list_head, row, jnp.minimum(div(slot, page_size), table_pages - 1)]
                    found.append(jnp.where(slot < length, page, pool_pages))
                return found

            def load(step, found):
                slot = rem(step, stages)
                inside = rem(block_of(step), parts) * box if parts > 1 else 0

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])

                for i, page in enumerate(found):
                    source = k_ref.at[page * kv_heads + head, pl.ds(inside, box)]
                    plgpu.copy_gmem_to_smem(source, k_smem.at[slot, pl.ds(i * box, box)], k_full.at[slot])
                    if window:
                        source = positions_ref.at[page, pl.ds(inside, box)]
                        plgpu.copy_gmem_to_smem(source, at_smem.at[slot, pl.ds(i * box, box)], k_full.at[slot])

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(v_free.at[slot])

                for i, page in enumerate(found):
                    source = v_ref.at[page * kv_heads + head, pl.ds(inside, box)]
                    plgpu.copy_gmem_to_smem(source, v_smem.at[slot, pl.ds(i * box, box)], v_full.at[slot])

            def loop(step, found):
                after = pages(step + 1)  # read while the copies of this step wait for room
                load(step, found)
                return after

            lax.fori_loop(0, steps, loop, pages(0))

        def compute(length, newest, steps, skip):
            plgpu.set_max_registers(232, action="increase")
            block_of = functools.partial(block_at, skip=skip)
            stage, q_tile = stage_smem.at[wg], q_smem.at[wg]
            token = tile_token + wg * per_wg
            number = jnp.clip(tile_number - wg * per_wg, 0, per_wg)
            newest = newest + wg * per_wg
            for c in range(head_dim // width):
                columns = pl.ds(c * width, width)
                for i in range(per_wg):  # a copy a token: a tile of 8 rows may hold several
                    target = stage.at[pl.ds(i * group, group)]
                    plgpu.copy_gmem_to_smem(q_ref.at[token + i, head, :, columns], target, q_full.at[wg])
                plgpu.barrier_wait(q_full.at[wg])
                q_tile[:, columns] = plgpu.load(stage, layout=wgmma_layout, optimized=False)
            plgpu.commit_smem()

            if mask.causal:  # steps below `clear` are seen whole by all queries of this warpgroup
                mine = div(jnp.maximum(jnp.minimum(newest + number, length), 0) + block - 1, block)
                whole = div(jnp.maximum(jnp.minimum(newest + 1, length), 0), block)
            else:
                mine, whole = div(length + block - 1, block), div(length, block)
            mine = jnp.where(number > 0, jnp.clip(mine - skip, 0, steps), 0)
            whole = jnp.clip(whole - skip, 0, mine)

            def take_turn():
                if cfg.take_turns:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def step_(step, carry, *, edge):
                acc, top, total = carry
                slot = rem(step, stages)
                plgpu.barrier_wait(k_full.at[slot])

                def logits_(logits_ref):
                    plgpu.wgmma(logits_ref, q_tile, k_smem.at[slot].T)
                    take_turn()
                    return logits_ref[...]

                logits = pl.run_scoped(logits_, plgpu.ACC((ROWS, block), jnp.float32))
                at = plgpu.load(at_smem.at[slot], layout=columns_layout, optimized=False) if window else None
                plgpu.barrier_arrive(k_free.at[slot])
                if static.softcap is None:
                    logits = logits * (static.scale * LOG2E)
                else:  # c tanh(x / c) = c - 2c / (1 + exp(2x / c)); 1/y = rsqrt(y)^2 is one fast instruction
                    grown = 1 + jnp.exp2(logits * (2 * static.scale * LOG2E / static.softcap))
                    inverse = lax.rsqrt(grown)
                    logits = static.softcap * LOG2E * (1 - 2 * (inverse * inverse))
                if edge or window:
                    logits = jnp.where(seen_(block_of(step), at, edge), logits, -jnp.inf)
                higher = jnp.maximum(top, logits.max(axis=1))
                shrink = jnp.exp2(top - higher)
                weights = jnp.exp2(logits - lax.broadcast_in_dim(higher, logits.shape, [0]))
                total = total * shrink + weights.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                weights = weights.astype(dtype)
                acc, total, higher, weights = lax.optimization_barrier((acc, total, higher, weights))
                if cfg.take_turns:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if edge:
                    clear_(step, slot)
                if cfg.take_turns:
                    plgpu.barrier_wait(turn)
                acc = product_(acc, weights, slot)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, higher, total

            def product_(acc, weights, slot):
                if static.interpretable:
                    p_smem[wg] = weights
                    plgpu.commit_smem()

                    def part_(ref):
                        plgpu.wgmma(ref, p_smem.at[wg], v_smem.at[slot])
                        return ref[...]

                    return acc + pl.run_scoped(part_, plgpu.ACC((ROWS, head_dim), jnp.float32))
                return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[slot]))(plgpu.ACC.init(acc))

            def seen_(block_index, at, edge):
                """bool[64, block]: which slots of the block each query row sees."""
                seen = None
                if edge:
                    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, block), layout=wgmma_layout)
                    bound = length - 1
                    if mask.causal:
                        bound = jnp.minimum(div(iota(0), group) + newest, bound)
                    seen = iota(1) + block_index * block <= bound
                if window:
                    rows = q_positions_ref.at[pl.ds(token * group, ROWS)]
                    rows = plgpu.load(rows, layout=rows_layout, optimized=False)
                    oldest = lax.broadcast_in_dim(rows - mask.window, (ROWS, block), [0])
                    at = lax.broadcast_in_dim(at, (ROWS, block), [1])
                    near = at > oldest
                    near = near | (at < mask.sinks) if mask.sinks else near
                    seen = near if seen is None else seen & near
                return seen

            def clear_(step, slot):
                """Zeroes values past the row's length: what lies there may be NaN, and 0 * NaN is NaN."""
                left = length - block_of(step) * block  # slots of the block that hold tokens

                @pl.when(left < block)
                def _():
                    for i in range(block // ROWS):
                        part = v_smem.at[slot, pl.ds(i * ROWS, ROWS)]
                        values = plgpu.load(part, layout=wgmma_layout)
                        at = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=wgmma_layout) + i * ROWS
                        part[...] = jnp.where(at < left, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

            def flush_(step, _):
                """Lets the other warpgroup's last steps pass."""
                slot = rem(step, stages)
                plgpu.barrier_wait(k_full.at[slot])
                take_turn()
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                take_turn()
                plgpu.barrier_arrive(v_free.at[slot])

            cast = plgpu.layout_cast
            carry = (
                cast(jnp.zeros((ROWS, head_dim), jnp.float32), wgmma_layout),
                cast(jnp.full((ROWS,), LOWEST, jnp.float32), rows_layout),
                cast(jnp.zeros((ROWS,), jnp.float32), rows_layout),
            )
            pl.when(wg == 1)(take_turn)
            carry = lax.fori_loop(0, whole, functools.partial(step_, edge=False), carry)
            carry = lax.fori_loop(whole, mine, functools.partial(step_, edge=True), carry)
            lax.fori_loop(mine, steps, flush_, None)
            pl.when(wg == 0)(take_turn)

            acc, top, total = carry
            if sink:
                logit = plgpu.load(sink_ref.at[head], layout=rows_layout, optimized=False)
                higher = jnp.maximum(top, logit)
                shrink = jnp.exp2(top - higher)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                total, top = total * shrink + jnp.exp2(logit - higher), higher
            some = total > 0
            lse_smem[wg] = jnp.where(some, top * math.log(2) + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
            acc = acc * lax.broadcast_in_dim(1 / jnp.where(some, total, 1.0), acc.shape, [0])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[item, head, pl.ds(wg * ROWS, ROWS)])
            for c in range(head_dim // width):
                columns = pl.ds(c * width, width)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stage[...] = acc[:, c * width : (c + 1) * width].astype(dtype)
                plgpu.commit_smem()

                def store(i, _, columns=columns):
                    target = out_ref.at[token + i, head, :, columns]
                    plgpu.copy_smem_to_gmem(stage.at[pl.ds(i * group, group)], target)

                lax.fori_loop(0, number, store, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(tile_number > 0)
        def _():
            length = lengths_ref[list_head, row]
            newest = length - behind  # slot of the tile's first query
            last = jnp.minimum(newest + tile_number, length) if mask.causal else length
            stop = div(jnp.maximum(last, 0) + block - 1, block)  # blocks [.., stop) hold what the tile sees
            first = div(jnp.maximum(newest - mask.window + 1, 0), block) if window else jnp.int32(0)
            skip = jnp.maximum(first - sink_blocks, 0)  # blocks between the sinks and the window
            steps = jnp.maximum(stop - skip, 0)

            pl.when(wg < COMPUTE)(lambda: compute(length, newest, steps, skip))
            pl.when(wg == COMPUTE)(lambda: copy(length, steps, skip))

    def entry(*refs):
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        smem = plgpu.SMEM
        copies = boxes * (2 if window else 1)
        pl.run_scoped(
            lambda *scratch: body(*refs, scratch=scratch),
            smem((COMPUTE, ROWS, head_dim), dtype, transforms=swizzled),
            smem((COMPUTE, ROWS, width), dtype),
            smem((stages, block, head_dim), dtype, transforms=swizzled),
            smem((stages, block, head_dim), dtype, transforms=swizzled),
            smem((COMPUTE, ROWS), jnp.float32),
            smem((stages, block), jnp.int32) if window else None,
            smem((COMPUTE, ROWS, block), dtype, transforms=swizzled) if static.interpretable else None,
            plgpu.Barrier(num_arrivals=per_wg, num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE),
            collective_axes="wg",
        )

    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((tokens, kv_heads, group, head_dim), dtype),
            jax.ShapeDtypeStruct((items, kv_heads, COMPUTE * ROWS), jnp.float32),
        ),
        grid=(kv_heads, items),
        grid_names=("heads", "items"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name="ragged_paged_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
