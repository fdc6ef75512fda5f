"""What passes that select reads have in common: which layers they take, and how a layer gets its selector."""

from collections.abc import Mapping

from optx import ir
from optx.errors import PassError
from optx.nn.attention import Attention
from optx.nn.grouped_mla import GroupedMLA
from optx.nn.mla import MLA
from optx.nn.selecting import Selector
from optx.passes import head_moments as heads
from optx.registry import Site


def refusal(
    site: Site, attn: Attention | MLA, name: str, sizes: Mapping[str, int], latents: bool = False
) -> str | None:
    """Why the layer stays as it is. sizes: options that are at least 1; latents: those of `mla` may be chosen among.

    Raises: PassError for other sizes, and for layers whose cache a pass has changed already.
    """
    for option, value in sizes.items():
        if not 1 <= value < 2**31:
            raise PassError(f"{name}: {option} {value}; allowed: 1 to {2**31 - 1}")
    grouped = latents and isinstance(attn, GroupedMLA)
    if isinstance(attn, MLA) and not grouped:
        return (
            f"{type(attn).__name__} keeps one latent of {attn.cache.streams[0].shape[-1]} numbers for all heads, and no keys to "
            "choose by"
        )
    if attn.cache.select is not None:
        raise PassError(
            f"{name} at {site.path}: selects its reads already ({attn.cache}); allowed: one such pass a layer"
        )
    if grouped and attn.cache.packed:
        raise PassError(
            f"{name} at {site.path}: its latents are stored as {attn.cache.storage} already; list it before that pass"
        )
    if not grouped and (reason := heads.check_plain(site, attn, name)):
        return reason
    if attn.cache.share is not None:
        return f"reads the cache of layer {attn.cache.share}"
    if attn.cache.window is not None:
        return f"has a window of {attn.cache.window}"
    return None


def with_selector(attn: Attention | GroupedMLA, selector: Selector) -> Attention | GroupedMLA:
    """The layer with its reads selected, the index in its cache."""
    streams = (*attn.cache.streams, *selector.streams(*attn.cache.streams[0].shape))
    return ir.replace(attn, select=selector, cache=attn.cache.replace(streams=streams, select=selector.selection))
