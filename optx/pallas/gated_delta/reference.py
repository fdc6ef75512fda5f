"""gated_delta in plain JAX: the gated delta rule (Yang et al. 2024, arXiv:2412.06464), state in float32.

    S_t = exp(g_t) S_{t-1} + k_t (x) u_t        u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)        o_t = S_t^T q_t

What the state holds for a key is replaced by v, as far as beta says. Chunked (the WY form): with c_t the sum of g from the
chunk's start and S its first state, (I + A) u = beta (v - exp(c) S^T k) where A_ts = beta_t exp(c_t - c_s) k_t . k_s below the
diagonal; one triangular solve a chunk gives u = w - T S for all chunks at once, and what remains is a scan over states.
"""

import jax
import jax.numpy as jnp

CHUNK = 64


def gated_delta(q, k, v, g, beta, state):
    """q and k [B, Q, K, Hk] (key head n // (N / K) serves value head n), v [B, Q, N, Hv], g float32[B, Q, N] <= 0, beta
    [B, Q, N], state float32[B, N, Hk, Hv] -> (o float32[B, Q, N, Hv], new state). g = 0 and beta = 0 leave the state alone.
    """
    heads = v.shape[2]
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    if v.shape[1] == 1:
        o, state = _step(*(x[:, 0] for x in (q, k, v, g, beta)), state)
        return o[:, None], state
    return _chunked(q, k, v, g, beta, state)


def _step(q, k, v, g, beta, state):
    """q and k [B, N, Hk], v [B, N, Hv], g and beta [B, N] -> (o [B, N, Hv], new state)."""
    state = state * jnp.exp(g)[..., None, None]
    update = beta[..., None] * (v - jnp.einsum("bnk,bnkv->bnv", k, state))
    state = state + k[..., None] * update[..., None, :]
    return jnp.einsum("bnk,bnkv->bnv", q, state), state


def _chunked(q, k, v, g, beta, state):
    batch, length, heads, _ = v.shape
    size = min(CHUNK, length)
    count = -(-length // size)

    def chunks(x):
        """[B, Q, N, ...] -> [chunks, B, N, size, ...]; what is added has g = 0 and beta = 0."""
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), (1, 3), (0, 2))

    q, k, v, g, beta = map(chunks, (q, k, v, g, beta))
    decay = jnp.cumsum(g, axis=-1)  # log decay from the chunk's start, [chunks, B, N, size]
    causal = jnp.tril(jnp.ones((size, size), bool))
    # c_t - c_s summed from s on: as a difference a strong decay before s would cost its digits.
    gap = jnp.cumsum(jnp.where(jnp.tril(causal, -1), g[..., None], 0), axis=-2)
    weights = jnp.where(causal, jnp.exp(gap), 0)
    within = jnp.einsum("cbntk,cbnsk->cbnts", q, k) * weights
    system = jnp.einsum("cbntk,cbnsk->cbnts", k, k) * weights * beta[..., None]
    both = jnp.concatenate([v, k * jnp.exp(decay)[..., None]], axis=-1) * beta[..., None]
    # The diagonal is taken to be 1, and what is above it is not read.
    solved = jax.lax.linalg.triangular_solve(system, both, left_side=True, lower=True, unit_diagonal=True)
    new, old = jnp.split(solved, [v.shape[-1]], axis=-1)
    asked = q * jnp.exp(decay)[..., None]
    rest = k * weights[..., -1, :, None]  # what is left at the chunk's end

    def step(state, parts):
        asked, within, new, old, rest, kept = parts
        update = new - old @ state
        o = asked @ state + within @ update
        return state * kept + jnp.einsum("bntk,bntv->bnkv", rest, update), o

    parts = (asked, within, new, old, rest, jnp.exp(decay[..., -1])[..., None, None])
    state, o = jax.lax.scan(step, state, parts)
    return jnp.moveaxis(o, (0, 2), (1, 3)).reshape(batch, count * size, heads, -1)[:, :length], state
