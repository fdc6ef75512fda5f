"""Attention over pages on Hopper with sums whose order is a sequence's own: no unit of `ragged_paged_attention` is cut.

Slower where few units are long: one SM reads all of a row's tokens of one kv head.
"""

import dataclasses

import jax.numpy as jnp

from optx.cache import Ragged
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm90 as kernel
from optx.pallas.ragged_paged_attention.mosaic_gpu_sm90 import supports  # noqa: F401  (asked by the table)
from optx.tensor import is_qtensor


def ragged_paged_attention(q, k_pool, v_pool, **kwargs):
    """As `mosaic_gpu_sm90.ragged_paged_attention`."""
    stored = kernel.pages_of(k_pool.format).code if is_qtensor(k_pool) else "dense"
    tiles = dataclasses.replace(kernel.tiles(q.shape[-1], stored), whole=True)
    return kernel.ragged_paged_attention(q, k_pool, v_pool, tiles=tiles, **kwargs)


def paged_decode(q, k_pool, v_pool, *, q_positions, **kwargs):
    """q [B, Q, N, H], q_positions int32[B, Q], -1 where there is no query -> (out [B, Q, N, H], lse float32[B, Q, N], None)."""
    batch, queries = q_positions.shape
    ragged = Ragged.dense(batch, queries, jnp.sum(q_positions >= 0, axis=1, dtype=jnp.int32))
    asked, real = q_positions.reshape(-1), q_positions >= 0
    ragged = dataclasses.replace(
        ragged, rows=jnp.where(asked >= 0, ragged.rows, batch), positions=jnp.maximum(asked, 0), rectangular=False
    )
    out, lse, _ = ragged_paged_attention(q.reshape(-1, *q.shape[2:]), k_pool, v_pool, ragged=ragged, **kwargs)
    out = jnp.where(real[..., None, None], out.reshape(q.shape), 0)
    nothing = -jnp.inf if (sinks := kwargs.get("sink_logits")) is None else sinks.astype(jnp.float32)
    return out, jnp.where(real[..., None], lse.reshape(q.shape[:-1]), nothing), None
