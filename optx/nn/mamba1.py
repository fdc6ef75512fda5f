"""Mamba-1 mixer (Gu and Dao 2023, arXiv:2312.00752): state and convolution tail cached, no tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import CacheSpec, Ragged, Stream, View
from optx.nn.core import Linear, RMSNorm, param
from optx.nn.recurrent import causal_conv, conv_tail, held_states, stored_states
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite


class Mamba1(nnx.Module):
    """x, z = in(x); x = silu(conv(x)); dt, B, C = select(x); y = scan(x, softplus(dt(dt)), A, B, C) + D x; out(y * silu(z)).

    A = -exp(a_log) [C, S] for C inner channels with a state of S numbers each; D is `skip`; dt passes through `rank` numbers.
    With `norm`, dt (of rank), B and C are normed before they are used (Lieber et al. 2024, arXiv:2403.19887).
    """

    def __init__(
        self, d, *, inner, state_dim, rank, conv=4, conv_bias=True, bias=False, norm=None, dtype="float32", rngs=None,
    ):  # fmt: skip
        """bias: of the projections in and out; norm: a callable that builds the RMSNorm of so many numbers, or None."""
        self.inner, self.state_dim, self.rank = inner, state_dim, rank
        self.in_proj = Linear(d, 2 * inner, bias=bias, dtype=dtype, axes=("embed", "inner"), rngs=rngs)
        self.conv_weight = param((conv, inner), dtype, (None, "inner"), rngs)
        self.conv_bias = param((inner,), dtype, ("inner",), rngs, nnx.initializers.zeros) if conv_bias else None
        self.select = Linear(inner, rank + 2 * state_dim, dtype=dtype, axes=("inner", None), rngs=rngs)
        self.dt_norm: RMSNorm | None = norm(rank) if norm else None
        self.b_norm: RMSNorm | None = norm(state_dim) if norm else None
        self.c_norm: RMSNorm | None = norm(state_dim) if norm else None
        self.dt = Linear(rank, inner, dtype=dtype, axes=(None, "inner"), rngs=rngs)
        self.dt_bias = param((inner,), "float32", ("inner",), rngs, nnx.initializers.zeros)
        self.a_log = param((inner, state_dim), "float32", ("inner", None), rngs, nnx.initializers.zeros)
        self.skip = param((inner,), "float32", ("inner",), rngs, nnx.initializers.ones)
        self.out = Linear(inner, d, bias=bias, dtype=dtype, axes=("inner", "embed"), rngs=rngs)
        state = Stream(name="ssm", shape=(inner, state_dim), dtype="float32")
        self.cache = CacheSpec(kind="state", streams=(conv_tail(conv, inner), state), dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        old = held_states(self.cache, ragged, view)
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        bias = None if self.conv_bias is None else self.conv_bias.get_value()
        mixed, tail = causal_conv(ragged.pad(x), old["conv"], self.conv_weight.get_value(), bias, ragged)
        mixed = jax.nn.silu(mixed)
        dt, b, c = (
            # What pads a row are other rows' tokens: dt = 0 leaves the state alone, but 0 * NaN would not.
            jnp.where(ragged.valid[..., None], ragged.pad(t.astype(jnp.float32)), 0)
            for t in self._selected(ragged.unpad(mixed).astype(x.dtype))
        )
        a = -jnp.exp(self.a_log.get_value())
        y, state = dispatch.call("selective_scan", self.choices, mixed, dt, a, b, c, old["ssm"])
        y = ragged.unpad(y + self.skip.get_value() * mixed) * jax.nn.silu(z.astype(jnp.float32))
        return self.out(y.astype(x.dtype)), stored_states(self.cache, {"conv": tail, "ssm": state}, view)

    def _selected(self, x):
        """x [T, C] -> dt float32[T, C], b and c [T, S]."""
        dt, b, c = jnp.split(self.select(x), [self.rank, self.rank + self.state_dim], axis=-1)
        if self.dt_norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        return jax.nn.softplus(self.dt(dt).astype(jnp.float32) + self.dt_bias.get_value()), b, c

    def op_sites(self) -> tuple[OpSite, ...]:
        return (OpSite(op="selective_scan", args={"inner": self.inner, "state_dim": self.state_dim}),)
