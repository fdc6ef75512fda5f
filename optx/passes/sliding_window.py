"""Attention over a sliding window on chosen layers, first tokens kept as sinks."""

import dataclasses

from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow(PassOptions):
    window: int  # newest tokens that a query sees
    sinks: int = 4  # first tokens that stay visible (StreamingLLM); 0: none
    layers: tuple[int, ...] | None = None  # indices, negative from the end; None: every matched layer
    keep_every: int | None = None  # with layers None: every n-th layer stays global (6 gives Gemma's 5:1); None: none


@register(
    "sliding_window",
    axis=Axis.READS,
    stage=Stage.ATTENTION,
    options=SlidingWindow,
    exact=False,
    needs_healing=True,
)
def sliding_window(site: Site, attn: Attention, opt: SlidingWindow) -> Attention | Skipped:
    """A query at position p sees keys at positions > p - window, and positions < sinks; passed pages are freed.

    The cache holds at most window + sinks tokens a row. Sinks: Xiao et al. 2023, arXiv:2309.17453; interleaving of local
    and global layers: Gemma 3, arXiv:2503.19786. A substitution on a model trained with full attention costs quality at
    distances beyond the window; layers that already have a smaller window stay as they are.
    """
    for name, least in (("window", 1), ("sinks", 0), ("keep_every", 1)):
        value = getattr(opt, name)
        if value is not None and not least <= value < 2**31:  # positions are int32
            raise PassError(f"sliding_window: {name} {value}; allowed: {least} to {2**31 - 1}")
    chosen = None if opt.layers is None else {i % site.layers for i in opt.layers if -site.layers <= i < site.layers}
    if opt.layers is not None and len(chosen) != len(set(opt.layers)):
        raise PassError(
            f"sliding_window: layers {list(opt.layers)}; allowed: -{site.layers}..{site.layers - 1}, each once"
        )
    if chosen is not None and site.layer not in chosen:
        return Skipped("layer not listed")
    if chosen is None and opt.keep_every and site.layer is not None and (site.layer + 1) % opt.keep_every == 0:
        return Skipped(f"one layer in {opt.keep_every} stays global")
    if attn.cache.window is not None and attn.cache.window <= opt.window:
        return Skipped(f"has a window of {attn.cache.window}")
    return replace(attn, cache=attn.cache.replace(window=opt.window, sinks=opt.sinks))
