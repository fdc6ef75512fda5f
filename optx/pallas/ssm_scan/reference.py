"""ssm_scan in plain JAX: the Mamba-2 recurrence (Dao and Gu 2024, arXiv:2405.21060), state in float32.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t        y_t = h_t C_t

Chunked: inside a chunk the recurrence is a masked matmul, across chunks a scan over states.
"""

import jax
import jax.numpy as jnp

CHUNK = 64


def ssm_scan(x, dt, a, b, c, state, *, chunk: int | None = None):
    """x [B, Q, N, H], dt float32[B, Q, N] (0 leaves the state alone), a float32[N] < 0, b and c [B, Q, G, S] (head n is of
    group n // (N / G)), state float32[B, N, H, S]; chunk: tokens at once, None for 64 -> (y float32[B, Q, N, H], new
    state)."""
    batch, length, heads, width = x.shape
    groups = b.shape[2]
    size = min(chunk or CHUNK, length)
    count = -(-length // size)
    pad = count * size - length
    x, dt, b, c = (jnp.pad(t.astype(jnp.float32), ((0, 0), (0, pad)) + ((0, 0),) * (t.ndim - 2)) for t in (x, dt, b, c))
    each = (groups, heads // groups)  # G groups of R heads
    x, dt, a = x.reshape(*x.shape[:2], *each, width), dt.reshape(*dt.shape[:2], *each), a.reshape(each)
    causal = jnp.tril(jnp.ones((size, size), bool))[:, :, None, None]

    def step(state, parts):
        x, dt, b, c = parts
        decay = jnp.cumsum(dt * a, axis=1)  # log decay from the chunk's start, [B, Q, G, R]
        gap = decay[:, :, None] - decay[:, None]  # [B, to, from, G, R]
        weights = jnp.where(causal, jnp.exp(jnp.where(causal, gap, 0)), 0) * dt[:, None]
        scores = jnp.einsum("btgs,bfgs->btfg", c, b)
        y = jnp.einsum("btfgr,bfgrh->btgrh", scores[..., None] * weights, x)
        y = y + jnp.einsum("btgs,bgrhs->btgrh", c, state) * jnp.exp(decay)[..., None]
        rest = jnp.exp(decay[:, -1:] - decay) * dt  # what is left at the chunk's end
        state = state * jnp.exp(decay[:, -1])[..., None, None]
        return state + jnp.einsum("bqgrh,bqgs->bgrhs", rest[..., None] * x, b), y

    def chunks(t):
        return jnp.moveaxis(t.reshape(batch, count, size, *t.shape[2:]), 1, 0)

    state = state.reshape(batch, *each, *state.shape[2:])
    if count == 1:
        state, y = step(state, (x, dt, b, c))
    else:
        state, y = jax.lax.scan(step, state, tuple(chunks(t) for t in (x, dt, b, c)))
        y = jnp.moveaxis(y, 0, 1)
    y = y.reshape(batch, count * size, heads, width)[:, :length]
    return y, state.reshape(batch, heads, width, -1)
