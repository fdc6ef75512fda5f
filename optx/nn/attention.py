"""Attention with any ratio of query to kv heads (MHA, GQA, MQA), windows, softcap, query/key norms, shared caches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import RECORDED, CacheSpec, Ragged, Stream, View
from optx.errors import ConfigError
from optx.nn.core import Fused, Linear, RMSNorm, Rope, param
from optx.nn.evicting import record, scores_asked, scoring
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask
from optx.pallas.dispatch import OpChoice, OpSite
from optx.pallas.rotate_append.reference import rotate, separate

DECODE = 8  # tokens a row up to which a step is decoding: one, or a few speculated ones


def paged_spec(kv_heads, head_dim, *, dtype, window=None) -> CacheSpec:
    """K and V of one layer, [K, H] each a token."""
    shape = (kv_heads, head_dim)
    streams = (Stream(name="k", shape=shape), Stream(name="v", shape=shape))
    return CacheSpec(kind="paged", streams=streams, dtype=dtype, window=window)


def attend_cached(choices, q, k_pool, v_pool, ragged: Ragged, view: View, *, chunked: bool = False, **kwargs):
    """Attention of q [T, N, H] over cached tokens -> ([T, N, Hv], scores float32[B, S, K] where asked for); few tokens a row take
    the op that is made for them, also beside chunks of prompts: one op's kernel reads pages at the speed of memory, the
    other's multiplies. chunked: all take the other."""
    kwargs |= {"positions": view.positions, "table": view.table, "lengths": view.lengths}

    def decode(q, asked, **more):
        out, _, scores = dispatch.call("paged_decode", choices, q, k_pool, v_pool, q_positions=asked, **kwargs | more)
        return out, scores

    if ragged.rectangular and ragged.longest <= DECODE and not chunked:
        asked = jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)
        out, scores = decode(ragged.pad(q), asked)
        return ragged.unpad(out), scores

    def chunks(ragged):
        out, _, scores = dispatch.call("ragged_paged_attention", choices, q, k_pool, v_pool, ragged=ragged, **kwargs)
        return out, scores

    if ragged.rectangular or chunked:
        return chunks(ragged)
    single = ragged.counts == 1
    first = jnp.minimum(ragged.starts, q.shape[0] - 1)
    asked = jnp.where(single, ragged.positions[first], -1)
    few, of_few = decode(q[first][:, None], asked[:, None], lengths=jnp.where(single, view.lengths, 0))
    many, of_many = chunks(ragged.without(single))
    row = jnp.minimum(ragged.rows, ragged.batch - 1)
    scores = None if of_few is None else of_few + of_many
    return jnp.where(single[row][:, None, None], few[row, 0], many), scores


def attention_sites(facts: Mapping[str, Any], expanded: Mapping[str, Any] | None = None) -> tuple[OpSite, ...]:
    """The calls of a layer: over its cache, and (`expanded`: what differs there) inside self-contained sequences."""
    asked = {op: scores_asked(facts["cache"], op) for op in ("ragged_paged_attention", "paged_decode")}
    over_cache = tuple(OpSite(op=op, args={**facts, **more}) for op, more in asked.items())
    return (OpSite(op="flash_attention", args={**facts, **(expanded or {})}), *over_cache)


class Attention(nnx.Module):
    """o(softmax(scale q k^T) v) over what the cache holds; query head n reads kv head n // (N / K).

    The mask's window is the cache's window: what is not stored is not seen.
    """

    def __init__(
        self,
        d,
        *,
        heads,
        kv_heads,
        head_dim,
        rope: Rope | None,
        scale=None,
        softcap=None,
        window=None,
        bias=False,
        out_bias=False,
        norm=None,
        gated=False,
        sinks=False,
        share=None,
        dtype="float32",
        rngs=None,
    ):
        """norm: a callable that builds the RMSNorm of a head's queries and keys, or None; gated: q also gives each head a
        gate beside its query, and what the head brings is multiplied by its sigmoid (arXiv:2505.06708); sinks: each head
        has a logit that takes part in the softmax and carries no value (gpt-oss, arXiv:2508.10925); share: the layer
        whose cache is read (no k and v projections then). Raises ConfigError when heads do not group."""
        if heads % kv_heads:
            raise ConfigError(f"attention: {heads} query heads do not divide into {kv_heads} kv heads")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.rope = rope
        self.gate = "sigmoid" if gated else None
        own = share is None

        def head_linear(n, axis):
            return Linear(d, n * head_dim, bias=bias, dtype=dtype, axes=("embed", axis), rngs=rngs)

        self.q = head_linear(2 * heads if gated else heads, "heads")
        self.k = head_linear(kv_heads, "kv_heads") if own else None
        self.v = head_linear(kv_heads, "kv_heads") if own else None
        self.o = Linear(heads * head_dim, d, bias=out_bias, dtype=dtype, axes=("heads", "embed"), rngs=rngs)
        self.q_norm: RMSNorm | None = norm() if norm else None
        self.k_norm: RMSNorm | None = norm() if norm and own else None
        self.sinks = param((heads,), dtype, ("heads",), rngs, nnx.initializers.zeros) if sinks else None
        self.cache = paged_spec(kv_heads, head_dim, dtype=dtype, window=window).replace(share=share)
        self.choices: tuple[OpChoice, ...] = ()

    @property
    def mask(self) -> Mask:
        return Mask(window=self.cache.window, sinks=self.cache.sinks)

    @property
    def early(self) -> Rope | None:
        """What keys are rotated by before they are stored."""
        return self.rope if self.cache.rotated else None

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool or, without caches, the keys and values that later layers share)."""
        q, k, v = self.heads_of(x)
        q, gate = (q, None) if self.gate is None else jnp.split(q, 2, axis=-1)
        cached = view is not None and view.writes is not None
        asked = ragged.in_slots(view.lengths[0]) if cached and self.cache.evict is not None else ragged
        late = None if self.cache.rotated else self.rope  # of keys: where they are read
        turned = ragged.positions if late is None else asked.positions
        if self.cache.share is not None:
            q, pool = rotate(q, self.q_norm, self.rope, turned), view.pool
        elif cached:
            own = {name: x for name, x in view.pool.items() if name != RECORDED}
            kwargs = {"positions": ragged.positions, "writes": view.writes, "spec": self.cache}
            kwargs |= {"rope": self.early, "q_norm": self.q_norm, "k_norm": self.k_norm}
            q, own = dispatch.call("rotate_append", self.choices, q, k, v, own, **kwargs)
            q, pool = rotate(q, None, late, turned), view.pool | own
        else:
            q, k, v = separate(q, k, v, self.cache)
            k = rotate(k, self.k_norm, self.early, ragged.positions)
            q, pool = rotate(q, self.q_norm, self.rope, ragged.positions), self.cache.as_stored({"k": k, "v": v})
            pool["k"] = rotate(pool["k"], None, late, turned)
        kwargs = {"mask": self.mask, "scale": self.scale, "softcap": self.softcap}
        kwargs |= {} if self.sinks is None else {"sink_logits": self.sinks.get_value()}
        if cached:
            kwargs |= scoring(self.cache, ragged, view) | ({} if late is None else {"key_rope": late})
            out, scores = attend_cached(self.choices, q, pool["k"], pool["v"], asked, view, **kwargs)
            pool = record(self.cache, pool, scores, ragged, view)
        else:
            args = (ragged.pad(q), ragged.pad(pool["k"]), ragged.pad(pool["v"]))
            out, _, _ = dispatch.call("flash_attention", self.choices, *args, valid=ragged.valid, **kwargs)
            out = ragged.unpad(out)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o(out.reshape(x.shape[0], -1)), pool

    def project(self, x):
        """x [T, D] -> q [T, N, H] ([T, N, 2H] with gates), k and v [T, K, H], or None for both where another layer's cache
        is read."""
        q = self.q(x).reshape(x.shape[0], self.heads, -1)
        if self.k is None:
            return q, None, None
        return q, *(part(x).reshape(-1, self.kv_heads, self.head_dim) for part in (self.k, self.v))

    def heads_of(self, x):
        """`project`, or all heads side by side [T, N + 2K, H] where one matmul makes them, and None for k and v."""
        return self.project(x)

    def op_sites(self) -> tuple[OpSite, ...]:
        facts = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.head_dim,
            "dtype": jnp.dtype(self.o.weight.get_value().dtype).name,
            "cache": self.cache,
            "mask": self.mask,
            "softcap": self.softcap,
            "sink_logits": self.sinks is not None,
            "key_rope": not self.cache.rotated and self.rope is not None,
        }
        flash, *over_cache = attention_sites(facts)
        if self.cache.share is not None:
            return (flash, *over_cache)
        parts = {"rope": self.early, "q_norm": self.q_norm, "k_norm": self.k_norm}
        return (flash, OpSite(op="rotate_append", args={**facts, **parts}), *over_cache)


class FusedAttention(Fused, Attention):
    """Attention with q, k and v in one weight [D, (N + 2K) H], or [D, 2 (N + K) H] with gates."""

    KEPT = (
        "heads", "kv_heads", "head_dim", "scale", "softcap", "rope", "gate", "o", "q_norm", "k_norm", "sinks", "cache",
    )  # fmt: skip

    def __init__(self, attn: Attention, qkv: Linear):
        for name in self.KEPT:
            setattr(self, name, getattr(attn, name))
        self.qkv = qkv
        self.choices = attn.choices

    def heads_of(self, x):
        if self.gate is not None:
            return self.project(x)
        return self.qkv(x).reshape(x.shape[0], self.heads + 2 * self.kv_heads, self.head_dim), None, None

    def project(self, x):
        q, k = self.sizes
        q, k, v = jnp.split(self.qkv(x), [q, q + k], axis=-1)
        return q.reshape(x.shape[0], self.heads, -1), *(t.reshape(-1, self.kv_heads, self.head_dim) for t in (k, v))

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs of q; of k, as many as of v."""
        return self.heads * self.head_dim * (1 if self.gate is None else 2), self.kv_heads * self.head_dim

    def unfused(self) -> Attention:
        q, k = self.sizes
        d = self.qkv.weight.get_value().shape[0]
        norm = None if self.q_norm is None else lambda: self.q_norm  # set below, as are the other parts
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        plain = Attention(
            d, **shape, rope=self.rope, norm=norm, gated=self.gate is not None, sinks=self.sinks is not None
        )
        plain.q, plain.k, plain.v = self.qkv.split([q, k, k])
        for name in self.KEPT:
            setattr(plain, name, getattr(self, name))
        return plain
