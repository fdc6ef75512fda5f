"""What the Hopper kernels over pages call the formats of a cache that they read."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from optx.cache import CacheSpec
from optx.formats import Affine, Codebook, Float8, Float8Static, Format, Int, PerChannel

FEW = ("int4", "int3", "int2")  # integers that lie several a byte


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """How the numbers of a stream lie in its pages."""

    code: str  # dense, int8, int4, int3, int2, fp8, codebook4
    zero: Literal["code", "least"] | None = None  # beside a scale: the code of 0, or the number that code 0 stands for
    group: int | None = None  # numbers of a head that share a scale; None: all of them
    span: int | None = None  # tokens that share the scales of their channels; None: scales are each token's own
    scaled: bool = True  # whether scales are stored where numbers are codes

    @property
    def bits(self) -> int:
        """Of a number."""
        return {"dense": 16, "int4": 4, "int3": 3, "int2": 2, "codebook4": 4}.get(self.code, 8)

    @property
    def by_token(self) -> bool:
        """Whether scales and zero points are a token's and head's: they can act on logits and weights."""
        return self.group is None and self.span is None

    def scales(self, tokens: int, head_dim: int) -> int:
        """Scales of one head in `tokens` tokens, a multiple of `span`."""
        if self.span is not None:
            return tokens // self.span * head_dim
        return tokens * (head_dim // (self.group or head_dim))


def pages_of(format_: Format | None) -> Pages | None:
    """None for a format that no kernel over pages reads."""
    if format_ is None:
        return Pages(code="dense")
    if isinstance(format_, Float8Static) and format_.kind == "e4m3":
        return Pages(code="fp8", scaled=False)
    if isinstance(format_, Float8) and format_.kind == "e4m3" and format_.group is None:
        return Pages(code="fp8")
    if isinstance(format_, Codebook) and format_.width == 4:
        return Pages(code="codebook4")
    code = f"int{getattr(format_, 'width', None)}"
    if isinstance(format_, Int) and (code in FEW or (code == "int8" and format_.group is None)):
        return Pages(code=code, zero="code" if format_.has_zero else None, group=format_.group)
    if isinstance(format_, PerChannel) and code in FEW:
        return Pages(code=code, zero="least", span=format_.group)
    if isinstance(format_, Affine) and code in FEW:
        return Pages(code=code, zero="least", group=format_.group)
    return None


def unpacked(data: jax.Array, bits: int) -> jax.Array:
    """Bytes [T, B] -> codes int32[T, 8 B / bits], in operations that an interpreted kernel may use."""
    if bits == 3:
        cut = data.shape[1] // 3 * 2
        return unpacked(data[:, :cut], 2) | (unpacked(data[:, cut:], 1) << 2)
    found = jnp.stack([(data >> i) & (2**bits - 1) for i in range(0, 8, bits)], axis=-1)
    return found.reshape(len(data), -1).astype(jnp.int32)


def page_kind(format_: Format | None) -> str | None:
    """dense, int8, int4 or fp8 with one scale a token and head, for a kernel that reads no other; None for another format."""
    pages = pages_of(format_)
    if pages is None or not (pages.by_token and pages.scaled) or pages.zero == "least":
        return None
    return pages.code if pages.code in ("dense", "int8", "int4", "fp8") else None


def streams_of(cache: CacheSpec) -> dict[str, Pages] | str:
    """By name of the stream how keys and values lie in pages, or why no kernel reads them."""
    found = {stream.name: pages_of(cache.format_of(stream)) for stream in cache.streams}
    odd = [stream for stream in cache.streams if found[stream.name] is None]
    if odd:
        return (
            f"pages of {cache.format_of(odd[0])}; allowed: dense, fp8 e4m3, int8, codebook4 with one scale a token and head, "
            "int4, int3 and int2 also in groups"
        )
    codes = {pages.code for pages in found.values()}
    return found if len(codes) == 1 else f"pages of {cache.storage}; allowed: codes of as many bits for keys and values"


def cache_reason(cache: CacheSpec) -> str | None:
    """Why a kernel that takes one format for all streams does not take caches like this one, whatever its format, or None."""
    if any(stream.format is not None for stream in cache.streams):
        return f"streams in formats of their own ({cache.storage}); allowed: one format for all streams"
    return None
