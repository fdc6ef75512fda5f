"""`ragged_paged_attention` on TPU: the kernel of `attention/paged_tpu.py` over blocks of ragged queries.

Every row's tokens are cut into blocks; a block is one item of the kernel, so a tick of many decodes and a few chunks is
one launch without padding of rows to the longest. At most T / block + B items exist; the rest do nothing.
"""

import functools

import jax
import jax.numpy as jnp

from optx.cache import Ragged
from optx.errors import LoweringError
from optx.pallas.attention.paged_tpu import Items, Plan, Pools, Tiles, check, plan_of, run, supports
from optx.pallas.attention.reference import Mask

__all__ = ["Tiles", "ragged_paged_attention", "supports"]


def ragged_paged_attention(
    q,
    k_pool,
    v_pool,
    *,
    ragged: Ragged,
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
    tiles: Tiles | None = None,
    interpret=False,
):
    """Attention of T ragged tokens over their rows' cached tokens, as `attention.reference.ragged_paged_attention`.

    q [T, N, H]; pools, positions, table, lengths, sink_logits, logit_scale, interpret as in `paged_decode`.
    -> (out [T, N, Hv], lse float32[T, N], None); what is returned for padding tokens is unspecified.
    Raises: LoweringError for shapes and dtypes that the kernel does not take, and for want_scores.
    """
    op = "ragged_paged_attention"
    check(op, q, k_pool, v_pool, positions, table, lengths, sink_logits, logit_scale, value_dim, want_scores)
    if q.ndim != 3 or q.shape[0] != ragged.rows.shape[0] or ragged.batch != table.shape[1]:
        raise LoweringError(
            f"{op} (mosaic_tpu): q is {list(q.shape)} with a table of {table.shape[1]} rows; allowed: [T, N, H] for ragged's "
            f"T = {ragged.rows.shape[0]} tokens of B = {ragged.batch} rows"
        )
    plan = plan_of(
        q,
        k_pool,
        v_pool,
        table,
        queries=min(ragged.longest, q.shape[0]),
        mask=mask,
        scale=scale,
        softcap=softcap,
        value_dim=value_dim,
        tiles_=tiles,
        interpret=interpret,
    )
    pools = Pools(k=k_pool, v=v_pool, positions=positions, table=table, lengths=lengths)
    out, lse = _call(q, pools, ragged, sink_logits, logit_scale, plan=plan)
    return out, lse, None


@functools.partial(jax.jit, static_argnames="plan")
def _call(q, pools: Pools, ragged: Ragged, sink_logits, logit_scale, *, plan: Plan):
    tokens, b, size = q.shape[0], ragged.batch, plan.tiles.queries
    blocks = -(-ragged.counts // size)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    first = ends - blocks  # first item of each row
    count = min(b * -(-ragged.longest // size), tokens // size + b)
    item = jnp.arange(count, dtype=jnp.int32)
    row = jnp.sum(item[:, None] >= ends, axis=1, dtype=jnp.int32)
    active = row < b
    row = jnp.minimum(row, b - 1)
    offset = jnp.where(active, (item - first[row]) * size, 0)
    have = jnp.where(active, jnp.minimum(ragged.counts[row] - offset, size), 0)

    index = jnp.clip((ragged.starts[row] + offset)[:, None] + jnp.arange(size), 0, tokens - 1)
    low = jnp.maximum(pools.lengths[:, row] - ragged.counts[row] + offset, 0)
    items = Items(
        rows=row,
        low=low,
        high=jnp.minimum(low + have, pools.lengths[:, row]) if plan.mask.causal else pools.lengths[:, row],
        counts=have,
        positions=jnp.where(jnp.arange(size) < have[:, None], ragged.positions[index], -1),
    )
    out, lse = run(q[index], pools, items, sink_logits, logit_scale, plan)
    mine = jnp.minimum(ragged.rows, b - 1)
    at = jnp.clip(jnp.arange(tokens) - ragged.starts[mine], 0, ragged.longest - 1)
    at = jnp.clip(first[mine] * size + at, 0, count * size - 1)
    flat = lambda x: x.reshape(count * size, *x.shape[2:])[at]  # noqa: E731
    return flat(out), flat(lse)
