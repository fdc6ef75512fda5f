"""What recurrent mixers have in common: states at the start of a step, the causal convolution before a recurrence and the
gated norm after it.

A recurrent mixer has a cache of kind "state". A step gives each of its B rows Q = `ragged.longest` places, of which the first
`ragged.counts` are tokens (`ragged.pad`, `ragged.valid`); what lies past them are other rows' tokens, maybe NaN, so a mixer
masks them before it mixes. Its call reads

    old = held_states(self.cache, ragged, view)                              # {stream: [B, ...]}
    y, tail = causal_conv(ragged.pad(x), old["conv"], weight, bias, ragged)  # the state after each row's last token
    ...
    return self.out(ragged.unpad(y)), stored_states(self.cache, {"conv": tail, ...}, view)
"""

import jax
import jax.numpy as jnp

from optx.cache import CacheSpec, Pool, Ragged, Stream, View
from optx.errors import ConfigError
from optx.nn.core import RMSNorm


def held_states(spec: CacheSpec, ragged: Ragged, view: View | None) -> dict[str, jax.Array]:
    """States that each row's tokens continue, [B, *shape] by stream, in the stream's dtype.

    Zeros without caches, and for a row whose first token is at position 0: it starts from nothing, whoever had the slot
    before. Idle rows hold what is in the row that takes the writes of padding.
    """
    fresh = {s.name: jnp.zeros((ragged.batch, *s.shape), s.dtype or spec.dtype) for s in spec.streams}
    if view is None:
        return fresh
    first = (ragged.pad(ragged.positions)[:, 0] == 0) & (ragged.counts > 0)
    held = {name: jnp.take(pool, view.slots, axis=0, mode="clip") for name, pool in view.pool.items()}
    return {name: jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), fresh[name], x) for name, x in held.items()}


def stored_states(spec: CacheSpec, new: dict[str, jax.Array], view: View | None) -> Pool:
    """The layer's pool with `new` [B, *shape] by stream in the rows' slots; without caches there is none."""
    return {} if view is None else spec.append(view.pool, new, view.slots)


def conv_tail(width: int, channels: int, name: str = "conv") -> Stream:
    """The stream of `causal_conv`: the last width - 1 inputs of a row, oldest first."""
    return Stream(name=name, shape=(width - 1, channels))


def causal_conv(
    x: jax.Array, tail: jax.Array, weight: jax.Array, bias: jax.Array | None, ragged: Ragged
) -> tuple[jax.Array, jax.Array]:
    """Depthwise convolution over a row's tokens: y_t = sum_w weight_w x_(t - W + 1 + w) + bias, without activation.

    x [B, Q, C], tail [B, W - 1, C] the inputs before them, weight [W, C] (kind "conv" of a checkpoint's [C, 1, W]), bias [C]
    or None -> (y float32[B, Q, C], the tail after each row's last token [B, W - 1, C] in x's dtype). Rows' padding counts as
    zero; a row without tokens keeps its tail.
    """
    length, width = x.shape[1], weight.shape[0]
    x = jnp.where(ragged.valid[..., None], x, 0)
    seen = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    taps = weight.astype(jnp.float32)
    y = sum(seen[:, w : w + length].astype(jnp.float32) * taps[w] for w in range(width))
    keep = ragged.counts[:, None] + jnp.arange(width - 1)
    return y if bias is None else y + bias.astype(jnp.float32), jnp.take_along_axis(seen, keep[..., None], axis=1)


class GatedRMSNorm(RMSNorm):
    """rms(y silu(z)) weight, or rms(y) weight silu(z) with gate_first False, in float32.

    groups > 1: the mean is over each of so many runs of channels apart (Dao and Gu 2024, arXiv:2405.21060, section 8.2), which
    keeps a norm inside the device that holds its heads.
    """

    def __init__(self, d, *, groups=1, gate_first=True, eps=1e-5, dtype="float32", axes=("inner",), rngs=None):
        if d % groups:
            raise ConfigError(f"norm: {d} channels do not divide into {groups} groups")
        super().__init__(d, eps=eps, dtype=dtype, axes=axes, rngs=rngs)
        self.groups, self.gate_first = groups, gate_first

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """y and z [..., D] -> float32[..., D]."""
        y, gate = y.astype(jnp.float32), jax.nn.silu(z.astype(jnp.float32))
        y = y * gate if self.gate_first else y
        parts = y.reshape(*y.shape[:-1], self.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + self.eps)
        y = parts.reshape(y.shape) * self.weight.get_value().astype(jnp.float32)
        return y if self.gate_first else y * gate
