"""selective_scan in plain JAX: the Mamba-1 recurrence (Gu and Dao 2023, arXiv:2312.00752), state in float32.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t        y_t = h_t C_t

Decays differ by channel and by state, so no matmul stands for the recurrence: inside a chunk it is an associative scan,
across chunks a scan over states, which bounds what is held at once to `CHUNK` states a row.
"""

import jax
import jax.numpy as jnp

CHUNK = 32


def selective_scan(x, dt, a, b, c, state):
    """x [B, Q, C], dt float32[B, Q, C] (0 leaves the state alone), a float32[C, S] < 0, b and c [B, Q, S], state
    float32[B, C, S] -> (y float32[B, Q, C], new state)."""
    batch, length, channels = x.shape
    size = min(CHUNK, length)
    count = -(-length // size)
    pad = count * size - length
    parts = (jnp.pad(t.astype(jnp.float32), ((0, 0), (0, pad), (0, 0))) for t in (x, dt, b, c))

    def chunks(t):
        return jnp.moveaxis(t.reshape(batch, count, size, -1), 1, 0)

    def step(state, parts):
        x, dt, b, c = parts
        decay = jnp.exp(dt[..., None] * a)  # [B, Q, C, S]
        added = (dt * x)[..., None] * b[:, :, None]
        decay, added = jax.lax.associative_scan(_after, (decay, added), axis=1)
        states = decay * state[:, None] + added
        return states[:, -1], jnp.einsum("bqcs,bqs->bqc", states, c)

    state, y = jax.lax.scan(step, state, tuple(chunks(t) for t in parts))
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * size, channels)[:, :length], state


def _after(first, second):
    """h -> decay h + added, twice."""
    (decay, added), (then, more) = first, second
    return decay * then, added * then + more
