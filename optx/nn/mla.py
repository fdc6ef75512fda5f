"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one latent of R + Hr numbers a token for all heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx import near
from optx.cache import CacheSpec, Ragged, Stream, View
from optx.nn.attention import attend_cached, attention_sites, mask_of, over_parts
from optx.nn.core import Inner, Linear, RMSNorm, Rope
from optx.nn.indexer import Indexer
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask
from optx.pallas.dispatch import OpChoice, OpSite
from optx.pools import as_pages
from optx.tensor import dense


class MLA(nnx.Module):
    """c = norm(x W_DKV) [R], k_r = rope(x W_KR) [Hr];  k_h = [W_UK,h c, k_r], v_h = W_UV,h c.

    Only [c, k_r] is cached. Over caches the up-projections are absorbed into queries and outputs (q' = W_UK^T q), so that
    all heads read one latent; without caches keys and values are expanded.

    An indexer, whose keys are cached beside the latents, picks the tokens that a query sees. Where no more can be listed
    than it picks, it picks all, and attention is dense.
    """

    def __init__(
        self, d, *, heads, rank, nope_dim, value_dim, rope: Rope, q_rank=None, scale=None, bias=False, eps=1e-6,
        indexer: Indexer | None = None, dtype="float32", rngs=None,
    ):  # fmt: skip
        """rope turns the last `rope.dim` numbers of a head; q_rank None: queries have no latent; bias: of the
        projections from and to the stream; scale None: 1 / sqrt(nope_dim + rope.dim)."""
        self.heads, self.rank, self.nope_dim, self.value_dim = heads, rank, nope_dim, value_dim
        self.rope = rope
        width = nope_dim + rope.dim
        self.scale = width**-0.5 if scale is None else scale
        wide = {"dtype": dtype, "axes": ("rank", "heads"), "rngs": rngs}
        low = {"bias": bias, "dtype": dtype, "axes": ("embed", "rank"), "rngs": rngs}
        self.q = None if q_rank else Linear(d, heads * width, dtype=dtype, axes=("embed", "heads"), rngs=rngs)
        self.q_a = Linear(d, q_rank, **low) if q_rank else None
        self.q_norm = RMSNorm(q_rank, eps=eps, dtype=dtype, axes=("rank",), rngs=rngs) if q_rank else None
        self.q_b = Linear(q_rank, heads * width, **wide) if q_rank else None
        self.kv_a = Linear(d, rank + rope.dim, **low)
        self.kv_norm = RMSNorm(rank, eps=eps, dtype=dtype, axes=("rank",), rngs=rngs)
        self.kv_b = Inner(rank, heads * (nope_dim + value_dim), **wide)
        self.o = Linear(heads * value_dim, d, bias=bias, dtype=dtype, axes=("heads", "embed"), rngs=rngs)
        self.indexer = indexer
        streams = (Stream(name="latent", shape=(1, rank + rope.dim)), *([indexer.stream] if indexer else []))
        self.cache = CacheSpec(kind="latent", streams=streams, dtype=dtype)
        self.choices: tuple[OpChoice, ...] = ()

    @property
    def mask(self) -> Mask:
        return mask_of(self.cache)

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        low = x if self.q_a is None else self.q_norm(self.q_a(x))
        q = (self.q if self.q_b is None else self.q_b)(low).reshape(x.shape[0], self.heads, -1)
        q_nope, q_rope = q[..., : self.nope_dim], self.rope(q[..., self.nope_dim :], ragged.positions)
        new = {"latent": self._latent(x, ragged)}
        if self.indexer is not None:
            new["index"] = self.indexer.keys(x, ragged.positions)
        up = dense(self.kv_b.weight.get_value()).astype(x.dtype).reshape(self.rank, self.heads, -1)
        up_k, up_v = up[..., : self.nope_dim], up[..., self.nope_dim :]
        if view is None or view.writes is None:
            pool, stored = {}, near.as_stored(self.cache, new, ragged)
            if not self._chooses(ragged.longest):
                out = self._expanded(q_nope, q_rope, stored, up_k, up_v, ragged)
                return self.o(out.reshape(x.shape[0], -1)), pool
            view = as_pages(stored, ragged)
            pages = view.pool
        elif self.cache.near is None:
            pages = pool = self.cache.append(view.pool, new, view.writes)
        else:
            pages = pool = near.append(self.cache, new, view, ragged)
        q = jnp.concatenate([jnp.einsum("tnh,rnh->tnr", q_nope, up_k), q_rope], axis=-1)
        kwargs = {"scale": self.scale, "value_dim": self.rank}
        if self._chooses(view.table.shape[-1] * view.positions.shape[-1]):
            kwargs |= {"mask": self.mask}
            out = self._indexed(q, *self.indexer.queries(x, low, ragged.positions), pages, ragged, view, **kwargs)
        else:

            def attend(prefix, mask):
                where = view.near if prefix else view
                args = (self.choices, q, pages[prefix + "latent"], None, ragged, where)
                return attend_cached(*args, mask=mask, **kwargs)[:2]

            out = over_parts(self.cache, attend)
        out = jnp.einsum("tnr,rnh->tnh", out, up_v)
        return self.o(out.reshape(x.shape[0], -1)), pool

    def _latent(self, x, ragged):
        """What a token leaves behind, [T, 1, R + Hr]."""
        low = self.kv_a(x)
        k_rope = self.rope(low[:, None, self.rank :], ragged.positions)
        return jnp.concatenate([self.kv_norm(low[:, None, : self.rank]), k_rope], axis=-1)

    def _chooses(self, room: int) -> bool:
        """Whether an indexer leaves out some of `room` listed tokens."""
        return self.indexer is not None and room > self.indexer.top_k

    def _expanded(self, q_nope, q_rope, stored, up_k, up_v, ragged):
        q = jnp.concatenate([q_nope, q_rope], axis=-1)

        def attend(prefix, mask):
            latent, k_rope = jnp.split(stored[prefix + "latent"][:, 0], [self.rank], axis=-1)
            shared = jnp.broadcast_to(k_rope[:, None], (k_rope.shape[0], self.heads, k_rope.shape[1]))
            k = jnp.concatenate([jnp.einsum("tr,rnh->tnh", latent, up_k), shared], axis=-1)
            v = jnp.einsum("tr,rnh->tnh", latent, up_v)
            args, kwargs = (ragged.pad(q), ragged.pad(k), ragged.pad(v)), {"mask": mask, "valid": ragged.valid}
            out, lse, _ = dispatch.call("flash_attention", self.choices, *args, scale=self.scale, **kwargs)
            return ragged.unpad(out), ragged.unpad(lse)

        return over_parts(self.cache, attend)

    def _indexed(self, q, index_q, weights, pages, ragged, view, **kwargs):
        asked = jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)
        args = (ragged.pad(q), pages["latent"], ragged.pad(index_q), ragged.pad(weights), pages["index"])
        kwargs |= {"positions": view.positions, "table": view.table, "lengths": view.lengths, "q_positions": asked}
        out = dispatch.call("indexed_attention", self.choices, *args, top_k=self.indexer.top_k, **kwargs)
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
        sites = attention_sites(facts, {"kv_heads": self.heads, "head_dim": width, "value_dim": self.value_dim})
        if self.indexer is None:
            return sites
        index = {"top_k": self.indexer.top_k, "index": self.indexer.stream.name}
        index |= {"index_heads": self.indexer.heads, "index_dim": self.indexer.head_dim}
        return (*sites, OpSite(op="indexed_attention", args=facts | index))
