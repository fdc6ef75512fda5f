"""Mixture of block attention: a query reads its own block of tokens and those whose mean key it meets best."""

import dataclasses

from optx.errors import PassError
from optx.nn.attention import Attention
from optx.nn.grouped_mla import GroupedMLA
from optx.nn.mla import MLA
from optx.nn.selecting import BlockMeans, LatentMeans
from optx.passes.selection import refusal, with_selector
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

ENTRY = 64  # tokens that a mean stands for where blocks are multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moba(PassOptions):
    block: int = 64  # tokens of a block: a multiple of the page size
    top_k: int = 16  # blocks that a query reads, its own and the first ones included
    first: int = 1  # first blocks, always read: attention sinks lie there; 0: none


@register("moba", axis=Axis.READS, stage=Stage.ATTENTION, options=Moba, exact=False, needs_healing=True)
def moba(site: Site, attn: Attention | MLA, opt: Moba) -> Attention | GroupedMLA | Skipped:
    """softmax(scale q k^T) v over a query's own block, the first ones and those between with the largest share of
    softmax(scale q . mean(k of the block)), `top_k` in all.

    MoBA (Lu et al. 2025, arXiv:2502.13189), without weights of its own; exact where top_k blocks hold the context. A kv
    head chooses for all its query heads, by the sum over them, so that decodes read pages of chosen blocks and no
    others. The cache grows by a mean key for min(block, 64) tokens and kv head. Differs from the paper: there each
    query head chooses, and no block is read always; a model that was not trained so needs its sinks (StreamingLLM,
    arXiv:2309.17453). Behind `mla` blocks are chosen by means of latents, for all heads together.
    """
    if reason := refusal(site, attn, "moba", {"block": opt.block, "top_k": opt.top_k}, latents=True):
        return Skipped(reason)
    if not 0 <= opt.first < opt.top_k:
        raise PassError(f"moba: first {opt.first} of top_k {opt.top_k} blocks; allowed: 0 to {opt.top_k - 1}")
    every = ENTRY if opt.block % ENTRY == 0 else opt.block
    sizes = {"block": opt.block, "blocks": opt.top_k, "first": opt.first, "every": every}
    latents = isinstance(attn, GroupedMLA)
    return with_selector(
        attn, LatentMeans(normed=attn.key_norm is not None, **sizes) if latents else BlockMeans(**sizes)
    )
