"""KIVI: keys in few bits a channel, values in few bits a token, the newest tokens exact."""

import dataclasses
from typing import Literal

from optx.errors import FormatError, PassError
from optx.formats import Affine, PerChannel
from optx.ir import replace
from optx.nn.attention import Attention
from optx.passes.quantize_kv import stored
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi(PassOptions):
    bits: Literal[2, 3, 4, 8] = 4
    group: int = (
        32  # tokens that share the scale of a key channel, and channels that share a token's of V; divides both
    )
    recent: int = 128  # newest tokens that stay exact; between that and `group` - 1 more do
    first: int = 0  # first tokens that stay exact


@register("kivi", axis=Axis.BITS, stage=Stage.CACHE, options=Kivi, exact=False)
def kivi(site: Site, attn: Attention, opt: Kivi) -> Attention | Skipped:
    """K by channel over groups of tokens, V by token over groups of channels, in b + 32 / group bits a number.

    q = round((x - min) / s), s = (max - min) / (2^b - 1), s and min in float16.

    Outliers of keys lie in fixed channels, those of values do not. K is taken after the rotation. A group of keys is packed when
    it is complete, and read packed when it is `recent` tokens old; the published code keeps 0 to `recent` - 1 tokens in place of
    `recent` to `recent` + `group` - 1, and reads a prompt's own keys exactly while it is prefilled, here the same rule holds
    whatever the chunks. Liu et al. 2024, arXiv:2402.02750, sections 3.1 to 3.3 (group 32 and recent 128 of its tables). 2 bits
    cost a model with grouped heads retrieval: refused unless the recipe says `allow: [gqa_kivi2]`.
    """
    try:
        formats = {"k": PerChannel(width=opt.bits, group=opt.group), "v": Affine(width=opt.bits, group=opt.group)}
        cache = stored(site, attn, formats, recent=opt.recent, first=opt.first)
    except (FormatError, PassError) as error:
        raise PassError(f"kivi at {site.path}: {error}") from None
    return cache if isinstance(cache, Skipped) else replace(attn, cache=cache)
