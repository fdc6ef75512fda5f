"""What the passes that rotate keys and values and store them in few bits have in common."""

import dataclasses

from optx.errors import FormatError, PassError
from optx.formats import Format
from optx.ir import replace
from optx.nn.attention import Attention, FusedAttention
from optx.nn.rotated import CalibratedHeads, RotatedHeads
from optx.passes.quantize_kv import stored
from optx.passes.rotate import GATED, Turn, turned_values
from optx.registry import Noted, PassOptions, Site, Skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedKV(PassOptions):
    """Options of such a pass."""

    first: int = 0  # tokens of a sequence that stay exact
    recent: int = 0  # newest tokens that stay exact

    def formats(self, attn: Attention) -> dict[str, Format]:
        """Of the streams k and v. Raises FormatError for options that are no format."""
        raise NotImplementedError


def check(site: Site, attn: Attention, name: str) -> None:
    """Raises PassError where heads cannot be rotated."""
    if isinstance(attn, FusedAttention):
        raise PassError(
            f"{name} at {site.path}: q, k and v are one projection; give {name} and fuse_projections in one recipe"
        )
    if attn.rope is not None and attn.rope.rotation is not None:
        raise PassError(f"{name} at {site.path}: queries and keys are rotated already")


def rotated_kv(
    site: Site, attn: Attention, opt: RotatedKV, rope: RotatedHeads | CalibratedHeads, turn: Turn
) -> Attention | Noted | Skipped:
    """q and k through `rope`; v R and R^T o by `turn`, where no gate stands between them; the cache as `opt` says.

    A layer that reads the cache of another turns its queries and its o alike.
    """
    try:
        cache = stored(attn, opt.formats(attn), first=opt.first, recent=opt.recent)
    except (FormatError, PassError) as error:
        raise PassError(f"{site.path}: {error}") from None
    if isinstance(cache, Skipped) and attn.cache.share is None:
        return cache
    cache = attn.cache if isinstance(cache, Skipped) else cache
    changes = {} if attn.gate is not None else turned_values(attn, turn, site.path)
    out = replace(attn, rope=rope, cache=cache, **changes)
    return out if attn.gate is None else Noted(out, GATED)
