"""`ragged_paged_attention` on Hopper where a policy of eviction records what tokens attend to.

The kernel gives outputs and lse; a query's attention to a slot is exp(logit - lse), so that a pass over keys alone makes the
scores, and only of queries that count: of SnapKV those are the last 64 of a prompt, and chunks before its end cost nothing. XLA
runs that pass, some tokens of one row at a time.
"""

import math

import jax.numpy as jnp
from jax import lax

from optx.cache import Ragged
from optx.errors import LoweringError
from optx.pallas.attention.reference import REDUCE, Mask, gather_pages
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm90 as kernel

QUERIES = 128  # of a row at a time: bounds the logits that XLA materialises


def supports(args, target) -> str | None:
    """As the kernel's, for calls that ask for scores."""
    if not args.get("want_scores"):
        return "is for calls that record what tokens attend to"
    if args.get("logit_scale"):
        return "records nothing where cached tokens have factors of their logits"
    return kernel.supports({**args, "want_scores": False}, target)


def ragged_paged_attention(
    q,
    k_pool,
    v_pool,
    *,
    ragged: Ragged,
    want_scores=False,
    score_reduce="sum",
    score_weights=None,
    prompts=None,
    **kwargs,
):
    """As the reference: (out [T, N, H], lse float32[T, N], scores float32[B, S, K] or None), for what the kernel takes."""
    out, lse, _ = kernel.ragged_paged_attention(q, k_pool, v_pool, ragged=ragged, **kwargs)
    if not want_scores:
        return out, lse, None
    if kwargs.get("logit_scale") is not None:
        raise LoweringError(f"{kernel.OP} (mosaic_gpu/sm90/scored): logit_scale is given; allowed: None")
    asked = jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)  # [B, Q]
    weights = jnp.ones(asked.shape) if score_weights is None else score_weights(asked, prompts)
    known = {name: kwargs[name] for name in ("positions", "table", "lengths")}
    how = {name: kwargs.get(name) for name in ("mask", "scale", "softcap")}
    scores = _scores(q, k_pool, lse, ragged, jnp.where(ragged.valid, weights, 0), reduce=score_reduce, **known, **how)
    return out, lse, scores


def _scores(q, k_pool, lse, ragged: Ragged, weights, *, positions, table, lengths, reduce, mask, scale, softcap):
    """weights float32[B, Q], 0 of queries that do not count -> float32[B, S, K]."""
    inside, across = REDUCE[reduce]
    mask, scale = mask or Mask(), 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, longest = weights.shape
    blocks = -(-longest // QUERIES)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * QUERIES - longest))).reshape(batch * blocks, QUERIES)
    counted = jnp.any(weights > 0, axis=1)
    order = jnp.nonzero(counted, size=batch * blocks, fill_value=0)[0]
    kv_heads, slots = k_pool.shape[1], jnp.arange(table.shape[2] * positions.shape[1])

    def add(i, total):
        row = order[i] // blocks
        at = ragged.starts[row] + order[i] % blocks * QUERIES + jnp.arange(QUERIES)
        at = jnp.minimum(at, len(q) - 1)
        listed = lax.dynamic_slice_in_dim(table, row, 1, axis=1)
        stored = slots < lengths[0, row]
        keys = jnp.where(stored[:, None, None], gather_pages(k_pool, listed)[0].astype(q.dtype), 0)
        mine = q[at].reshape(QUERIES, kv_heads, -1, q.shape[-1])
        logits = jnp.einsum("qkgh,skh->kqgs", mine, keys, preferred_element_type=jnp.float32) * scale
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        held = jnp.take(positions, listed[0, 0], axis=0, mode="clip").reshape(-1)
        seen = mask(ragged.positions[at][:, None], held[None]) & stored & (weights[order[i]] > 0)[:, None]
        logits = logits - jnp.moveaxis(lse[at].reshape(QUERIES, kv_heads, -1, 1), 0, 1)
        mass = jnp.where(seen[None, :, None], jnp.exp(logits), 0) * weights[order[i]][:, None, None]
        return total.at[row].set(across(total[row], inside(mass, axis=(1, 2)).T))

    return lax.fori_loop(0, jnp.sum(counted), add, jnp.zeros((batch, len(slots), kv_heads), jnp.float32))
