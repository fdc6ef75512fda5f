"""compressed_attention on Hopper: `paged_decode`'s kernel over pages of entries.

A page holds few entries of a kv head, too few rows for a copy. The entries of several kv heads that lie behind each other are
copied as one, and their query heads, which fill the rows of the matrix instruction that are empty otherwise, see those of their
own kv head alone. The weights are the scores of that kernel: one more pass over the keys.
"""

import jax.numpy as jnp

from optx.pallas.attention.page_formats import Pages
from optx.pallas.attention.reference import Mask
from optx.pallas.compressed_attention import reference
from optx.pallas.paged_decode import mosaic_gpu_sm90 as paged
from optx.pallas.paged_decode.mosaic_gpu_sm90 import Entries, Plan, Tiles

HEAD_DIMS = (64, 128)


def supports(args, target) -> str | None:
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    if args["head_dim"] not in HEAD_DIMS:
        return f"head_dim {args['head_dim']}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    if args["cache"].packed or args["cache"].dtype not in ("bfloat16", "float16"):
        return f"entries of {args['cache'].storage}; allowed: bfloat16, float16"
    each = args["every"]
    if each & (each - 1):
        return f"an entry for {each} tokens; allowed: powers of 2"
    group, page = args["heads"] // args["kv_heads"], args.get("page_size")
    if page is not None and not together(page // each, args["kv_heads"], group):
        return f"{page // each} entries a page with {group} query heads a kv head: no rows for a copy"
    return None


def together(each: int, kv_heads: int, group: int) -> int | None:
    """How many kv heads of a page are read as one: most that divide them, have no more query heads than there are rows, and
    entries that a copy takes; None: no number does."""
    counts = [2**i for i in range(5) if kv_heads % 2**i == 0 and 2**i * group <= paged.GROUPS]
    return max((n for n in counts if n * each in paged.PAGES), default=None)


def compressed_attention(
    q,
    k_pool,
    v_pool,
    *,
    table,
    lengths,
    q_positions,
    every,
    size,
    scale,
    softcap=None,
    tiles: Tiles | None = None,
):
    """As the reference. Pages whose entries no copy takes (`together`) are read by the reference itself."""
    b, queries, n, h = q.shape
    pages, kv_heads, each, _ = k_pool.shape
    heads = together(each, kv_heads, n // kv_heads)
    if heads is None:
        more = {"every": every, "size": size, "scale": scale, "softcap": softcap}
        where = {"table": table, "lengths": lengths, "q_positions": q_positions}
        return reference.compressed_attention(q, k_pool, v_pool, **where, **more)
    if queries > 1:  # weights are of one query: each is a row
        table, lengths = (jnp.repeat(x, queries, axis=1) for x in (table, lengths))
    k, v = (pool.reshape(pages, kv_heads // heads, heads * each, h) for pool in (k_pool, v_pool))
    plan = Plan(
        batch=b * queries,
        queries=1,
        heads=n,
        kv_heads=kv_heads // heads,
        head_dim=h,
        page=heads * each,
        width=table.shape[2],
        groups=1,
        k=Pages(code="dense"),
        v=Pages(code="dense"),
        small=(),
        small_dtypes=(),
        dtype=str(q.dtype),
        mask=Mask(),
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        sinks=False,
        tiles=tiles or paged.tiles(h),
        entries=Entries(each=each, heads=heads, every=every, first=size // every - 1),
    )
    slots = -(-lengths // (each * every)) * plan.page
    asked, nowhere = q_positions.reshape(-1, 1), jnp.zeros((pages, plan.page), jnp.int32)
    where = (nowhere, table, slots.astype(jnp.int32), asked)
    out, _, mass = paged.run(plan, True, q.reshape(-1, 1, n, h), k, v, *where, None, None)
    mass = mass.reshape(b, queries, -1, heads, each, kv_heads // heads)  # [B, Q, pages, heads, entries, heads apart]
    mass = jnp.moveaxis(mass, (5, 3), (2, 3)).reshape(b, queries, kv_heads, -1)
    return out.reshape(q.shape), mass
