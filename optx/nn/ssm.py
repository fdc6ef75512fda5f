"""Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060): state and convolution tail cached, no tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import CacheSpec, Ragged, Stream, View
from optx.nn.core import Linear, RMSNorm, param
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite


class Mamba2(nnx.Module):
    """z, xBC, dt = in(x); xBC = silu(conv(xBC)); y = ssm(x, dt, A, B, C) + D x; out(norm(y * silu(z)))."""

    def __init__(self, d, *, heads, head_dim, state_dim, groups=1, conv=4, eps=1e-5, dtype="float32", rngs=None):
        self.heads, self.head_dim, self.state_dim, self.groups, self.conv = heads, head_dim, state_dim, groups, conv
        inner = heads * head_dim
        channels = inner + 2 * groups * state_dim
        self.in_proj = Linear(d, inner + channels + heads, dtype=dtype, axes=("embed", "inner"), rngs=rngs)
        self.conv_weight = param((conv, channels), dtype, (None, "inner"), rngs)
        self.conv_bias = param((channels,), dtype, ("inner",), rngs, nnx.initializers.zeros)
        self.dt_bias = param((heads,), "float32", ("heads",), rngs, nnx.initializers.zeros)
        self.a_log = param((heads,), "float32", ("heads",), rngs, nnx.initializers.zeros)
        self.skip = param((heads,), "float32", ("heads",), rngs, nnx.initializers.ones)
        self.norm = RMSNorm(inner, eps=eps, dtype=dtype, axes=("inner",), rngs=rngs)
        self.out = Linear(inner, d, dtype=dtype, axes=("inner", "embed"), rngs=rngs)
        streams = (
            Stream(name="conv", shape=(conv - 1, channels)),
            Stream(name="ssm", shape=(heads, head_dim, state_dim), dtype="float32"),
        )
        self.cache = CacheSpec(kind="state", streams=streams, dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        inner, channels = self.heads * self.head_dim, self.conv_weight.shape[1]
        z, xbc, dt = jnp.split(self.in_proj(x), [inner, inner + channels], axis=-1)
        z, xbc, dt = ragged.pad(z), ragged.pad(xbc), ragged.pad(dt)
        fresh = {s.name: jnp.zeros((ragged.batch, *s.shape), s.dtype or self.cache.dtype) for s in self.cache.streams}
        if view is None:
            old = fresh
        else:
            # A row whose first token is at position 0 starts from nothing, whoever had the slot before.
            first = ragged.pad(ragged.positions)[:, 0] == 0
            held = {name: jnp.take(pool, view.slots, axis=0, mode="clip") for name, pool in view.pool.items()}
            old = {
                name: jnp.where(first.reshape(-1, *[1] * (held[name].ndim - 1)), fresh[name], held[name])
                for name in held
            }
        y, new = self._mix(xbc, dt, old, ragged)
        y = self.norm((y * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype))
        pool = {} if view is None else self.cache.append(view.pool, new, view.slots)
        return self.out(ragged.unpad(y)), pool

    def _mix(self, xbc, dt, old, ragged):
        """[B, Q, channels], [B, Q, N], states -> (float32[B, Q, inner], states after each row's last token)."""
        b, length = dt.shape[:2]
        # What pads a row are other rows' tokens: dt = 0 leaves the state alone, but 0 * NaN would not.
        xbc = jnp.where(ragged.valid[..., None], xbc, 0)
        tail = jnp.concatenate([old["conv"].astype(xbc.dtype), xbc], axis=1)
        weight = self.conv_weight.get_value()
        mixed = sum(tail[:, i : i + length] * weight[i] for i in range(self.conv)) + self.conv_bias.get_value()
        keep = ragged.counts[:, None] + jnp.arange(self.conv - 1)
        new_tail = jnp.take_along_axis(tail, keep[..., None], axis=1)
        inner, wide = self.heads * self.head_dim, self.groups * self.state_dim
        x, bs, cs = jnp.split(jax.nn.silu(mixed.astype(jnp.float32)), [inner, inner + wide], axis=-1)
        x = x.reshape(b, length, self.heads, self.head_dim)
        bs, cs = (t.reshape(b, length, self.groups, self.state_dim) for t in (bs, cs))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias.get_value())
        dt = jnp.where(ragged.valid[..., None], dt, 0)
        a = -jnp.exp(self.a_log.get_value())
        y, state = dispatch.call("ssm_scan", self.choices, x, dt, a, bs, cs, old["ssm"])
        y = y + self.skip.get_value()[:, None] * x
        return y.reshape(b, length, -1), {"conv": new_tail, "ssm": state}

    def op_sites(self) -> tuple[OpSite, ...]:
        args = {"heads": self.heads, "head_dim": self.head_dim, "state_dim": self.state_dim, "groups": self.groups}
        return (OpSite(op="ssm_scan", args=args),)
