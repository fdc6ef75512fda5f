"""Attention with any ratio of query to kv heads (MHA, GQA, MQA), windows, softcap, query/key norms, shared caches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optx import near
from optx.cache import NEAR, RECORDED, CacheSpec, Ragged, Stream, View
from optx.errors import ConfigError
from optx.nn.core import Fused, Linear, RMSNorm, Rope, made_sites, param
from optx.nn.evicting import record, scores_asked, scoring
from optx.nn.selecting import DECODE, Selector, as_mask, asked_of, listed
from optx.nn.selecting import tail as tail_of
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask, merge, with_bias
from optx.pallas.dispatch import OpChoice, OpSite
from optx.pallas.rotate_append.reference import rotate, rotate_keys, separate
from optx.pools import PICKED


def paged_spec(kv_heads, head_dim, *, dtype, window=None) -> CacheSpec:
    """K and V of one layer, [K, H] each a token."""
    shape = (kv_heads, head_dim)
    streams = (Stream(name="k", shape=shape), Stream(name="v", shape=shape))
    return CacheSpec(kind="paged", streams=streams, dtype=dtype, window=window)


def mask_of(spec: CacheSpec) -> Mask:
    """What queries see of the tokens in `spec`'s own pages: without those that they read exactly (near.py)."""
    if spec.near is None:
        return Mask(window=spec.window, sinks=spec.sinks)
    apart = {"lag": spec.recent, "skip": spec.near.sinks, "block": spec.block}
    return Mask(window=spec.window, sinks=spec.sinks, **apart)


def over_parts(spec: CacheSpec, attend, sink_logits=None, first=None) -> jax.Array:
    """Attention over all that a layer keeps: attend(prefix of the names of streams, its mask, whether it is exact, **kwargs) ->
    (out, lse) for packed tokens and for exact ones, merged. sink_logits [N] take part once. first: what the op over packed
    tokens is told of the exact ones, where it attends to both."""
    once = {"sink_logits": sink_logits, "first": first}
    body = attend("", mask=mask_of(spec), **{name: x for name, x in once.items() if x is not None})
    if spec.near is None or first is not None:
        return body[0]
    exact = Mask(window=spec.recent, sinks=spec.near.sinks, block=spec.block)
    return merge((body, attend(NEAR, mask=exact)))[0]


def attend_cached(
    choices, q, k_pool, v_pool, ragged: Ragged, view: View, *, chunked: bool = False, picked=None, chosen=None, block=None,
    tail=False, **kwargs,
):  # fmt: skip
    """Attention of q [T, N, H] over cached tokens -> (out [T, N, Hv], lse [T, N], scores float32[B, S, K] where asked for); few
    tokens a row take the op that is made for them, also beside chunks of prompts: one op's kernel reads pages at the speed of
    memory, the other's multiplies. chunked: all take the other. picked int32[T, K, n] (selecting.py): of blocks of `block` tokens
    those that a token sees; chosen: the same as a function of positions int32[B, Q] -> bool[B, K, Q, blocks], under which all
    pages are read; tail: pages of the mask's window are listed alone."""
    kwargs |= {"positions": view.positions, "table": view.table, "lengths": view.lengths}
    page = view.positions.shape[1]

    def decode(take, asked, **more):
        args, own = take(q), kwargs | more | ({} if chosen is None else {"chosen": chosen(asked), "block": block})
        if picked is not None or tail:  # each query lists pages of its own
            where = (asked, view.table, page)
            listing = tail_of(*where, kwargs["mask"].window) if tail else listed(take(picked), *where, block)
            args, own = args.reshape(-1, 1, *args.shape[2:]), kwargs | listing
        found = dispatch.call(
            "paged_decode", choices, args, k_pool, v_pool, q_positions=asked.reshape(args.shape[:2]), **own
        )
        return *(x.reshape(*asked.shape, *x.shape[2:]) for x in found[:2]), found[2]

    if ragged.rectangular and ragged.longest <= DECODE and not chunked:
        out, lse, scores = decode(ragged.pad, asked_of(ragged))
        return ragged.unpad(out), ragged.unpad(lse), scores

    def chunks(ragged):
        more = {} if picked is None else seen_of(ragged.pad(picked), view.table.shape[2] * page, block)
        more |= {} if chosen is None else {"chosen": chosen(asked_of(ragged)), "block": block}
        return dispatch.call("ragged_paged_attention", choices, q, k_pool, v_pool, ragged=ragged, **kwargs, **more)

    if ragged.rectangular or chunked:
        return chunks(ragged)
    single = ragged.counts == 1
    first = jnp.minimum(ragged.starts, q.shape[0] - 1)
    asked = jnp.where(single, ragged.positions[first], -1)
    *few, of_few = decode(lambda x: x[first][:, None], asked[:, None], lengths=jnp.where(single, view.lengths, 0))
    *many, of_many = chunks(ragged.without(single))
    to = jnp.where(single, first, q.shape[0])

    def joined(few, many):
        return many.at[to].set(few[:, 0], mode="drop")  # in place, where a choice by token would copy what chunks got

    return *jax.tree.map(joined, few, many), None if of_few is None else of_few + of_many


def seen_of(picked, slots: int, block: int) -> dict[str, Any]:
    """What ops that see all of `slots` are told of blocks int32[B, Q, K, n]."""
    return {"chosen": as_mask(picked, -(-slots // block)), "block": block}


def attention_sites(
    facts: Mapping[str, Any], expanded: Mapping[str, Any] | None = None, listed: bool = True
) -> tuple[OpSite, ...]:
    """The calls of a layer: over its cache, and (`expanded`: what differs there) inside self-contained sequences. listed: decodes
    are given lists of what is chosen, not a mask."""
    asked = {op: scores_asked(facts["cache"], op) for op in ("ragged_paged_attention", "paged_decode")}
    asked["paged_decode"] |= {"chosen": False} if listed else {}
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
        self.key_bias: nnx.Variable | None = None  # [K H], which keys are cached without and get where they are read
        # Of caches that store no scales (`Float8Static`): float32[K], what stored keys and values were divided by.
        self.k_scale: nnx.Param | None = None
        self.v_scale: nnx.Param | None = None
        self.select: Selector | None = None  # what it reads by; None: all that the mask shows
        self.cache = paged_spec(kv_heads, head_dim, dtype=dtype, window=window).replace(share=share)
        self.choices: tuple[OpChoice, ...] = ()

    @property
    def mask(self) -> Mask:
        return mask_of(self.cache)

    @property
    def early(self) -> Rope | None:
        """What keys are rotated by before they are stored."""
        return self.rope if self.cache.rotated else None

    def __call__(self, x: jax.Array, ragged: Ragged, view: View | None):
        """x [T, D] -> (y [T, D], the layer's pool or, without caches, the keys and values that later layers share)."""
        heads, pool = self.unprojected(x, ragged, view)
        return self.o(heads), pool

    def unprojected(self, x: jax.Array, ragged: Ragged, view: View | None):
        """`__call__` before its last projection: -> ([T, heads * head_dim], pool)."""
        q, k, v = self.heads_of(x)
        q, gate = (q, None) if self.gate is None else jnp.split(q, 2, axis=-1)
        cached = view is not None and view.writes is not None
        asked = ragged.in_slots(jnp.max(view.lengths, axis=0)) if cached and self.cache.evict is not None else ragged
        late = None if self.cache.rotated else self.rope  # of keys: where they are read
        turned = ragged.positions if late is None else asked.positions
        q_norm, k_norm = self._norms()
        if self.v_scale is not None:
            q, k, v = separate(q, k, v, self.cache)
            v = v / self.v_scale.get_value().astype(v.dtype)[:, None]
        if self.cache.share is not None:
            q, pool = rotate(q, q_norm, self.rope, turned), view.pool
        elif cached:
            beside = {RECORDED, PICKED, *(stream.name for stream in self.cache.index)}
            own = {name: x for name, x in view.pool.items() if name not in beside}
            kwargs = {"positions": ragged.positions, "writes": view.writes, "spec": self.cache.read}
            kwargs |= {"rope": self.early, "q_norm": q_norm, "k_norm": k_norm}
            kwargs |= {} if self.cache.near is None else {"view": view, "ragged": ragged}
            q, own = dispatch.call("rotate_append", self.choices, q, k, v, own, **kwargs)
            q, pool = rotate(q, None, late, turned), view.pool | own
            pool = pool if self.select is None else self.select.stored(pool, ragged, view)
        else:
            q, k, v = separate(q, k, v, self.cache)
            k, q = rotate_keys(k, k_norm, self.early, turned), rotate(q, q_norm, self.rope, turned)
            pool = near.as_stored(self.cache, {"k": k, "v": v}, ragged)
            pool["k"] = rotate_keys(pool["k"], None, late, turned)
            pool |= {} if view is None else {name: x for name, x in view.pool.items() if name == PICKED}
        attend = functools.partial(self._attend, q, pool, asked if cached else ragged, view if cached else None)
        scores: list[jax.Array] = []  # of the queries, where a policy of eviction asks for them
        if cached:
            more = scoring(self.cache, ragged, view) | ({} if late is None else {"key_rope": late.keys})
            attend = functools.partial(attend, scores=scores, **more)
        sinks = None if self.sinks is None else self.sinks.get_value()
        if self.select is None:
            first = self._first(pool, asked, view) if cached else None
            out = over_parts(self.cache, attend, sinks, first)
        else:
            attend = attend if sinks is None else functools.partial(attend, sink_logits=sinks)
            out = self.select(self, x, q, pool, ragged, view if cached else None, attend)
        pool = record(self.cache, pool, scores[0], ragged, view) if scores else pool
        out = out if self.v_scale is None else out * self._by_head(self.v_scale, out.dtype)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return out.reshape(x.shape[0], -1), pool

    def _attend(self, q, pool, ragged: Ragged, view: View | None, prefix, *, scores: list | None = None, **kwargs):
        """Over the streams of the pool whose names begin with prefix -> (out, lse); what is scored is appended to `scores`."""
        kwargs |= {"scale": self.scale, "softcap": self.softcap}
        k, v, bias = pool[prefix + "k"], pool[prefix + "v"], self._bias_of_keys()
        if view is not None:
            where = view.near if prefix else view
            *found, scored = attend_cached(self.choices, q, k, v, ragged, where, **kwargs, **bias)
            scores += [] if scored is None else [scored]
            return found
        k = with_bias(k[None], ragged.positions[None, None], **bias)[0] if bias else k
        if (chosen := kwargs.get("chosen")) is not None:
            kwargs["chosen"] = chosen(asked_of(ragged))
        if (picked := kwargs.pop("picked", None)) is not None:
            kwargs |= seen_of(ragged.pad(picked), ragged.longest, kwargs["block"])
        kwargs.pop("tail", None)
        args = (ragged.pad(x) for x in (q, k, v))
        out, lse, _ = dispatch.call("flash_attention", self.choices, *args, valid=ragged.valid, **kwargs)
        return ragged.unpad(out), ragged.unpad(lse)

    def _first(self, pool, ragged: Ragged, view: View):
        """`first` of `paged_decode`: the exact tokens' pages, where no others are exact; None: they take a call of their own."""
        spec, where = self.cache, view.near
        decodes = (
            ragged.rectangular and ragged.longest <= DECODE and dispatch.running("paged_decode", self.choices).first
        )
        if spec.near is None or spec.recent or spec.block > 1 or not decodes:
            return None
        pools = {f"{name}_pool": pool[NEAR + name] for name in ("k", "v")}
        return pools | {"positions": where.positions, "table": where.table, "lengths": where.lengths}

    def _norms(self):
        """What queries and keys go through before their rotation, with which a scale of stored keys commutes."""
        if self.k_scale is None:
            return self.q_norm, self.k_norm
        scale = self.k_scale.get_value()
        return (
            lambda q: _normed(self.q_norm, q) * self._by_head(self.k_scale, q.dtype),
            lambda k: _normed(self.k_norm, k) / scale.astype(k.dtype)[:, None],
        )

    def _by_head(self, scale: nnx.Param, dtype) -> jax.Array:
        """A scale a kv head for its query heads, [N, 1]."""
        return jnp.repeat(scale.get_value().astype(dtype), self.heads // self.kv_heads)[:, None]

    def project(self, x):
        """x [T, D] -> q [T, N, H] ([T, N, 2H] with gates), k and v [T, K, H], or None for both where another layer's cache
        is read."""
        q = self.q(x).reshape(x.shape[0], self.heads, -1)
        if self.k is None:
            return q, None, None
        return q, *(part(x).reshape(-1, self.kv_heads, self.head_dim) for part in (self.k, self.v))

    def turned(self, x, positions):
        """x [T, D] at positions int32[T] -> q [T, N, H], k and v [T, K, H] as attention takes them, of a layer with its own."""
        q, k, v = self.project(x)
        q = q if self.gate is None else jnp.split(q, 2, axis=-1)[0]
        q, k = rotate(q, self.q_norm, self.rope, positions), rotate_keys(k, self.k_norm, self.rope, positions)
        bias = self._bias_of_keys()
        return q, with_bias(k[None], positions[None, None], **bias)[0] if bias else k, v

    def keys_and_values(self, x, ragged: Ragged):
        """k and v [T, K, H] of tokens x [T, D] as a cache without a format keeps them."""
        _, k, v = self.project(x)
        return rotate_keys(k, self.k_norm, self.rope, ragged.positions), v

    def heads_of(self, x):
        """`project`, or all heads side by side [T, N + 2K, H] where one matmul makes them, and None for k and v."""
        return self.project(x)

    def _bias_of_keys(self) -> dict[str, Any]:
        """What ops over the cache are told of the bias that its keys lack."""
        if self.key_bias is None:
            return {}
        bias = self.key_bias.get_value().reshape(self.kv_heads, self.head_dim)
        bias = bias if self.k_scale is None else bias / self.k_scale.get_value()[:, None]
        return {"key_bias": bias, "rope": None if self.rope is None else self.rope.keys}

    def op_sites(self) -> tuple[OpSite, ...]:
        facts = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.head_dim,
            "dtype": jnp.dtype(self.o.weight.get_value().dtype).name,
            "cache": self.cache.read,
            "mask": self.mask,
            "chosen": self.select is not None and self.select.masks,
            "softcap": self.softcap,
            "sink_logits": self.sinks is not None,
            "key_bias": self.key_bias is not None,
            "head_pages": self.cache.evict is not None and self.cache.evict.apart,
            "key_rope": not self.cache.rotated and self.rope is not None,
        }
        flash, *over_cache = attention_sites(facts, listed=self.select is None or self.select.listed)
        over_cache += [] if self.select is None else self.select.sites(facts)
        if self.cache.share is not None:
            return (flash, *over_cache)
        parts = {"rope": self.early, "q_norm": self.q_norm, "k_norm": self.k_norm}
        return (flash, OpSite(op="rotate_append", args={**facts, **parts}), *over_cache)


def _normed(norm, x):
    return x if norm is None else norm(x)


class FusedAttention(Fused, Attention):
    """Attention with q, k and v in one weight [D, (N + 2K) H], or [D, 2 (N + K) H] with gates."""

    KEPT = (
        "heads", "kv_heads", "head_dim", "scale", "softcap", "rope", "gate", "o", "q_norm", "k_norm", "sinks", "key_bias",
        "cache", "k_scale", "v_scale", "select",
    )  # fmt: skip

    def __init__(self, attn: Attention, qkv: Linear):
        for name in self.KEPT:
            setattr(self, name, getattr(attn, name))
        self.qkv = qkv
        self.choices = attn.choices

    @property
    def entry(self) -> Linear | None:
        return self.qkv if self.select is None else None

    def op_sites(self) -> tuple[OpSite, ...]:
        return (*super().op_sites(), *made_sites("norm_matmul", self.qkv))

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
