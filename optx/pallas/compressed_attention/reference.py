"""Attention over compressed tokens in plain JAX: this file defines the op, kernels must match it."""

import jax
import jax.numpy as jnp

from optx.pallas.attention.reference import gather_pages


def over(q, k, v, *, every: int, size: int, asked, scale: float, softcap: float | None = None):
    """softmax(scale q k^T) v over the entries that end at or before a query; nothing where there are none.

    q [B, Q, N, H]; k and v [B, J, K, H], entry j made of the `size` tokens before position (j + 1) `every`; asked int32[B, Q]:
    positions, -1 where there is no query. -> (out [B, Q, N, H], weights summed over the heads of a kv head float32[B, Q, K, J]).
    """
    ends = (jnp.arange(k.shape[1]) + 1) * every
    there = ends >= size
    seen = ((ends <= asked[..., None] + 1) & there)[:, :, None, None]
    real = ((ends <= jnp.max(asked, axis=1, keepdims=True) + 1) & there)[..., None, None]
    k, v = jnp.where(real, k, 0).astype(q.dtype), jnp.where(real, v, 0).astype(q.dtype)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = jnp.einsum("bqkgh,bjkh->bqkgj", grouped, k, preferred_element_type=jnp.float32) * scale
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0)
    out = jnp.einsum("bqkgj,bjkh->bqkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), weights.sum(3)


def compressed_attention(q, k_pool, v_pool, *, table, lengths, q_positions, **kwargs):
    """`over` entries that lie in pages: pools [pages + 1, K, E, H] of E entries a page and kv head, table int32[1, B, pages];
    lengths int32[1, B] cached tokens; q_positions int32[B, Q]."""
    k, v = (gather_pages(pool, table) for pool in (k_pool, v_pool))
    return over(q, k, v, asked=q_positions, **kwargs)
