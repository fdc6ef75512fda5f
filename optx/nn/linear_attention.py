"""Linear attention with a fixed decay a head ("lightning attention"): a state of [Hk, Hv] a head, no tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx.cache import CacheSpec, Ragged, Stream, View
from optx.nn.core import ACTIVATIONS, Linear, RMSNorm
from optx.nn.recurrent import held_states, stored_states
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite


class LinearAttention(nnx.Module):
    """q, k, v = act(qkv(x)); S = exp(-r_n) S + k (x) v; out(norm(q S) * sigmoid(gate(x))), without softmax or scale.

    Head n = 1..N forgets at r_n = rate 2^(-8 n / N) a token (Qin et al. 2024, arXiv:2401.04658; MiniMax 2025,
    arXiv:2501.08313). qkv keeps each head's q, k and v together, [D, N (3 H)]; the norm is over all heads at once.
    """

    BY_LAYER = ("rate",)  # printed as a range where layers are folded

    def __init__(
        self, d, *, heads, head_dim, rate=1.0, activation="silu", bias=False, eps=1e-6, dtype="float32", rngs=None
    ):  # fmt: skip
        """rate: of forgetting, in units of 2^(-8 n / N) a token; models lower it from layer to layer; bias: of the
        projections."""
        self.heads, self.head_dim, self.rate, self.activation = heads, head_dim, rate, activation
        inner = heads * head_dim
        self.qkv = Linear(d, 3 * inner, bias=bias, dtype=dtype, axes=("embed", "heads"), rngs=rngs)
        self.gate = Linear(d, inner, bias=bias, dtype=dtype, axes=("embed", "heads"), rngs=rngs)
        self.norm = RMSNorm(inner, eps=eps, dtype=dtype, axes=("heads",), rngs=rngs)
        self.out = Linear(inner, d, bias=bias, dtype=dtype, axes=("heads", "embed"), rngs=rngs)
        state = Stream(name="kv", shape=(heads, head_dim, head_dim), dtype="float32")
        self.cache = CacheSpec(kind="state", streams=(state,), dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    @property
    def decays(self) -> np.ndarray:
        """float32[N]: log of what a token leaves of each head's state."""
        return np.float32(-self.rate * 2.0 ** (-8 * np.arange(1, self.heads + 1) / self.heads))

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        valid = ragged.valid[..., None]
        qkv = ragged.pad(ACTIVATIONS[self.activation](self.qkv(x)))
        # What pads a row are other rows' tokens: with k = 0 they leave nothing in the state, but 0 * NaN would.
        qkv = jnp.where(valid, qkv, 0).reshape(*qkv.shape[:2], self.heads, 3 * self.head_dim)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        old = held_states(self.cache, ragged, view)
        y, state = dispatch.call("linear_attention", self.choices, q, k, v, jnp.where(valid, self.decays, 0), old["kv"])
        y = self.norm(ragged.unpad(y).reshape(x.shape[0], -1)).astype(x.dtype)
        return self.out(y * jax.nn.sigmoid(self.gate(x))), stored_states(self.cache, {"kv": state}, view)

    def op_sites(self) -> tuple[OpSite, ...]:
        args = {"heads": self.heads, "key_dim": self.head_dim, "value_dim": self.head_dim}
        return (OpSite(op="linear_attention", args=args),)
