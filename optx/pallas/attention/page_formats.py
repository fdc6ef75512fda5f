"""What the Hopper kernels over pages call the formats of a cache that they read."""

from optx.cache import CacheSpec
from optx.formats import Float8, Format, Int


def page_kind(format_: Format | None) -> str | None:
    """dense, int8, int4 or fp8; None for a format that the kernels do not read: they take one scale a token and head."""
    if format_ is None:
        return "dense"
    if getattr(format_, "group", None) is not None:
        return None
    if isinstance(format_, Int) and format_.width in (8, 4):
        return f"int{format_.width}"
    return "fp8" if isinstance(format_, Float8) and format_.kind == "e4m3" else None


def cache_reason(cache: CacheSpec) -> str | None:
    """Why no kernel over pages takes caches like this one, whatever its format, or None."""
    if any(stream.format is not None for stream in cache.streams):
        return f"streams in formats of their own ({cache.storage}); allowed: one format for all streams"
    return None
