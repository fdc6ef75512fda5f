"""MLA that stands for attention with K kv heads: what a checkpoint of MHA or GQA is turned into."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from optx import near
from optx.cache import Ragged, Stream, View
from optx.nn.attention import Attention, attend_cached, attention_sites, over_parts
from optx.nn.core import Inner, Linear, RMSNorm, Rope, param
from optx.nn.mla import MLA
from optx.nn.selecting import LatentMeans
from optx.pallas import dispatch
from optx.pallas.dispatch import OpSite
from optx.pools import as_pages
from optx.tensor import dense


class PartialRope(nnx.Module):
    """Rotary embedding of heads that kept some frequencies only, each slice its own; halves are rotated against each other."""

    def __init__(self, slices: int, dim: int, factor: float = 1.0):
        """factor: multiplies cos and sin (yarn's attention factor)."""
        self.frequencies = param((slices, dim // 2), "float32", (None, None), None)  # radians a position
        self.factor = factor

    @property
    def dim(self) -> int:
        return 2 * self.frequencies.get_value().shape[1]

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [T, M, Hr], its head m turned by slice m // (M / S); positions int32[T]."""
        angle = positions.astype(jnp.float32)[:, None, None] * self.frequencies.get_value()
        cos, sin = (jnp.repeat(f(angle), x.shape[1] // angle.shape[1], axis=1) for f in (jnp.cos, jnp.sin))
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return (turned * self.factor).astype(x.dtype)

    def __str__(self):
        return f"partial rope of {self.dim}"


class InverseRMS(nnx.Module):
    """1 / sqrt(mean(k_g^2) + eps) of each kv head's keys k_g = x W_g: what a norm of keys leaves behind beside a latent."""

    def __init__(self, keys: Linear, kv_heads: int, eps: float):
        self.keys, self.kv_heads, self.eps = keys, kv_heads, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> float32[T, K, 1]."""
        k = self.keys(x).reshape(x.shape[0], self.kv_heads, -1).astype(jnp.float32)
        return jax.lax.rsqrt(jnp.mean(k * k, axis=-1, keepdims=True) + self.eps)


class GroupedMLA(MLA):
    """c = x W_DKV [R], k_r = rope(x W_KR) in S slices of Hr numbers; k_g = s_g [W_UK,g c, slice g of k_r], v_g = W_UV,g c.

    Query head n reads kv head n // (N / K); S is K, 1 (a slice for all heads) or 0. s_g = 1, or under a norm of keys 1 / rms of
    the head's keys, which is cached a token and kv head: it is a scale of logits, so absorption into queries and outputs holds
    (the norm's gain is in W_UK and W_KR). [c, k_r] and s are cached.
    """

    def __init__(self, attn: Attention, *, rank: int, slices: int, nope_dim: int, rope: Rope | PartialRope | None):
        """Parts in shapes around those of `attn`. slices: 0 where rope is None."""
        d, dtype = attn.q.weight.get_value().shape[0], attn.o.weight.get_value().dtype
        self.heads, self.kv_heads, self.rank, self.slices = attn.heads, attn.kv_heads, rank, slices
        self.nope_dim, self.value_dim, self.rope = nope_dim, attn.head_dim, rope
        self.scale, self.softcap, self.gate = attn.scale, attn.softcap, attn.gate
        bias = attn.k.bias is not None or attn.v.bias is not None
        mapped = attn.q_norm is not None and nope_dim + self.rope_dim != attn.head_dim
        width = attn.head_dim if mapped else nope_dim + self.rope_dim
        self.asked = width  # numbers of a head that q gives, without its gate
        width += 0 if attn.gate is None else attn.head_dim
        low = {"dtype": dtype, "axes": ("embed", "rank")}
        self.q = Linear(d, attn.heads * width, bias=attn.q.bias is not None, dtype=dtype, axes=("embed", "heads"))
        self.q_a = self.q_norm = self.q_b = self.kv_norm = self.indexer = None
        normed = attn.k_norm is not None
        self.head_norm = RMSNorm(attn.head_dim, eps=attn.q_norm.eps, dtype=dtype) if normed else None
        self.key_norm = InverseRMS(attn.k, attn.kv_heads, attn.k_norm.eps) if normed else None
        if normed:  # the numbers of a head stand in another order in each kv head
            self.head_norm.weight = param((attn.heads, attn.head_dim), dtype, ("heads", None), None)
        # What normed queries ask of a rotated key that is no part of their head, which a norm keeps out of the weight of q.
        shape = (attn.kv_heads, attn.head_dim, self.rope_dim)
        self.query_map = param(shape, dtype, ("kv_heads", None, None), None) if mapped else None
        self.kv_a = Linear(d, rank + slices * self.rope_dim, bias=bias, **low)
        wide = {"dtype": dtype, "axes": ("rank", "heads")}
        self.kv_b = Inner(rank, attn.kv_heads * (nope_dim + attn.head_dim), **wide)
        self.o, self.sinks = attn.o, attn.sinks
        streams = [Stream(name="latent", shape=(1, rank + slices * self.rope_dim))]
        if self.key_norm is not None:  # 8 bits of mantissa would be an error of all logits of a token at once
            scales = "float16" if attn.cache.dtype == "bfloat16" else attn.cache.dtype
            streams.append(Stream(name="norm", shape=(attn.kv_heads, 1), dtype=scales))
        self.cache = attn.cache.replace(kind="latent", streams=tuple(streams))
        self.select: LatentMeans | None = None  # what it reads by; None: all that the mask shows
        self.choices = ()

    @property
    def rope_dim(self) -> int:
        return 0 if self.rope is None else self.rope.dim

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool)."""
        *asked, gate = self._asked(x, ragged)
        new = self._left(x, ragged)
        up = dense(self.kv_b.weight.get_value()).astype(x.dtype).reshape(self.rank, self.kv_heads, -1)
        up_k, up_v = up[..., : self.nope_dim], up[..., self.nope_dim :]
        sinks = None if self.sinks is None else self.sinks.get_value()
        if view is None or view.writes is None:
            pool, stored = {}, near.as_stored(self.cache, new, ragged)
            if self.select is not None and self.select.chooses(ragged, None):
                low = self._selected(x, self._absorbed(*asked, up_k), stored, ragged, None, sinks)
                out = self._raised(low, up_v)
            else:
                attend = functools.partial(self._inside, jnp.concatenate(asked, axis=-1), stored, up_k, up_v, ragged)
                out = over_parts(self.cache, attend, sinks)
        else:
            if self.cache.near is None:
                own = {name: view.pool[name] for name in new}
                pool = view.pool | self.cache.append(own, new, view.writes)
            else:
                pool = near.append(self.cache, new, view, ragged)
            q = self._absorbed(*asked, up_k)
            if self.select is None:
                low = over_parts(self.cache, functools.partial(self._over, q, pool, ragged, view), sinks)
            else:
                pool = self.select.stored(pool, ragged, view)
                low = self._selected(x, q, pool, ragged, view, sinks)
            out = self._raised(low, up_v)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o(out.reshape(x.shape[0], -1)), pool

    def _selected(self, x, q, pool, ragged: Ragged, view: View | None, sinks):
        """Over the latents that queries choose -> [T, N, R]; view None: of self-contained sequences, which are one page each."""
        pages, more = (view, {}) if view is not None else (as_pages(pool, ragged), {"chunked": True})
        more |= {} if sinks is None else {"sink_logits": sinks}
        attend = functools.partial(self._over, q, pages.pool if view is None else pool, ragged, pages, **more)
        return self.select(self, x, q, pool, ragged, view, attend)

    def _raised(self, low, up_v):
        """What heads read of latents, [T, N, R] -> of values, [T, N, Hv]."""
        return jnp.einsum("tkgr,rkh->tkgh", self._grouped(low), up_v).reshape(*low.shape[:2], self.value_dim)

    def _grouped(self, x):
        """[T, N, H] -> [T, K, N / K, H]."""
        return x.reshape(x.shape[0], self.kv_heads, self.heads // self.kv_heads, x.shape[-1])

    def _asked(self, x, ragged: Ragged):
        """Queries [T, N, Hn] and, turned, [T, N, Hr]; gates [T, N, Hv] or None."""
        q = self.q(x).reshape(x.shape[0], self.heads, -1)
        q, gate = (q, None) if self.gate is None else jnp.split(q, [self.asked], axis=-1)
        q = q if self.head_norm is None else self.head_norm(q)
        if self.query_map is not None:
            more = jnp.einsum("tkgh,khr->tkgr", self._grouped(q), self.query_map.get_value().astype(q.dtype))
            q = jnp.concatenate([q, more.reshape(*q.shape[:2], self.rope_dim)], axis=-1)
        q_nope, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
        return q_nope, q_rope if self.rope is None else self.rope(q_rope, ragged.positions), gate

    def _left(self, x, ragged: Ragged) -> dict[str, jax.Array]:
        """What a token leaves behind: [T, 1, R + S Hr], and of normed keys [T, K, 1]."""
        low = self.kv_a(x)
        turned = low[:, self.rank :].reshape(x.shape[0], self.slices, self.rope_dim)
        turned = turned if self.rope is None else self.rope(turned, ragged.positions)
        latent = jnp.concatenate([low[:, : self.rank], turned.reshape(x.shape[0], -1)], axis=-1)
        return {"latent": latent[:, None]} | ({} if self.key_norm is None else {"norm": self.key_norm(x)})

    def _absorbed(self, q_nope, q_rope, up_k):
        """q [T, N, R + S Hr] that meets latents as they are cached: a head's turned part stands at its own slice."""
        low = jnp.einsum("tkgh,rkh->tkgr", self._grouped(q_nope), up_k).reshape(*q_nope.shape[:2], self.rank)
        if self.slices > 1:
            own = jnp.eye(self.slices, dtype=q_rope.dtype)
            q_rope = jnp.einsum("tkgh,ks->tkgsh", self._grouped(q_rope), own).reshape(*q_rope.shape[:2], -1)
        return jnp.concatenate([low, q_rope], axis=-1)

    def _over(self, q, pages, ragged, view, prefix, **kwargs):
        """Over the streams of the pool whose names begin with prefix -> (out [T, N, R], lse)."""
        kwargs |= {"scale": self.scale, "softcap": self.softcap, "value_dim": self.rank}
        if self.key_norm is not None:
            kwargs["logit_scale"] = pages[prefix + "norm"][..., 0]
        where = view.near if prefix else view
        return attend_cached(self.choices, q, pages[prefix + "latent"], None, ragged, where, **kwargs)[:2]

    def _inside(self, q, stored, up_k, up_v, ragged, prefix, **kwargs):
        """Inside self-contained sequences, keys and values expanded -> (out [T, N, Hv], lse)."""
        low, turned = jnp.split(stored[prefix + "latent"][:, 0], [self.rank], axis=-1)
        turned = turned.reshape(len(low), self.slices, self.rope_dim)
        k = jnp.einsum("tr,rkh->tkh", low, up_k)
        if self.slices:
            k = jnp.concatenate([k, jnp.broadcast_to(turned, (len(low), self.kv_heads, self.rope_dim))], axis=-1)
        k = k if self.key_norm is None else (k * stored[prefix + "norm"]).astype(k.dtype)
        args = (ragged.pad(each) for each in (q, k, jnp.einsum("tr,rkh->tkh", low, up_v)))
        kwargs |= {"scale": self.scale, "softcap": self.softcap, "valid": ragged.valid}
        out, lse, _ = dispatch.call("flash_attention", self.choices, *args, **kwargs)
        return ragged.unpad(out), ragged.unpad(lse)

    def op_sites(self) -> tuple[OpSite, ...]:
        facts = {
            "heads": self.heads,
            "kv_heads": 1,
            "head_dim": self.rank + self.slices * self.rope_dim,
            "value_dim": self.rank,
            "dtype": jnp.dtype(self.o.weight.get_value().dtype).name,
            "cache": self.cache.read,
            "mask": self.mask,
            "chosen": self.select is not None,
            "selected": self.select is not None,
            "softcap": self.softcap,
            "sink_logits": self.sinks is not None,
            "logit_scales": 0 if self.key_norm is None else self.kv_heads,
        }
        width = self.nope_dim + self.rope_dim
        expanded = {
            "kv_heads": self.kv_heads,
            "head_dim": width,
            "value_dim": self.value_dim,
            "logit_scales": 0,
            "chosen": False,  # where some are left out, sequences are read as pages
        }
        return (*attention_sites(facts, expanded), *(() if self.select is None else self.select.sites(facts)))
