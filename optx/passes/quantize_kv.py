"""Cached keys and values (or latents) stored in fewer bits."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from optx import formats
from optx.cache import CacheSpec, Ragged
from optx.errors import FormatError, PassError
from optx.formats import Affine, Float8Static, Format, Parted
from optx.ir import replace
from optx.nn.attention import Attention
from optx.nn.mla import MLA
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

Name = Literal["int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeKV(PassOptions):
    format: Name = "int8"  # of K, and of V where `values` does not say otherwise; of latents
    values: Name | None = None  # of V; None: as K
    symmetric: bool = True  # False: the least number beside each scale, float16 (integers only)
    group: int | None = None  # numbers of a head that share a scale; None: the head
    # What has a scale: each token and head, stored with it; or (fp8 only) a head, or the layer, calibrated and stored once.
    scale: Literal["token", "head", "tensor"] = "token"
    recent: int = 0  # newest tokens that attention reads unrounded, from a window of pages beside the packed ones
    first: int = 0  # first tokens, likewise: attention sinks have keys unlike all others

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.scale == "token" else frozenset({"inputs"})

    def storage(self, name: Name) -> Format:
        """Format `name` as these options have it. Raises FormatError."""
        if self.scale == "token":
            more = {} if self.group is None else {"group": self.group}
            if not self.symmetric and name.startswith("int"):
                return Affine(width=int(name.removeprefix("int")), **more)
            return formats.writable(name, symmetric=self.symmetric, scale_dtype="float16", **more)
        if not name.startswith("fp8_") or self.group is not None or not self.symmetric:
            raise FormatError(
                f"scale: {self.scale} is for fp8_e4m3 and fp8_e5m2 without group or zero point, not {name}"
            )
        return Float8Static(kind=name.removeprefix("fp8_"))

    def formats(self, attn: Attention | MLA) -> dict[str, Format]:
        """By name of the stream. Raises FormatError for options that are no format."""
        if not isinstance(attn, MLA):
            return {"k": self.storage(self.format), "v": self.storage(self.values or self.format)}
        if self.scale != "token" or self.values is not None:
            raise FormatError("a latent is key and value of all heads in one; leave out values and scale")
        if attn.indexer is not None and (self.recent or self.first):
            raise FormatError(
                "an indexer picks the tokens that are read, from one kind of pages; leave out recent and first"
            )
        each = self.storage(self.format)
        whole = self.group or attn.cache.streams[0].shape[-1] == attn.rank  # no rotated key beside it
        return {"latent": each if whole else Parted(inner=each, cut=attn.rank)}


def stored(attn: Attention | MLA, formats: dict[str, Format], **exact: int) -> CacheSpec | Skipped:
    """The cache of a site with its streams in `formats`, and so many `recent` and `first` tokens exact as well.

    Raises: FormatError for what a format cannot hold, PassError for a cache that is packed already.
    """
    cache, kinds = attn.cache, set(formats.values())
    if cache.packed:
        raise PassError(f"the cache is stored as {cache.storage} already")
    if len(kinds) == 1 and len(formats) == len(cache.streams):
        change = {"format": kinds.pop()}
    else:
        change = {"streams": tuple(dataclasses.replace(s, format=formats.get(s.name)) for s in cache.streams)}
    near = cache.replace(**change, **exact, window=None).near
    if near is not None and cache.window is not None and near.window >= cache.window:
        return Skipped(f"its window of {cache.window} lies within the {near.window} newest tokens, which stay exact")
    if near is None and cache.share is not None:  # else it has to know which tokens are where
        return Skipped(f"reads the cache of layer {cache.share}")
    return cache.replace(**change, **exact)


@register("quantize_kv", axis=Axis.BITS, stage=Stage.CACHE, options=QuantizeKV, exact=False)
def quantize_kv(site: Site, attn: Attention | MLA, opt: QuantizeKV) -> Attention | MLA | Skipped:
    """K and V stored as `format` with one scale (float16) a token and head, dequantized where attention reads them.

    int8 costs 8 + 16 / H bits a number; int4 half of that and visibly more error in K (KIVI, arXiv:2402.02750, sections
    3.1 and 3.2, shows why keys want scales a channel); without symmetry 32 / H for 16 / H. Latents have a scale for the latent
    and one for the rotated key. `first` and `recent` tokens are read unrounded, as in KVQuant (arXiv:2401.18079, section 3.5)
    and KIVI. fp8 with one calibrated scale a head or layer (vLLM's `kv_cache_dtype: fp8`) stores no scales: k / s_k and
    v / s_v, s = absmax / largest fp8 number on calibration text, with s_k folded into q and s_v into what attention returns.
    """
    try:
        cache = stored(attn, opt.formats(attn), recent=opt.recent, first=opt.first)
        if isinstance(cache, Skipped):
            return cache
        if opt.scale == "token":
            return replace(attn, cache=cache)
        k, v = _scales(site, attn, cache, opt.scale == "tensor")
        return replace(attn, cache=cache, k_scale=_held(k), v_scale=_held(v))
    except (FormatError, PassError) as error:
        raise PassError(f"quantize_kv at {site.path}: {error}") from None


def _held(scale) -> nnx.Param:
    return nnx.Param(scale, axes=("kv_heads",))


def _scales(site: Site, attn: Attention, cache: CacheSpec, whole: bool):
    """(s_k, s_v) float32[K] of what the site saw, one for all heads where `whole`; shapes where it saw nothing."""
    if site.seen is None:
        return (jax.ShapeDtypeStruct((attn.kv_heads,), jnp.float32),) * 2
    largest = [_largest(attn, x, ragged) for x, ragged, *_ in site.seen.inputs]
    return tuple(_scale(jnp.max(jnp.stack(each), axis=0), format_.top, whole)
                 for each, format_ in zip(zip(*largest, strict=True), cache.formats, strict=True))  # fmt: skip


def _largest(attn: Attention, x: jax.Array, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Largest |k|, after the rotation, and |v| by kv head, [K] each, of tokens x [T, D]."""
    return tuple(jnp.max(jnp.abs(y.astype(jnp.float32)), axis=(0, 2)) for y in attn.keys_and_values(x, ragged))


def _scale(largest: jax.Array, top: float, whole: bool) -> jax.Array:
    largest = jnp.full_like(largest, jnp.max(largest)) if whole else largest
    return jnp.where(largest > 0, largest / top, 1)
