"""Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060): state and convolution tail cached, no tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import CacheSpec, Ragged, Stream, View
from optx.errors import ConfigError
from optx.nn.core import Linear, param
from optx.nn.recurrent import GatedRMSNorm, causal_conv, conv_tail, held_states, stored_states
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite


class Mamba2(nnx.Module):
    """z, xBC, dt = in(x); xBC = silu(conv(xBC)); y = ssm(x, dt, A, B, C) + D x; out(norm(y * silu(z))).

    dt = softplus(dt + dt_bias), within `dt_limit`; A = -exp(a_log); D is `skip`. Without a norm, out(y * silu(z)).
    """

    def __init__(
        self, d, *, heads, head_dim, state_dim, groups=1, conv=4, conv_bias=True, bias=False,
        dt_limit: tuple[float, float] | None = None, norm=True, norm_groups=1, gate_first=True, eps=1e-5,
        chunk: int | None = None, dtype="float32", rngs=None,
    ):  # fmt: skip
        """groups: of heads that share B and C; norm_groups: runs of channels normed apart; gate_first: the norm comes
        after the gate; bias: of the projections; chunk: tokens that the scan takes at once, None as the op likes."""
        if heads % groups:
            raise ConfigError(f"state space: {heads} heads do not divide into {groups} groups of B and C")
        self.heads, self.head_dim, self.state_dim, self.groups = heads, head_dim, state_dim, groups
        self.dt_limit, self.chunk = dt_limit, chunk
        inner = heads * head_dim
        channels = inner + 2 * groups * state_dim
        self.in_proj = Linear(d, inner + channels + heads, bias=bias, dtype=dtype, axes=("embed", "inner"), rngs=rngs)
        self.conv_weight = param((conv, channels), dtype, (None, "inner"), rngs)
        self.conv_bias = param((channels,), dtype, ("inner",), rngs, nnx.initializers.zeros) if conv_bias else None
        self.dt_bias = param((heads,), "float32", ("heads",), rngs, nnx.initializers.zeros)
        self.a_log = param((heads,), "float32", ("heads",), rngs, nnx.initializers.zeros)
        self.skip = param((heads,), "float32", ("heads",), rngs, nnx.initializers.ones)
        self.norm: GatedRMSNorm | None = (
            GatedRMSNorm(inner, groups=norm_groups, gate_first=gate_first, eps=eps, dtype=dtype, rngs=rngs)
            if norm
            else None
        )
        self.out = Linear(inner, d, bias=bias, dtype=dtype, axes=("inner", "embed"), rngs=rngs)
        state = Stream(name="ssm", shape=(heads, head_dim, state_dim), dtype="float32")
        self.cache = CacheSpec(kind="state", streams=(conv_tail(conv, channels), state), dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        inner, channels = self.heads * self.head_dim, self.conv_weight.shape[1]
        z, xbc, dt = (ragged.pad(t) for t in jnp.split(self.in_proj(x), [inner, inner + channels], axis=-1))
        y, new = self._mix(xbc, dt, held_states(self.cache, ragged, view), ragged)
        y = y * jax.nn.silu(z.astype(jnp.float32)) if self.norm is None else self.norm(y, z)
        return self.out(ragged.unpad(y.astype(x.dtype))), stored_states(self.cache, new, view)

    def _mix(self, xbc, dt, old, ragged):
        """[B, Q, channels], [B, Q, N], states -> (float32[B, Q, inner], states after each row's last token)."""
        bias = None if self.conv_bias is None else self.conv_bias.get_value()
        mixed, tail = causal_conv(xbc, old["conv"], self.conv_weight.get_value(), bias, ragged)
        inner, wide = self.heads * self.head_dim, self.groups * self.state_dim
        x, b, c = jnp.split(jax.nn.silu(mixed), [inner, inner + wide], axis=-1)
        x = x.reshape(*dt.shape, self.head_dim)
        b, c = (t.reshape(*dt.shape[:2], self.groups, self.state_dim) for t in (b, c))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias.get_value())
        dt = dt if self.dt_limit is None else jnp.clip(dt, *self.dt_limit)
        # What pads a row are other rows' tokens: dt = 0 leaves the state alone (x, b and c are finite: the convolution
        # counts padding as zero).
        dt = jnp.where(ragged.valid[..., None], dt, 0)
        a = -jnp.exp(self.a_log.get_value())
        y, state = dispatch.call("ssm_scan", self.choices, x, dt, a, b, c, old["ssm"], chunk=self.chunk)
        y = y + self.skip.get_value()[:, None] * x
        return y.reshape(*dt.shape[:2], inner), {"conv": tail, "ssm": state}

    def op_sites(self) -> tuple[OpSite, ...]:
        args = {"heads": self.heads, "head_dim": self.head_dim, "state_dim": self.state_dim, "groups": self.groups}
        return (OpSite(op="ssm_scan", args=args),)
