"""Native sparse attention (Yuan et al. 2025, arXiv:2502.11089) over the keys and values of a layer of attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import Pool, Ragged, View
from optx.nn.core import Linear, param
from optx.nn.selecting import DECODE, Selector, asked_of, best
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask
from optx.pallas.compressed_attention.reference import over
from optx.pallas.dispatch import OpSite
from optx.selection import Selection


class Pooling(nnx.Module):
    """x [M, S, K, H] -> mean(x) + up(silu(down(x + position))) of the S tokens, [M, K, H]: compression (section 3.3.1)."""

    def __init__(self, size: int, head_dim: int, hidden: int, *, dtype="float32"):
        self.position = param((size, head_dim), dtype, (None, None), None)
        self.down = Linear(size * head_dim, hidden, dtype=dtype, axes=(None, None))
        self.up = Linear(hidden, head_dim, dtype=dtype, axes=(None, None))

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = jnp.swapaxes(x + self.position.get_value()[:, None], 1, 2)
        return mean(x) + self.up(jax.nn.silu(self.down(flat.reshape(*flat.shape[:2], -1))))


def mean(x: jax.Array) -> jax.Array:
    """x [M, S, K, H] -> [M, K, H]."""
    return jnp.mean(x.astype(jnp.float32), axis=1).astype(x.dtype)


class NSA(Selector):
    """g_c a(compressed) + g_s a(chosen blocks) + g_w a(window) with a sigmoid gate g of x a head and branch, a: attention.

    Compressed keys and values are pooled from `size` tokens every `stride`. A block's score is the weight of the compressed
    tokens that overlap it in the first branch, summed over the query heads of a kv head (equations 8 to 10); the `first` blocks
    and the `local` newest are always among the chosen. All branches read the same keys and values.
    """

    names = ("compressed_k", "compressed_v")

    def __init__(
        self, d, *, heads, head_dim, block, blocks, size, stride, window, first, local, hidden=None, dtype="float32"
    ):
        """hidden: numbers inside the pooling MLPs; None: plain means."""
        self.block, self.blocks, self.every, self.size = block, blocks, stride, size
        self.window, self.first, self.local = window, first, local
        self.gate = Linear(d, 3 * heads, bias=True, dtype=dtype, axes=("embed", "heads"))
        self.pool_k = None if hidden is None else Pooling(size, head_dim, hidden, dtype=dtype)
        self.pool_v = None if hidden is None else Pooling(size, head_dim, hidden, dtype=dtype)

    @property
    def selection(self) -> Selection:
        sizes = {"blocks": self.blocks, "block": self.block, "window": self.window, "stride": self.every}
        return Selection(**sizes, index=self.names)

    def entries(self, k, v):
        pools = (self.pool_k or mean, self.pool_v or mean)
        return {name: pool(x) for name, pool, x in zip(self.names, pools, (k, v), strict=True)}

    def __call__(self, attn, x, q, pool: Pool, ragged: Ragged, view: View | None, attend: Callable) -> jax.Array:
        """x [T, D], q [T, N, H] over the pool -> [T, N, H]. attend: as of `over_parts`."""
        asked = asked_of(ragged)
        pooled, mass = self._compressed(attn, ragged.pad(q), asked, pool, ragged, view)
        picked = {}
        if self.room(ragged, view) > self.block * self.blocks:
            picked = {"picked": ragged.unpad(self._picked(mass, asked, attn.choices)), "block": self.block}
        branches = (
            ragged.unpad(pooled),
            attend("", mask=Mask(), **picked)[0],
            attend("", mask=Mask(window=self.window), tail=True)[0],
        )
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32)).reshape(x.shape[0], attn.heads, 3, 1)
        return sum(gates[:, :, i] * out for i, out in enumerate(branches)).astype(q.dtype)

    def sites(self, facts):
        sizes = {"every": self.every, "size": self.size}
        return (OpSite(op="compressed_attention", args={**facts, **sizes}), OpSite(op="top_blocks", args={}))

    def _compressed(self, attn, q, asked, pool, ragged: Ragged, view: View | None):
        """q [B, Q, N, H] -> attention [B, Q, N, H], its weights by kv head float32[B, Q, K, J]: of few tokens a row by the op
        that is made for them."""
        how = {"every": self.every, "size": self.size, "scale": attn.scale, "softcap": attn.softcap}
        if view is None or ragged.longest > DECODE:
            return over(q, *self.listing(pool, ragged, view).values(), asked=asked, **how)
        where = {"table": view.table, "lengths": view.lengths, "q_positions": asked}
        return dispatch.call(
            "compressed_attention", attn.choices, q, *(pool[name] for name in self.names), **where, **how
        )

    def _picked(self, mass, asked, choices):
        """Weights of compressed tokens [B, Q, K, J] -> chosen blocks."""
        overlap, each = self.size // self.every, self.block // self.every
        count = mass.shape[-1]
        padded = jnp.pad(mass, ((0, 0),) * 3 + ((0, overlap - 1 + -count % each),))
        length = count + -count % each
        spread = sum(padded[..., i : i + length] for i in range(overlap))
        scores = spread.reshape(*spread.shape[:3], -1, each).sum(-1)
        at, own = jnp.arange(scores.shape[-1]), (asked // self.block)[..., None, None]
        forced = (at < self.first) | (at > own - self.local)
        return best(scores, asked, forced, self.blocks, self.block, choices)
