"""Cross-layer selection: layers read the blocks that an earlier one has chosen."""

import dataclasses

from optx import ir
from optx.errors import PassError
from optx.nn.attention import Attention
from optx.nn.selecting import BlockMeans, Follower
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clsa(PassOptions):
    every: int = 2  # layers that read by one choice, that of the first of them


@register("clsa", axis=Axis.READS, stage=Stage.ATTENTION, options=Clsa, exact=False, needs_healing=True)
def clsa(site: Site, attn: Attention, opt: Clsa) -> Attention | Skipped:
    """Of every run of `every` layers the first chooses blocks of tokens, by `moba`, and the others read the same.

    One index and one choice for several layers ("you only index once"): the mean keys of the others leave the cache, and a decode
    does not read them. Exact where all blocks are chosen. Neighbouring layers attend to much the same tokens, as far as they
    retrieve at all; layers that do not are kept out with 'match' of moba.
    """
    if not 2 <= opt.every < 2**31:
        raise PassError(f"clsa: every {opt.every}; allowed: 2 to {2**31 - 1} layers")
    if not isinstance(attn.select, BlockMeans) or site.layer is None:
        return Skipped("chooses no blocks by mean keys: list moba before")
    chooser = site.layer // opt.every * opt.every
    if chooser == site.layer:
        return ir.replace(attn, select=ir.replace(attn.select, lends=True))
    select = Follower(attn.select, chooser)
    streams = tuple(stream for stream in attn.cache.streams if stream not in attn.cache.index)
    return ir.replace(attn, select=select, cache=attn.cache.replace(streams=streams, select=select.selection))
