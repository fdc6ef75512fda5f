"""Integers of 8, 4, 3 or 2 bits."""

import dataclasses

import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats.base import Format, Parts, pack_codes, scale_of, spread, unpack_codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(Format):
    """Integers of 8, 4, 3 or 2 bits with one scale a group.

    symmetric:  q = clip(round(x / s), -2^(b-1), 2^(b-1)-1),  s = absmax / ((2^b - 1) / 2)
    asymmetric: q = clip(round(x / s) + z, 0, 2^b - 1),  s = (max - min) / (2^b - 1) with 0 inside [min, max]

    The scale rule is the one of compressed-tensors (`calculate_qparams`), so that exports need no second rounding.
    int8 lies one a byte, int4 two a byte (even index in the low nibble), int2 four a byte (lowest bits first), int3 as
    a plane of its two low bits followed by a plane of its high bits.
    """

    width: int
    group: int | None = None
    symmetric: bool = True
    clip: float = 1.0  # share of a group's range that the codes span; what lies outside gets the last code
    scale_dtype: str = "float16"  # codes are computed with the rounded scale, so its rounding adds no bias

    def __post_init__(self):
        if self.width not in (2, 3, 4, 8):
            raise FormatError(f"int format: width {self.width}; allowed: 2, 3, 4, 8")
        if not 0 < self.clip <= 1:
            raise FormatError(f"int format: clip {self.clip:g}; allowed: above 0, at most 1")
        if self.group is not None and self.group < 1:
            raise FormatError(f"int format: group {self.group}; a positive number of elements, or null for a channel")

    @property
    def has_zero(self):
        return not self.symmetric

    def __str__(self):
        group, zero = f"_g{self.group}" if self.group else "", "" if self.symmetric else "_asym"
        return f"int{self.width}{group}{zero}" + ("" if self.clip == 1 else f"_clip{self.clip:g}")

    def check(self, length):
        need = {8: 1, 4: 2, 3: 8, 2: 4}[self.width]
        if self.group and length % self.group:
            return f"{self}: axis of {length} is not a multiple of the group {self.group}"
        return f"{self}: axis of {length} is not a multiple of {need}" if length % need else None

    def packed(self, length):
        return length * self.width // 8

    def grouped(self, length):
        return length // (self.group or length)

    @property
    def levels(self):
        return 2**self.width - 1

    def grid(self, x, shrink=1.0):
        *lead, length = x.shape
        groups = self.grouped(length)
        x = x.astype(jnp.float32).reshape(*lead, groups, length // groups) * (shrink * self.clip)
        if self.symmetric:
            return scale_of(2 * jnp.max(jnp.abs(x), axis=-1), self.levels, self.scale_dtype), None
        low = jnp.minimum(jnp.min(x, axis=-1), 0)
        scale = scale_of(jnp.maximum(jnp.max(x, axis=-1), 0) - low, self.levels, self.scale_dtype)
        zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, self.levels)
        return scale, zero.astype(jnp.uint8)

    def steps(self, scale, zero, length):
        step = spread(scale.astype(jnp.float32), length)
        middle = jnp.full_like(step, 2 ** (self.width - 1))
        return step, middle if zero is None else spread(zero.astype(jnp.float32), length)

    def code(self, x, step, offset):
        return jnp.clip(jnp.round(x / step) + offset, 0, self.levels)

    def value(self, code, step, offset):
        return (code - offset) * step

    def assemble(self, codes, scale, zero):
        return Parts(data=self._pack(codes), scale=scale, zero=zero)

    def decode(self, parts, length, dtype):
        codes = self.codes(parts.data, length)
        groups = self.grouped(length)
        lead = codes.shape[:-1]
        codes = codes.reshape(*lead, groups, length // groups)
        if parts.zero is not None:
            codes = codes - parts.zero[..., None].astype(codes.dtype)
        x = codes.astype(jnp.float32) * parts.scale[..., None].astype(jnp.float32)
        return x.astype(dtype).reshape(*lead, length)

    def _pack(self, codes):
        """Unsigned codes [..., D] -> packed bytes; symmetric int8 is stored signed."""
        if self.width == 8:
            return (codes - 128).astype(jnp.int8) if self.symmetric else codes.astype(jnp.uint8)
        return pack_codes(codes.astype(jnp.uint8), self.width)

    def codes(self, data, length):
        """Packed bytes -> int16 codes, centred on zero when symmetric."""
        if self.width == 8:
            return data.astype(jnp.int16)
        codes = unpack_codes(data, self.width).astype(jnp.int16)
        return codes - 2 ** (self.width - 1) if self.symmetric else codes
