"""Attention over the cached tokens that an index picks, in plain JAX: this file defines the op, kernels must match it."""

import math

import jax
import jax.numpy as jnp

from optx.pallas.attention.reference import Mask, attend, gather_pages
from optx.tensor import Tensor, dense

GATHERED = 1 << 18  # tokens that a block of queries gathers: 300 MB of latents of 576 numbers in bfloat16


def _softmax(products: jax.Array, seen: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(seen[:, None], products, -1e30), axis=-1)


RULES = {
    "relu": lambda products, seen: jax.nn.relu(products),
    "softmax": _softmax,
}  # f, of products [B, N, S], seen [B, S]


def index_scores(q, weights, keys, seen, rule: str = "relu") -> jax.Array:
    """I_s = sum_n w_n f(q_n . k_s): q [B, N, H], weights float32[B, N], keys [B, S, H], seen bool[B, S] -> float32[B, S].

    relu: DeepSeek-V3.2 (arXiv:2512.02556, eq. 1); softmax: f is the share of s among what is seen.
    """
    products = jnp.einsum("bnh,bsh->bns", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("bn,bns->bs", weights, RULES[rule](products, seen))


def indexed_attention(
    q: jax.Array,
    k_pool: Tensor,
    index_q: jax.Array,
    index_weights: jax.Array,
    index_pool: Tensor,
    *,
    top_k: int,
    value_dim: int | None = None,
    v_pool: Tensor | None = None,
    rule: str = "relu",
    positions: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    q_positions: jax.Array,
    mask: Mask = Mask(),
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v over the `top_k` tokens, of those that the mask shows, with the highest index scores.

    q [B, Q, N, H]; k_pool and v_pool [pages, K, P, H], dense or packed; v_pool None: values are the first `value_dim` numbers of
    keys (latents); index_q
    [B, Q, Ni, Hi], index_weights float32[B, Q, Ni], index_pool [pages, 1, P, Hi]; positions int32[pages, P]; table
    int32[1, B, pages]; lengths int32[1, B] cached slots; q_positions int32[B, Q], -1 where there is no query.
    rule: of `index_scores`; softcap, sink_logits: as of `attend`. -> out [B, Q, N, Hv].
    """
    table, (_, page), b = table[0], positions.shape, q.shape[0]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = gather_pages(index_pool, table[None])[:, :, 0]
    at = jnp.take(positions, table, axis=0, mode="clip").reshape(b, -1)
    stored = jnp.arange(at.shape[1]) < lengths[0][:, None]
    top_k = min(top_k, at.shape[1])

    def one(query):
        """A query of every row."""
        q, index_q, weights, asked = query
        asked = asked[:, None]
        seen = mask(asked, at) & (asked >= 0) & stored
        scores = jnp.where(seen, index_scores(index_q, weights, keys, seen, rule), -jnp.inf)
        _, slots = jax.lax.top_k(scores, top_k)
        real = jnp.take_along_axis(seen, slots, axis=1)
        pages = jnp.take_along_axis(table, slots // page, axis=1)

        def picked(pool):
            found = dense(jax.tree.map(lambda part: part[pages, :, slots % page], pool)).astype(q.dtype)
            return jnp.where(real[..., None, None], found, 0)  # what no query sees may be NaN

        k = picked(k_pool)
        v = k[..., :value_dim] if v_pool is None else picked(v_pool)
        more = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        return attend(q[:, None], k, v, real[:, None, None], **more)[0][:, 0]

    queries = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, index_q, index_weights, q_positions))
    out = jax.lax.map(one, queries, batch_size=max(1, GATHERED // (b * top_k)))
    return jnp.moveaxis(out, 0, 1)
