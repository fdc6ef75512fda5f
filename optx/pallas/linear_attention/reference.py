"""linear_attention in plain JAX: attention without softmax, whose state fades (Qin et al. 2024, arXiv:2401.04658).

    S_t = exp(g_t) S_{t-1} + k_t (x) v_t        y_t = q_t S_t

Chunked: inside a chunk the recurrence is a masked matmul, across chunks a scan over states. State in float32.
"""

import jax
import jax.numpy as jnp

CHUNK = 64


def linear_attention(q, k, v, log_decay, state):
    """q and k [B, Q, N, Hk], v [B, Q, N, Hv], log_decay float32[B, Q, N] <= 0 (0 with k = 0 leaves the state alone), state
    float32[B, N, Hk, Hv] -> (y float32[B, Q, N, Hv], new state)."""
    batch, length, heads, width = v.shape
    size = min(CHUNK, length)
    count = -(-length // size)
    pad = count * size - length
    parts = (
        jnp.pad(t.astype(jnp.float32), ((0, 0), (0, pad)) + ((0, 0),) * (t.ndim - 2)) for t in (q, k, v, log_decay)
    )
    causal = jnp.tril(jnp.ones((size, size), bool))[..., None]
    after = jnp.tril(causal[..., 0], -1)[..., None]

    def chunks(t):
        return jnp.moveaxis(t.reshape(batch, count, size, *t.shape[2:]), 1, 0)

    def step(state, parts):
        q, k, v, log_decay = parts
        # Summed apart for each pair of tokens: a difference of sums from the chunk's start would lose digits.
        gap = jnp.cumsum(jnp.where(after, log_decay[:, :, None], 0), axis=1)  # [B, to, from, N]
        weights = jnp.where(causal, jnp.exp(gap), 0)
        since = jnp.exp(jnp.cumsum(log_decay, axis=1))[..., None]  # what is left of the state before the chunk
        y = jnp.einsum("btfn,bfnh->btnh", jnp.einsum("btns,bfns->btfn", q, k) * weights, v)
        y = y + jnp.einsum("btns,bnsh->btnh", q, state) * since
        state = state * since[:, -1, ..., None] + jnp.einsum("bqns,bqnh->bnsh", k * weights[:, -1, ..., None], v)
        return state, y

    state, y = jax.lax.scan(step, state, tuple(chunks(t) for t in parts))
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * size, heads, width)[:, :length], state
