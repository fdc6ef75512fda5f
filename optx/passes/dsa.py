"""DeepSeek sparse attention: a query reads the tokens that a small index over all of them scores best."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from optx import ir
from optx.errors import PassError
from optx.nn.attention import Attention
from optx.nn.dsa import KeyIndexer
from optx.nn.mla import MLA
from optx.passes import head_moments as heads
from optx.passes.selection import refusal, with_selector
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dsa(PassOptions):
    top_k: int = 2048  # tokens that a query reads
    dim: int | None = None  # numbers of an index key, even; None: half of a head's
    # f of a query head and token: the share of its attention that the index gives the token, or, as published, relu.
    rule: Literal["softmax", "relu"] = "softmax"
    by: Literal["text", "weights"] = (
        "text"  # what the index keeps: what keys and queries of calibration text, or weights alone, ask
    )

    @property
    def needs(self):
        return frozenset({"inputs"}) if self.by == "text" else frozenset()


@register("dsa", axis=Axis.READS, stage=Stage.ATTENTION, options=Dsa, exact=False, needs_healing=True)
def dsa(site: Site, attn: Attention | MLA, opt: Dsa) -> Attention | Skipped:
    """softmax(scale q k^T) v over the `top_k` tokens s of the highest I_s = sum_n f(scale Q_n q_n . P k_s), over query heads n.

    The lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556) made of the layer's own queries and keys: P keeps `dim` / 2 of the
    principal components of all kv heads' keys, taken a frequency of RoPE at a time as complex numbers (as RoRoPE of TransMLA,
    arXiv:2502.07864), weighed by the queries that meet them, so that P commutes with rotation and Q_n q . P k ~ q . k. The cache
    grows by `dim` numbers a token for all heads. relu is the paper's f, of an index that was trained; what it adds up over heads
    that were not is no attention, while a softmax is, as far as the index tells. Healing trains the index by a loss of its own
    (nn/dsa.py). Exact where the context has no more than top_k tokens.
    """
    if reason := refusal(site, attn, "dsa", {"top_k": opt.top_k}):
        return Skipped(reason)
    pairs = attn.kv_heads * attn.head_dim // 2
    dim = attn.head_dim // 2 // 2 * 2 if opt.dim is None else opt.dim
    if dim % 2 or not 2 <= dim <= 2 * pairs:
        raise PassError(
            f"dsa at {site.path}: dim {dim}; allowed: an even number, 2 to {2 * pairs}, all numbers of its keys"
        )
    shape = {"heads": attn.heads, "kv_heads": attn.kv_heads, "head_dim": attn.head_dim, "dim": dim, "top_k": opt.top_k}
    selector = KeyIndexer(**shape, rule=opt.rule, dtype=attn.o.weight.get_value().dtype)
    if ir.is_abstract(attn):
        return with_selector(attn, selector)
    seen = heads.moments(site, attn, bool(opt.needs), "dsa")
    kept, asked = _components(attn, seen, dim)
    dtype = selector.kept.get_value().dtype
    filled = {
        "kept": jnp.asarray(kept, dtype),
        "asked": jnp.asarray(np.repeat(asked, attn.heads // attn.kv_heads, axis=0), dtype),
        "weight": jnp.ones(attn.heads, jnp.float32),
    }
    return with_selector(attn, ir.replace(selector, **filled))


def _components(attn: Attention, seen: heads.Moments, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, Q) float64[K, H, dim]: the principal components of keys, those first that hold most."""
    k, d = attn.kv_heads, attn.head_dim
    turned = heads.pairs_of(attn)
    rest = np.setdiff1d(np.arange(d), turned)  # not rotated: any two are a pair, of frequency 0
    moment = seen.stored[: k * d, : k * d].reshape(k, d, k, d)
    asked = seen.queries.reshape(k, -1, d, d).sum(1)
    found = []  # (what it holds, pair, P by head, Q by head)
    for pair in (*turned, *rest.reshape(-1, 2)):
        down, up, sizes = heads.planes(moment, asked, pair[:1], pair[1:], k)
        found += [(sizes[k - 1 - i], pair, down[:, 0, i], up[:, 0, i]) for i in range(k)]
    best = sorted(found, key=lambda one: -one[0])[: dim // 2]
    maps = np.zeros((2, k, d, dim))
    for i, (_, (first, second), *parts) in enumerate(best):
        for out, z in zip(maps, parts, strict=True):
            out[:, first, 2 * i], out[:, first, 2 * i + 1] = z.real, z.imag
            out[:, second, 2 * i], out[:, second, 2 * i + 1] = -z.imag, z.real
    return maps[0], maps[1]
