"""The lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556) over the keys of a layer of attention."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optx.cache import Pool, Ragged, Stream, View
from optx.nn.core import param
from optx.nn.selecting import Selector, asked_of
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask
from optx.pallas.dispatch import OpSite
from optx.pools import as_pages


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
        if self.room(ragged, view) <= self.blocks:
            return attend("", mask=Mask())[0]
        if view is None:
            view = as_pages({"k": pool["k"], "v": pool["v"], **self.entries(pool["k"][:, None], None)}, ragged)
            pool = view.pool
        index_q = jnp.einsum("tnh,nhi->tni", q, self.asked.get_value().astype(q.dtype)) * attn.scale
        weights = jnp.broadcast_to(self.weight.get_value(), index_q.shape[:2])
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
