"""Mixture of block attention: a query reads its own block of tokens and those whose mean key it meets best."""

import dataclasses

from optx.nn.attention import Attention
from optx.nn.mla import MLA
from optx.nn.selecting import BlockMeans
from optx.passes.selection import refusal, with_selector
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

ENTRY = 64  # tokens that a mean stands for where blocks are multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moba(PassOptions):
    block: int = 64  # tokens of a block: a multiple of the page size
    top_k: int = 8  # blocks that a query reads, its own included


@register("moba", axis=Axis.READS, stage=Stage.ATTENTION, options=Moba, exact=False, needs_healing=True)
def moba(site: Site, attn: Attention | MLA, opt: Moba) -> Attention | Skipped:
    """softmax(scale q k^T) v over a query's own block and the top_k - 1 earlier ones with the largest q . mean(k of the block).

    MoBA (Lu et al. 2025, arXiv:2502.13189), without weights of its own; exact where top_k blocks hold the context. A kv head
    chooses for all its query heads, by the sum over them, so that decodes read pages of chosen blocks and no others. The cache
    grows by a mean key for min(block, 64) tokens and kv head. Differs from the paper: there each query head chooses.
    """
    if reason := refusal(site, attn, "moba", {"block": opt.block, "top_k": opt.top_k}):
        return Skipped(reason)
    every = ENTRY if opt.block % ENTRY == 0 else opt.block
    return with_selector(attn, BlockMeans(block=opt.block, blocks=opt.top_k, every=every))


