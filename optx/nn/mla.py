"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one latent of R + Hr numbers a token for all heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import CacheSpec, Ragged, Stream, View
from optx.nn.attention import attend_cached, attention_sites
from optx.nn.core import Inner, Linear, RMSNorm, Rope
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask
from optx.pallas.dispatch import OpChoice, OpSite
from optx.tensor import dense


class MLA(nnx.Module):
    """c = norm(x W_DKV) [R], k_r = rope(x W_KR) [Hr];  k_h = [W_UK,h c, k_r], v_h = W_UV,h c.

    Only [c, k_r] is cached. Over caches the up-projections are absorbed into queries and outputs (q' = W_UK^T q), so that
    all heads read one latent; without caches keys and values are expanded.
    """

    def __init__(
        self, d, *, heads, rank, nope_dim, value_dim, rope: Rope, q_rank=None, eps=1e-6, dtype="float32", rngs=None
    ):
        self.heads, self.rank, self.nope_dim, self.value_dim = heads, rank, nope_dim, value_dim
        self.rope = rope
        width = nope_dim + rope.dim
        self.scale = width**-0.5
        self.q_a = Linear(d, q_rank, dtype=dtype, axes=("embed", "rank"), rngs=rngs) if q_rank else None
        self.q_norm = RMSNorm(q_rank, eps=eps, dtype=dtype, axes=("rank",), rngs=rngs) if q_rank else None
        self.q_b = Linear(q_rank or d, heads * width, dtype=dtype, axes=("rank", "heads"), rngs=rngs)
        self.kv_a = Linear(d, rank + rope.dim, dtype=dtype, axes=("embed", "rank"), rngs=rngs)
        self.kv_norm = RMSNorm(rank, eps=eps, dtype=dtype, axes=("rank",), rngs=rngs)
        self.kv_b = Inner(rank, heads * (nope_dim + value_dim), dtype=dtype, axes=("rank", "heads"), rngs=rngs)
        self.o = Linear(heads * value_dim, d, dtype=dtype, axes=("heads", "embed"), rngs=rngs)
        streams = (Stream(name="latent", shape=(1, rank + rope.dim)),)
        self.cache = CacheSpec(kind="latent", streams=streams, dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    @property
    def mask(self) -> Mask:
        return Mask(window=self.cache.window, sinks=self.cache.sinks)

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        q = self.q_b(x if self.q_a is None else self.q_norm(self.q_a(x))).reshape(x.shape[0], self.heads, -1)
        q_nope, q_rope = q[..., : self.nope_dim], self.rope(q[..., self.nope_dim :], ragged.positions)
        low = self.kv_a(x)
        latent = self.kv_norm(low[:, : self.rank])
        k_rope = self.rope(low[:, None, self.rank :], ragged.positions)[:, 0]
        up = dense(self.kv_b.weight.get_value()).astype(x.dtype).reshape(self.rank, self.heads, -1)
        up_k, up_v = up[..., : self.nope_dim], up[..., self.nope_dim :]
        entry = jnp.concatenate([latent, k_rope], axis=-1)[:, None]
        if view is None or view.writes is None:
            pool, stored = {}, self.cache.as_stored({"latent": entry})["latent"][:, 0]
            latent, k_rope = stored[:, : self.rank], stored[:, self.rank :]
            out = self._expanded(q_nope, q_rope, latent, k_rope, up_k, up_v, ragged)
        else:
            pool = self.cache.append(view.pool, {"latent": entry}, view.writes)
            q = jnp.concatenate([jnp.einsum("tnh,rnh->tnr", q_nope, up_k), q_rope], axis=-1)
            kwargs = {"mask": self.mask, "scale": self.scale, "value_dim": self.rank}
            out = attend_cached(self.choices, q, pool["latent"], None, ragged, view, **kwargs)
            out = jnp.einsum("tnr,rnh->tnh", out, up_v)
        return self.o(out.reshape(x.shape[0], -1)), pool

    def _expanded(self, q_nope, q_rope, latent, k_rope, up_k, up_v, ragged):
        shared = jnp.broadcast_to(k_rope[:, None], (k_rope.shape[0], self.heads, k_rope.shape[1]))
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k = jnp.concatenate([jnp.einsum("tr,rnh->tnh", latent, up_k), shared], axis=-1)
        v = jnp.einsum("tr,rnh->tnh", latent, up_v)
        args = (ragged.pad(q), ragged.pad(k), ragged.pad(v))
        out, _, _ = dispatch.call(
            "flash_attention", self.choices, *args, mask=self.mask, scale=self.scale, valid=ragged.valid
        )
        return ragged.unpad(out)

    def op_sites(self) -> tuple[OpSite, ...]:
        facts = {
            "heads": self.heads,
            "kv_heads": 1,
            "head_dim": self.rank + self.rope.dim,
            "value_dim": self.rank,
            "dtype": jnp.dtype(self.o.weight.get_value().dtype).name,
            "cache": self.cache,
            "mask": self.mask,
            "softcap": None,
        }
        width = self.nope_dim + self.rope.dim
        return attention_sites(facts, {"kv_heads": self.heads, "head_dim": width, "value_dim": self.value_dim})
