"""`paged_decode` on TPU: one item of the kernel of `attention/paged_tpu.py` a row."""

import functools

import jax
import jax.numpy as jnp

from optx.errors import LoweringError
from optx.pallas.attention.paged_tpu import Items, Plan, Pools, Tiles, check, plan_of, run, supports
from optx.pallas.attention.reference import Mask

__all__ = ["Tiles", "paged_decode", "supports"]

MOST = 8  # new tokens a row


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
    interpret=False,
):
    """Attention of Q = 1 .. 8 new tokens a row over its cached tokens, as `attention.reference.paged_attention`.

    q [B, Q, N, H]; pools [pages, K, P, H], dense or packed; v_pool None: values are the first `value_dim` numbers of the
    keys; positions int32[pages, P]; table int32[G, B, pages], G = 1 or K; lengths int32[G, B]; q_positions int32[B, Q],
    -1 where there is no query; logit_scale [pages, K, P]; sink_logits [N].
    interpret: False, True, or pltpu.InterpretParams; True and InterpretParams run anywhere.
    -> (out [B, Q, N, Hv], lse float32[B, Q, N], None).
    Raises: LoweringError for shapes and dtypes that the kernel does not take, and for want_scores.
    """
    op = "paged_decode"
    check(op, q, k_pool, v_pool, positions, table, lengths, sink_logits, logit_scale, value_dim, want_scores)
    b, queries = q.shape[:2]
    if q.ndim != 4 or not 1 <= queries <= MOST or table.shape[1] != b or q_positions.shape != (b, queries):
        raise LoweringError(
            f"{op} (mosaic_tpu): q is {list(q.shape)} with q_positions {list(q_positions.shape)}; allowed: [B, 1 to {MOST}, "
            f"N, H] with [B, Q] for the table's B = {table.shape[1]}; longer runs go to ragged_paged_attention"
        )
    if tiles is not None:
        tiles = Tiles(queries=queries, pages=tiles.pages)
    plan = plan_of(
        q,
        k_pool,
        v_pool,
        table,
        queries=queries,
        mask=mask,
        scale=scale,
        softcap=softcap,
        value_dim=value_dim,
        tiles_=tiles,
        interpret=interpret,
    )
    pools = Pools(k=k_pool, v=v_pool, positions=positions, table=table, lengths=lengths)
    out, lse = _call(q, pools, q_positions, sink_logits, logit_scale, plan=plan)
    return out, lse, None


@functools.partial(jax.jit, static_argnames="plan")
def _call(q, pools: Pools, q_positions, sink_logits, logit_scale, *, plan: Plan):
    counts = jnp.sum(q_positions >= 0, axis=1, dtype=jnp.int32)
    items = Items(
        rows=jnp.arange(q.shape[0], dtype=jnp.int32),
        low=jnp.maximum(pools.lengths - counts, 0),
        high=pools.lengths,
        # A query may lie behind a gap: every one that can exist is computed.
        counts=jnp.where(counts > 0, q.shape[1], 0),
        positions=q_positions,
    )
    return run(q, pools, items, sink_logits, logit_scale, plan)
