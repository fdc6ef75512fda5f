"""Cached keys and values (or latents) stored in fewer bits."""

import dataclasses
from typing import Literal

from optx import formats
from optx.errors import FormatError, PassError
from optx.formats import Format
from optx.ir import replace
from optx.nn.attention import Attention
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeKV(PassOptions):
    format: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2"] = "int8"
    symmetric: bool = True  # False: a zero point a token and head (integers only)

    def storage(self) -> Format:
        return formats.writable(self.format, symmetric=self.symmetric, scale_dtype="float16")


@register("quantize_kv", axis=Axis.BITS, stage=Stage.CACHE, options=QuantizeKV, exact=False)
def quantize_kv(site: Site, attn: Attention, opt: QuantizeKV) -> Attention | Skipped:
    """K and V stored as `format` with one scale (float16) a token and head, dequantized where attention reads them.

    int8 costs 8 + 16 / H bits a number; int4 half of that and visibly more error in K (KIVI, arXiv:2402.02750, sections
    3.1 and 3.2, shows why keys want scales a channel).
    """
    if attn.cache.share is not None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    if attn.cache.packed:
        raise PassError(f"quantize_kv at {site.path}: the cache is stored as {attn.cache.storage} already")
    try:
        return replace(attn, cache=attn.cache.replace(format=opt.storage()))
    except FormatError as error:
        raise PassError(f"quantize_kv at {site.path}: {error}") from None
