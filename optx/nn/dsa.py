"""The lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556) over the keys of a layer of attention."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optx.cache import Pool, Ragged, Stream, View
from optx.nn.core import param
from optx.nn.recorder import auxiliary
from optx.nn.selecting import Selector, asked_of
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask, attend
from optx.pallas.dispatch import OpSite
from optx.pallas.indexed_attention.reference import index_scores
from optx.pools import as_pages

LOGITS = 1 << 24  # that exist at once while an index is trained
TINY = 1e-30  # of shares of attention: logarithms and their slopes stay finite


class KeyIndexer(Selector):
    """I_ts = sum_n w_n f(scale Q_n q_tn . P k_s): what attention at t reads are the `top_k` tokens s <= t of the highest I_ts.

    q and k are the layer's own, normed and rotated; k_s all kv heads side by side. The cache keeps P k_s, one vector of `dim`
    numbers a token for all heads. f: relu, or the softmax over s. Differs from the paper, where index queries and keys are made
    of x: those of a model that had none are made of what it has.
    """

    names = ("index",)
    block = every = size = 1
    masks = False

    def __init__(self, *, heads, kv_heads, head_dim, dim, top_k, rule, dtype="float32"):
        self.blocks, self.dim, self.rule = top_k, dim, rule
        self.asked = param((heads, head_dim, dim), dtype, ("heads", None, None), None)
        self.kept = param((kv_heads, head_dim, dim), dtype, ("kv_heads", None, None), None)
        self.weight = param((heads,), "float32", ("heads",), None)

    def streams(self, kv_heads: int, head_dim: int) -> tuple[Stream, ...]:
        return (Stream(name="index", shape=(1, self.dim)),)

    def entries(self, k, v):
        return {"index": jnp.einsum("mskh,khi->msi", k, self.kept.get_value().astype(k.dtype))}

    def sites(self, facts: Mapping[str, Any]) -> tuple[OpSite, ...]:
        index = {"top_k": self.blocks, "index": "index", "index_heads": facts["heads"], "index_dim": self.dim}
        return (OpSite(op="indexed_attention", args={**facts, **index}),)

    def __call__(self, attn, x, q, pool: Pool, ragged: Ragged, view: View | None, attend: Callable) -> jax.Array:
        """q [T, N, H] over the pool -> [T, N, H]. attend: as of `over_parts`."""
        if view is None:
            auxiliary.add(lambda: self.loss(attn, q, pool["k"], ragged))
        if self.room(ragged, view) <= self.blocks:
            return attend("", mask=Mask())[0]
        if view is None:
            view = as_pages({"k": pool["k"], "v": pool["v"], **self.entries(pool["k"][:, None], None)}, ragged)
            pool = view.pool
        index_q, weights = self._asked(attn, q)
        args = (ragged.pad(q), pool["k"], ragged.pad(index_q), ragged.pad(weights), pool["index"])
        where = {
            "positions": view.positions,
            "table": view.table,
            "lengths": view.lengths,
            "q_positions": asked_of(ragged),
        }
        sinks = None if attn.sinks is None else attn.sinks.get_value()
        more = {
            "scale": attn.scale,
            "softcap": attn.softcap,
            "sink_logits": sinks,
            "v_pool": pool["v"],
            "rule": self.rule,
        }
        out = dispatch.call("indexed_attention", attn.choices, *args, top_k=self.blocks, **where, **more)
        return ragged.unpad(out)

    def _asked(self, attn, q):
        """q [T, N, H] -> queries of the index [T, N, dim], their weights float32[T, N]."""
        index_q = jnp.einsum("tnh,nhi->tni", q, self.asked.get_value().astype(q.dtype)) * attn.scale
        return index_q, jnp.broadcast_to(self.weight.get_value(), index_q.shape[:2])

    def loss(self, attn, q: jax.Array, k: jax.Array, ragged: Ragged) -> jax.Array:
        """Mean over tokens t of KL(p_t || i_t), float32[]; p_t: attention of t over all tokens s <= t, summed over heads and
        divided by its sum; i_t: softmax of I_t, or with softmax as f, where I_t is attention already, I_t divided by its sum.

        q [T, N, H], k [T, K, H]. The dense warm-up of DeepSeek-V3.2 (arXiv:2512.02556): q, k and p count as data, so that the
        gradient reaches the index alone, to which, its choice being hard, none of the model's loss comes.
        """
        q, k = jax.lax.stop_gradient((q, k))
        keys = ragged.pad(self.entries(k[:, None], None)["index"][:, 0])
        k, valid, at = ragged.pad(k), ragged.valid, jnp.arange(ragged.longest)
        sinks = None if attn.sinks is None else attn.sinks.get_value()
        more = {"scale": attn.scale, "softcap": attn.softcap, "sink_logits": sinks, "want_scores": True}

        @jax.checkpoint
        def one(query):
            """A query of every row -> float32[B]."""
            q, index_q, weights, asked = query
            seen = valid & (at <= asked)
            p = jnp.sum(attend(q[:, None], k, k, seen[:, None, None], **more)[2], axis=-1)
            p = jax.lax.stop_gradient(p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), TINY))
            scores = index_scores(index_q, weights, keys, seen, self.rule)
            scores = jnp.log(jnp.maximum(scores, TINY)) if self.rule == "softmax" else scores
            i = jax.nn.log_softmax(jnp.where(seen, scores, -1e30), axis=-1)
            return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, TINY)) - i), 0), axis=-1)

        queries = [jnp.moveaxis(ragged.pad(x), 1, 0) for x in (q, *self._asked(attn, q))]
        size = max(1, LOGITS // (valid.size * attn.heads))
        each = jax.lax.map(one, (*queries, at), batch_size=size)
        return jnp.sum(jnp.where(valid.T, each, 0)) / jnp.maximum(jnp.sum(valid), 1)
