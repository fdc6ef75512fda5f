"""The bias of key projections kept out of the cache and added where attention reads."""

import dataclasses

from optx.ir import replace
from optx.nn.attention import Attention, FusedAttention
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitKeyBias(PassOptions):
    pass


@register("split_key_bias", axis=Axis.BITS, stage=Stage.FOLD, options=SplitKeyBias, exact=True)
def split_key_bias(site: Site, attn: Attention, opt: SplitKeyBias) -> Attention | Skipped:
    """k_t = R_t (W x + b) = R_t W x + R_t b, R_t the rotary embedding at position t: R_t W x is cached, and R_t b is added to it
    where it is read. Exact, and no byte more: b is a weight, positions are cached.

    A bias of large norm is a constant under the scale of every key: Qwen2.5-7B with keys of 3 bits goes from perplexity 7.52 to
    9,410 (llama.cpp issue 21385), as its k bias has norm 605 in the first layer. Without it what is rounded is the signal. The
    kernels over pages do not add a bias: attention over the cache runs in XLA.
    """
    if isinstance(attn, FusedAttention):
        return Skipped("q, k and v are one projection; list fuse_projections in the same recipe, which runs later")
    if attn.k is None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    if attn.k.bias is None:
        return Skipped("keys have no bias")
    if attn.k_norm is not None:
        return Skipped("keys are normed after their bias, which is then no constant")
    return replace(attn, k=replace(attn.k, bias=None), key_bias=attn.k.bias)
