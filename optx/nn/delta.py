"""Gated DeltaNet mixer (Yang et al. 2024, arXiv:2412.06464): state and convolution tail cached, no tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import CacheSpec, Ragged, Stream, View
from optx.errors import ConfigError
from optx.nn.core import Linear, RMSNorm, param
from optx.nn.recurrent import causal_conv, conv_tail, held_states, stored_states
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite

NORM_EPS = 1e-6  # of the length of queries and keys


class HeadLinear(Linear):
    """Linear whose outputs are several things, one after the other: `sizes[i]` numbers of each of `groups` heads."""

    def __init__(self, d, groups: int, sizes: tuple[int, ...], **kwargs):
        super().__init__(d, groups * sum(sizes), **kwargs)
        self.groups, self.sizes = groups, sizes

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """x [T, D] -> the things, [T, groups * sizes[i]] each."""
        ends = [self.groups * sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return jnp.split(self(x), ends, axis=-1)


class GatedDelta(nnx.Module):
    """q, k, v, z = qkvz(x); b, a = ba(x); q, k, v = silu(conv(q|k|v)); q = |q| / sqrt(Hk), k = |k| (of length 1);
    g = -exp(a_log) softplus(a + dt_bias); o = gated_delta(q, k, v, g, sigmoid(b)); out(norm(o) * silu(z)), heads normed apart.

    Key head n // (N / K) serves value head n.
    """

    def __init__(
        self, d, *, heads, key_heads, head_dim, key_dim, conv=4, bias=False, eps=1e-6, dtype="float32", rngs=None
    ):  # fmt: skip
        """heads and head_dim are of the values; bias: of the projections. Raises ConfigError when heads do not group."""
        if heads % key_heads:
            raise ConfigError(f"gated delta: {heads} value heads do not divide into {key_heads} key heads")
        self.heads, self.key_heads, self.head_dim, self.key_dim = heads, key_heads, head_dim, key_dim
        each = heads // key_heads
        wide = each * head_dim
        channels = key_heads * (2 * key_dim + wide)
        make = {"dtype": dtype, "rngs": rngs}
        project = functools.partial(HeadLinear, d, key_heads, bias=bias, **make)
        self.qkvz = project((key_dim, key_dim, wide, wide), axes=("embed", "inner"))
        self.ba = project((each, each), axes=("embed", "heads"))
        self.conv_weight = param((conv, channels), dtype, (None, "inner"), rngs)
        self.dt_bias = param((heads,), "float32", ("heads",), rngs, nnx.initializers.ones)
        self.a_log = param((heads,), "float32", ("heads",), rngs, nnx.initializers.zeros)
        self.norm = RMSNorm(head_dim, eps=eps, axes=("head",), **make)
        self.out = Linear(heads * head_dim, d, bias=bias, axes=("inner", "embed"), **make)
        state = Stream(name="delta", shape=(heads, key_dim, head_dim), dtype="float32")
        self.cache = CacheSpec(kind="state", streams=(conv_tail(conv, channels), state), dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        old = held_states(self.cache, ragged, view)
        *qkv, z = self.qkvz.parts(x)
        b, a = (ragged.pad(t).astype(jnp.float32) for t in self.ba.parts(x))
        qkv = ragged.pad(jnp.concatenate(qkv, axis=-1))
        mixed, tail = causal_conv(qkv, old["conv"], self.conv_weight.get_value(), None, ragged)
        q, k, v = self._heads(jax.nn.silu(mixed))
        # What pads a row leaves the state alone.
        g = -jnp.exp(self.a_log.get_value()) * jax.nn.softplus(a + self.dt_bias.get_value())
        g, beta = (jnp.where(ragged.valid[..., None], t, 0) for t in (g, jax.nn.sigmoid(b)))
        o, state = dispatch.call("gated_delta", self.choices, q, k, v, g, beta, old["delta"])
        y = self.norm(ragged.unpad(o)).reshape(x.shape[0], -1) * jax.nn.silu(z.astype(jnp.float32))
        return self.out(y.astype(x.dtype)), stored_states(self.cache, {"conv": tail, "delta": state}, view)

    def _heads(self, mixed):
        """[B, Q, q|k|v] -> q [B, Q, K, Hk] of length 1 / sqrt(Hk), k of length 1, v [B, Q, N, Hv]."""
        keys = self.key_heads * self.key_dim
        q, k, v = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        q, k = (t.reshape(*t.shape[:2], self.key_heads, self.key_dim) for t in (q, k))
        q, k = (t * jax.lax.rsqrt(jnp.sum(t * t, axis=-1, keepdims=True) + NORM_EPS) for t in (q, k))
        return q * self.key_dim**-0.5, k, v.reshape(*v.shape[:2], self.heads, self.head_dim)

    def op_sites(self) -> tuple[OpSite, ...]:
        names = ("heads", "key_heads", "head_dim", "key_dim")
        return (OpSite(op="gated_delta", args={name: getattr(self, name) for name in names}),)
