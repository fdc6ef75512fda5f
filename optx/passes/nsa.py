"""Native sparse attention: compressed tokens, blocks that these point at, and a window, gated."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from optx import ir
from optx.errors import PassError
from optx.nn.attention import Attention
from optx.nn.mla import MLA
from optx.nn.nsa import NSA, Pooling
from optx.passes.selection import refusal, with_selector
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

SURE = 30.0  # of a gate's bias: sigmoid(30) is 1 in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nsa(PassOptions):
    block: int = 64  # tokens of a block that is chosen: a multiple of the page size
    top_k: int = 16  # blocks that a query reads, those that it always reads included
    size: int = 32  # tokens that are compressed into one
    stride: int = 16  # tokens from one compressed token to the next: divides size, block and page size
    window: int = 512  # newest tokens of the third branch
    first: int = 1  # first blocks, always read
    local: int = 2  # newest blocks, a query's own among them, always read
    # Of what a head brings, the share of the other two branches at the start; 0: what it brought, if all blocks are chosen.
    mix: float = 0.02
    hidden: int | None = None  # numbers inside the MLPs that compress, which start as means; None: means


@register("nsa", axis=Axis.READS, stage=Stage.ATTENTION, options=Nsa, exact=False, needs_healing=True)
def nsa(site: Site, attn: Attention | MLA, opt: Nsa) -> Attention | Skipped:
    """o = g_c a(q, compressed) + g_s a(q, top_k blocks) + g_w a(q, window newest), with gates g = sigmoid(x W + b) a head.

    NSA (Yuan et al. 2025, arXiv:2502.11089). Compressed keys and values are means of `size` tokens, or means and an MLP whose
    last layer is 0; they lie in the cache, one for `stride` tokens. Gates start at W = 0 with the branch of chosen blocks at
    1 - mix, which is what attention was where all blocks are chosen. Differs from the paper: all branches read one set of keys
    and values, so that a trained model's own serve, and a decode reads L / stride + top_k block + window tokens of it.
    """
    sizes = {name: getattr(opt, name) for name in ("block", "top_k", "size", "stride", "window", "local")}
    if reason := refusal(site, attn, "nsa", sizes):
        return Skipped(reason)
    if opt.size % opt.stride or opt.block % opt.stride:
        raise PassError(f"nsa: stride {opt.stride}; allowed: what divides size {opt.size} and block {opt.block}")
    if not opt.first >= 0 or opt.first + opt.local > opt.top_k:
        raise PassError(
            f"nsa: first {opt.first} and local {opt.local} of top_k {opt.top_k} blocks; allowed: no more than all"
        )
    if not 0 <= opt.mix < 1:
        raise PassError(f"nsa: mix {opt.mix:g}; allowed: at least 0 and below 1")
    if opt.hidden is not None and opt.hidden < 1:
        raise PassError(f"nsa: hidden {opt.hidden}; allowed: at least 1, or null")
    d, dtype = attn.q.weight.get_value().shape[0], attn.o.weight.get_value().dtype
    shape = {"heads": attn.heads, "head_dim": attn.head_dim, "block": opt.block, "blocks": opt.top_k, "size": opt.size}
    more = {"stride": opt.stride, "window": opt.window, "first": opt.first, "local": opt.local, "hidden": opt.hidden}
    selector = NSA(d, **shape, **more, dtype=dtype)
    return with_selector(attn, selector if ir.is_abstract(attn) else _started(selector, opt, site))


def _started(selector: NSA, opt: Nsa, site: Site) -> NSA:
    """With weights."""
    weight, bias = (part.get_value() for part in (selector.gate.weight, selector.gate.bias))
    shares = (opt.mix / 2, 1 - opt.mix, opt.mix / 2)
    gate = jnp.tile(jnp.asarray([_logit(share) for share in shares], bias.dtype), bias.shape[0] // 3)
    changes = {"gate": ir.replace(selector.gate, weight=jnp.zeros(weight.shape, weight.dtype), bias=gate)}
    rng = np.random.default_rng(site.layer)
    for name in ("pool_k", "pool_v") if opt.hidden else ():
        changes[name] = _pooling(getattr(selector, name), rng)
    return ir.replace(selector, **changes)


def _pooling(pooling: Pooling, rng: np.random.Generator) -> Pooling:
    """A mean: `down` is random, `up` 0."""
    down, up, position = (x.get_value() for x in (pooling.down.weight, pooling.up.weight, pooling.position))
    drawn = rng.standard_normal(down.shape) * down.shape[0] ** -0.5
    return ir.replace(
        pooling,
        position=jnp.zeros(position.shape, position.dtype),
        down=ir.replace(pooling.down, weight=jnp.asarray(drawn, down.dtype)),
        up=ir.replace(pooling.up, weight=jnp.zeros(up.shape, up.dtype)),
    )


def _logit(share: float) -> float:
    return SURE if share >= 1 else -SURE if share <= 0 else math.log(share / (1 - share))
