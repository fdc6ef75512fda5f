"""What the passes that rotate keys and values and store them in few bits have in common."""

import dataclasses

from optx.cache import CacheSpec
from optx.errors import FormatError, PassError
from optx.formats import Format
from optx.ir import replace
from optx.nn.attention import Attention, FusedAttention
from optx.nn.rotated import CalibratedHeads, RotatedHeads
from optx.passes.rotate import GATED, Turn, turned_values
from optx.registry import Noted, PassOptions, Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedKV(PassOptions):
    """Options of such a pass."""

    first: int = 0  # tokens of a sequence that stay exact
    recent: int = 0  # newest tokens that stay exact

    def storage(self) -> Format:
        """Of keys."""
        raise NotImplementedError

    def value_storage(self) -> Format:
        raise NotImplementedError


def check(site: Site, attn: Attention, name: str) -> None:
    """Raises PassError where heads cannot be rotated, or the cache is packed already."""
    if isinstance(attn, FusedAttention):
        raise PassError(
            f"{name} at {site.path}: q, k and v are one projection; give {name} and fuse_projections in one recipe"
        )
    if attn.rope is not None and attn.rope.rotation is not None:
        raise PassError(f"{name} at {site.path}: queries and keys are rotated already")
    if attn.cache.packed:
        raise PassError(f"{name} at {site.path}: the cache is stored as {attn.cache.storage} already")


def rotated_kv(
    site: Site, attn: Attention, opt: RotatedKV, rope: RotatedHeads | CalibratedHeads, turn: Turn
) -> Attention | Noted:
    """q and k through `rope`; v R and R^T o by `turn`, where no gate stands between them; the cache as `opt` says.

    A layer that reads the cache of another turns its queries and its o alike.
    """
    changes = {} if attn.gate is not None else turned_values(attn, turn, site.path)
    try:
        cache = attn.cache if attn.cache.share is not None else stored(attn.cache, opt)
    except FormatError as error:
        raise PassError(f"{site.path}: {error}") from None
    out = replace(attn, rope=rope, cache=cache, **changes)
    return out if attn.gate is None else Noted(out, GATED)


def stored(spec: CacheSpec, opt: RotatedKV) -> CacheSpec:
    """The spec with the options' formats and exact tokens."""
    keys, values = opt.storage(), opt.value_storage()
    own = {"v": None if values == keys else values}
    streams = tuple(dataclasses.replace(stream, format=own.get(stream.name)) for stream in spec.streams)
    return spec.replace(format=keys, streams=streams)
