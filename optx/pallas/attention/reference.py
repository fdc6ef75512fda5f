"""The attention ops in plain JAX: this file defines them, kernels must match it.

One contract for all: queries against keys with a mask by position, grouped heads (query head n reads kv head
n // (N / K)), and (out, lse, scores?) returned. lse = log sum exp of the masked logits merges partial results;
queries that see no key give out = 0 and lse = -inf (the sink's logit where there is one). `scores` is the attention
mass by cached slot, summed over queries and the query heads of a kv head; it feeds eviction.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from optx.cache import Ragged
from optx.tensor import Tensor, dense

CHUNK = 256  # queries a block: bounds the [N, Q, S] logits that XLA materialises
QUERIES = 128  # the same over paged caches, where every block meets all listed pages
REDUCE = {
    "sum": (jnp.sum, jnp.add),
    "max": (jnp.max, jnp.maximum),
}  # of scores: inside a block of queries, of two blocks
UNROLL = 8  # blocks up to which each gets its own program over the keys that it can see


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query at position p sees. Static: one compiled program a mask."""

    causal: bool = True  # only positions <= p
    window: int | None = None  # only positions > p - window; None: all
    sinks: int = 0  # with a window: positions < sinks are seen as well
    lag: int | None = None  # only positions < p + 1 - lag: the newest `lag` are another call's; None: no such border
    skip: int = 0  # only positions >= skip: the first ones are another call's
    block: int = 1  # the border of `lag`, without one that of the window, moves down to a multiple of this

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Positions int32[..., Q, 1] and int32[..., 1, S] -> bool[..., Q, S]."""
        seen = key <= query if self.causal else jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
        seen = seen if self.lag is None else seen & (key < self.end(query))
        seen = seen & (key >= self.skip) if self.skip else seen
        if self.window is None:
            return seen
        return seen & ((key >= self.oldest(query)) | (key < self.sinks))

    def _down(self, position):
        return position if self.block == 1 else position // self.block * self.block

    def oldest(self, query):
        """First position of the query's window, which there must be."""
        first = query + 1 - self.window
        return self._down(first) if self.lag is None else first

    def end(self, query):
        """The position behind the last that `lag`, or where there is none causality, lets the query see."""
        return query + 1 if self.lag is None else self._down(query + 1 - self.lag)

    @property
    def apart(self) -> bool:
        """Whether some of what a window and causality let a query see is left to another call."""
        return self.lag is not None or self.skip > 0

    @property
    def span(self) -> int:
        """Most positions of a window, which there must be."""
        return self.window + (self.block - 1 if self.lag is None else 0)

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Keys [first, last) outside which queries start .. stop - 1 of a sequence see nothing."""
        first = max(0, self.oldest(start)) if self.window and not self.sinks else 0
        return min(first, length - 1), min(stop, length) if self.causal else length


def attend(
    q, k, v, mask, *, scale, softcap=None, sink_logits=None, logit_scale=None, want_scores=False, score_reduce="sum",
    score_weights=None,
):  # fmt: skip
    """softmax(scale q k^T) v with a mask.

    q [B, Q, N, H], k [B, S, K, H], v [B, S, K, Hv], mask bool[B, 1 or K, Q, S]; softcap c: c tanh(x / c);
    sink_logits [N]: a logit a head that takes part in the sum and carries no value (gpt-oss);
    logit_scale [B, S, K], or a multiple of K that divides N: multiplies the logits of a cached token, head by head or for
    equal runs of query heads (MLA under QK-norm); score_weights float32[B, Q]: of each
    query in the scores.
    -> out [B, Q, N, Hv] in q's dtype, lse float32[B, Q, N], scores float32[B, S, K] or None.
    """
    b, queries, n, h = q.shape
    kv_heads, group = k.shape[2], n // k.shape[2]
    # Heads before tokens and the query heads of a kv head side by side: two plain batched matmuls, no hidden transposes.
    q = jnp.moveaxis(q.reshape(b, queries, kv_heads, group, h), 1, 2).reshape(b, kv_heads, queries * group, h)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    logits = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * scale
    logits = logits.reshape(b, kv_heads, queries, group, -1)
    if logit_scale is not None:
        by_head = jnp.repeat(jnp.moveaxis(logit_scale, 2, 1), n // logit_scale.shape[2], axis=1)
        logits = logits * by_head.reshape(b, kv_heads, 1, group, -1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, :, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sink_logits is not None:
        sink = sink_logits.astype(jnp.float32).reshape(kv_heads, 1, group, 1)
        top = jnp.maximum(top, sink)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink_logits is not None:
        total = total + jnp.exp(sink - top)
    scores = None
    if want_scores:
        mass = weights / jnp.where(total > 0, total, 1)
        mass = mass if score_weights is None else mass * score_weights[:, None, :, None, None]
        scores = REDUCE[score_reduce][0](mass, axis=(2, 3))
    weights = weights.reshape(b, kv_heads, queries * group, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out.reshape(b, kv_heads, queries, group, -1) / jnp.where(total > 0, total, 1)
    out = jnp.moveaxis(out, 2, 1).reshape(b, queries, n, -1).astype(q.dtype)
    lse = jnp.moveaxis((jnp.log(total) + top)[..., 0], 2, 1).reshape(b, queries, n)
    return out, lse, None if scores is None else jnp.moveaxis(scores, 1, 2)


def chosen_slots(chosen, block: int, slots: int) -> jax.Array:
    """bool[..., blocks] -> bool[..., slots], all slots of a block being chosen or none."""
    return jnp.repeat(chosen, block, axis=-1)[..., :slots]


def flash_attention(
    q, k, v, *, mask: Mask = Mask(), scale=None, softcap=None, sink_logits=None, valid=None, segments=None, chosen=None,
    block=None,
):  # fmt: skip
    """Attention inside self-contained sequences at positions 0, 1, ...

    q [B, S, N, H], k [B, S, K, H], v [B, S, K, Hv]; valid bool[B, S]: real tokens; segments int32[B, S]: packed
    sequences that do not see each other; chosen bool[B, K, S, blocks]: of what the mask shows a query sees the blocks of `block`
    tokens that its kv head has chosen. -> (out [B, S, N, Hv], lse float32[B, S, N], None).
    Equation: Vaswani et al. 2017, arXiv:1706.03762; computed in blocks of queries.
    """
    b, length = q.shape[:2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    size = min(CHUNK, length)
    count = -(-length // size)
    position = jnp.arange(length, dtype=jnp.int32)
    if count * size != length:
        more = (0, count * size - length)
        q = jnp.pad(q, ((0, 0), more, (0, 0), (0, 0)))
        chosen = chosen if chosen is None else jnp.pad(chosen, ((0, 0), (0, 0), more, (0, 0)))

    def part_of(start, first, last):
        """Queries start .. start + size against keys first .. last, which hold all that they can see."""
        at = start + jnp.arange(size, dtype=jnp.int32)
        keys = slice(first, last)
        seen = jnp.broadcast_to(mask(at[None, :, None], position[None, None, keys]), (b, size, last - first))
        if valid is not None:
            seen = seen & valid[:, None, keys]
        if segments is not None:
            here = jnp.take(segments, at, axis=1, mode="clip")
            seen = seen & (here[:, :, None] == segments[:, None, keys])
        seen = seen[:, None]
        if chosen is not None:
            picked = jax.lax.dynamic_slice_in_dim(chosen, start, size, axis=2)
            seen = seen & chosen_slots(picked, block, length)[..., keys]
        part = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1)
        args = (part, k[:, keys], v[:, keys], seen)
        return attend(*args, scale=scale, softcap=softcap, sink_logits=sink_logits)[:2]

    if count <= UNROLL:
        blocks = [part_of(i * size, *mask.reach(i * size, i * size + size, length)) for i in range(count)]
        out, lse = (jnp.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True))
    else:
        starts = jnp.arange(count, dtype=jnp.int32) * size
        out, lse = jax.lax.map(lambda start: part_of(start, 0, length), starts)
        out, lse = (jnp.moveaxis(x, 0, 1).reshape(b, count * size, *x.shape[3:]) for x in (out, lse))
    return out[:, :length], lse[:, :length], None


def merge(parts):
    """One softmax over keys that several calls have seen apart: lse = log sum exp lse_i, out = sum_i exp(lse_i - lse) out_i.

    parts: (out [..., Hv], lse float32[...]) each -> (out, lse). FlashAttention-2, arXiv:2307.08691, section 3.1.
    """
    outs, lses = zip(*parts, strict=True)
    lse = functools.reduce(jnp.logaddexp, lses)
    base = jnp.where(jnp.isfinite(lse), lse, 0)  # a query that sees nothing: out = 0
    out = sum(jnp.exp(each - base)[..., None] * out.astype(jnp.float32) for out, each in zip(outs, lses, strict=True))
    return out.astype(outs[0].dtype), lse


def gather_pages(pool: Tensor, table: jax.Array) -> jax.Array:
    """Pool [pages, K, P, H] (packed or not) listed by table int32[G, B, pages] -> dense [B, S, K, H], S = pages * P."""
    groups, b, pages = table.shape

    def gather(part):
        """[B, pages, K, ...]: tokens stay behind their heads, where formats whose scales span tokens want them."""
        if groups == 1:
            return part.at[table[0]].get(mode="promise_in_bounds")
        return jax.vmap(lambda head, at: jnp.take(head, at, axis=0, mode="clip"), (1, 0), 2)(part, table)

    listed = jnp.moveaxis(dense(jax.tree.map(gather, pool)), 2, 3)
    return listed.reshape(b, pages * listed.shape[2], *listed.shape[3:])


def with_bias(k, at, *, key_bias, rope):
    """k [B, S, K, H] that was stored without its bias [K, H], at positions int32[G, B, S] (G = 1, or K) -> k + rope(bias).

    rope(W x + b) = rope(W x) + rope(b): rope is linear; None: positions turn nothing.
    """

    def turned(at, bias):
        """int32[B, S], [K / G, H] -> [B, S, K / G, H]."""
        wide = jnp.broadcast_to(bias.astype(jnp.float32), (at.size, *bias.shape))
        return (wide if rope is None else rope(wide, at.reshape(-1))).reshape(*at.shape, *bias.shape)

    bias = jax.vmap(turned, out_axes=2)(at, key_bias.reshape(len(at), -1, key_bias.shape[-1]))
    return (k.astype(jnp.float32) + bias.reshape(k.shape)).astype(k.dtype)


def paged_attention(
    q,
    k_pool,
    v_pool,
    *,
    positions,
    table,
    lengths,
    q_positions,
    mask: Mask = Mask(),
    scale=None,
    softcap=None,
    sink_logits=None,
    logit_scale=None,
    value_dim=None,
    want_scores=False,
    key_bias=None,
    rope=None,
    score_reduce="sum",
    score_weights=None,
    prompts=None,
    key_rope=None,
    chosen=None,
    block=None,
):
    """Attention of up to Q new tokens a row over its cached tokens, their own included (`paged_decode` where Q <= 8).

    q [B, Q, N, H]; pools [pages, K, P, H], dense or packed; v_pool None: values are the first `value_dim` numbers of
    the keys (MLA latents); logit_scale [pages, K, P], or a multiple of K heads; positions int32[pages, P], ascending along
    a row's listing; table int32[G, B, pages]; lengths int32[G, B] cached slots; q_positions int32[B, Q], -1 where there is
    no query: a row's
    queries are its newest slots; key_bias [K, H], rope: of keys that are stored without their bias (`with_bias`); key_rope:
    rotates keys by their cached positions, where they are stored before that (G = 1). score_weights (q_positions, prompts
    int32[B]) -> float32[B, Q] and score_reduce ("sum", "max"): what scores are made of. chosen bool[B, K, Q, blocks]: of what the
    mask shows a query sees the blocks of `block` slots that its kv head has chosen.
    Where heads list pages of their own (G = K) and the mask is causal and no more, positions are not asked for: a row's queries
    are its newest slots.
    -> (out [B, Q, N, Hv], lse, scores float32[B, S, K] by slot or None).
    """
    k = gather_pages(k_pool, table).astype(q.dtype)
    v = k[..., :value_dim] if v_pool is None else gather_pages(v_pool, table).astype(q.dtype)
    groups, b, pages = table.shape
    at = jnp.take(positions, table, axis=0, mode="clip").reshape(groups, b, -1)
    k = k if key_bias is None else with_bias(k, at, key_bias=key_bias, rope=rope)
    slots = jnp.arange(at.shape[-1])
    stored = slots < lengths[..., None]
    asked = q_positions[None, :, :, None]
    if groups > 1 and mask == Mask():  # heads that keep different tokens: both are counted from their ends
        newest = jnp.max(q_positions, axis=1)[None, :, None]
        seen = mask(asked - newest[..., None] - 1, (slots - lengths[..., None])[:, :, None, :])
    else:
        seen = mask(asked, at[:, :, None, :])
    seen = seen & (asked >= 0) & stored[:, :, None, :]
    if key_rope is not None:
        k = key_rope(k.reshape(-1, *k.shape[2:]), at[0].reshape(-1)).reshape(k.shape)
    if logit_scale is not None:
        logit_scale = gather_pages(logit_scale[..., None], table)[..., 0]
    # A slot past `lengths` may hold anything, NaN included: 0 * NaN must not reach the sum.
    real = jnp.moveaxis(stored, 0, 2)[..., None]
    k, v, seen = jnp.where(real, k, 0), jnp.where(real, v, 0), jnp.moveaxis(seen, 0, 1)
    seen = seen if chosen is None else seen & chosen_slots(chosen, block, seen.shape[-1])
    kwargs = {
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
        "logit_scale": logit_scale,
        "want_scores": want_scores,
        "score_reduce": score_reduce,
    }
    counted = jnp.ones(q_positions.shape) if score_weights is None else score_weights(q_positions, prompts)
    blocks = [slice(i, i + QUERIES) for i in range(0, q.shape[1], QUERIES)]
    outs, lses, scores = zip(
        *(attend(q[:, at], k, v, seen[:, :, at], score_weights=counted[:, at], **kwargs) for at in blocks), strict=True
    )
    total = functools.reduce(REDUCE[score_reduce][1], scores) if want_scores else None
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1), total


def with_first(found, first, mask: Mask, attend):
    """`found`, (out, lse, scores) over tokens without those at positions < mask.skip, merged with attention to exact copies of
    these: first {k_pool, v_pool, positions, table, lengths} lists them; None: there are none."""
    if first is None:
        return found
    return *merge((found[:2], attend(**first, mask=Mask(window=0, sinks=mask.skip))[:2])), found[2]


def paged_decode(
    q, k_pool, v_pool, *, q_positions, first=None, mask: Mask = Mask(), scale=None, softcap=None, **kwargs
):
    """`paged_attention`; first: `with_first`."""
    own = {"q_positions": q_positions, "scale": scale, "softcap": softcap}
    found = paged_attention(q, k_pool, v_pool, mask=mask, **own, **kwargs)
    own |= {name: kwargs[name] for name in ("key_bias", "rope", "key_rope") if name in kwargs}
    return with_first(found, first, mask, functools.partial(paged_attention, q, **own))


def ragged_paged_attention(q, k_pool, v_pool, *, ragged: Ragged, **kwargs):
    """`paged_attention` for T ragged tokens q [T, N, H] -> (out [T, N, Hv], lse [T, N], scores), causal in the chunk.

    What is returned for padding tokens is unspecified.
    """
    # What pads a row are other rows' tokens: they must not add to its scores.
    q_positions = jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)
    out, lse, scores = paged_attention(ragged.pad(q), k_pool, v_pool, q_positions=q_positions, **kwargs)
    return ragged.unpad(out), ragged.unpad(lse), scores
