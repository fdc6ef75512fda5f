"""Integers between the least and the largest number of a group: the asymmetric codes of KIVI."""

import dataclasses

import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats.base import Format, Parts, narrow, require, scale_of, spread
from optx.formats.ints import Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(Format):
    """x = s q + m over each group of the axis: m = min, s = (max - min) / (2^b - 1), q = round((x - m) / s) in b bits.

    s and m are float16 (`zero` holds m), and the codes are packed as those of `Int`: b + 32 / group bits a number. Against an
    integer zero point m needs no 0 inside [min, max], which keys far from 0 would pay for. KIVI (Liu et al. 2024,
    arXiv:2402.02750, section 3.2), its values; GGML's q4_1 in groups of any size.
    """

    width: int
    group: int | None = None
    clip: float = 1.0  # share of a group's range that the codes span, around its middle

    def __post_init__(self):
        if not 0 < self.clip <= 1:
            raise FormatError(f"affine format: clip {self.clip:g}; allowed: above 0, at most 1")
        if self.group is not None and self.group < 1:
            raise FormatError(f"affine format: group {self.group}; a positive number, or null for the whole axis")
        self.integers  # noqa: B018

    @property
    def integers(self) -> Int:
        """How the codes are packed. Raises FormatError for a width that has no packing."""
        return Int(width=self.width, symmetric=False)

    @property
    def has_zero(self):
        return True

    def __str__(self):
        return f"int{self.width}" + (f"_g{self.group}" if self.group else "") + "_affine" + self._clipped

    @property
    def _clipped(self):
        return "" if self.clip == 1 else f"_clip{self.clip:g}"

    def check(self, length):
        if self.group and length % self.group:
            return f"{self}: axis of {length} is not a multiple of the group {self.group}"
        return self.integers.check(length)

    def packed(self, length):
        return self.integers.packed(length)

    def grouped(self, length):
        return length // (self.group or length)

    def grid(self, x, shrink=1.0):
        *lead, length = x.shape
        groups = self.grouped(length)
        return self._range(x.astype(jnp.float32).reshape(*lead, groups, length // groups) * shrink, -1)

    def _range(self, x, axis):
        """-> (s, m) float16 over an axis."""
        low, span = jnp.min(x, axis=axis), jnp.max(x, axis=axis) - jnp.min(x, axis=axis)
        low, span = low + span * ((1 - self.clip) / 2), span * self.clip
        return scale_of(span, self.integers.levels, jnp.float16), narrow(low, jnp.float16)

    def steps(self, scale, zero, length):
        step = spread(scale.astype(jnp.float32), length)
        return step, -spread(zero.astype(jnp.float32), length) / step

    def code(self, x, step, offset):
        return jnp.clip(jnp.round(x / step + offset), 0, self.integers.levels)

    def value(self, code, step, offset):
        return (code - offset) * step

    def assemble(self, codes, scale, zero):
        return Parts(data=self.integers.assemble(codes, None, None).data, scale=scale, zero=zero)

    def decode(self, parts, length, dtype):
        codes = self.integers.codes(parts.data, length).astype(jnp.float32)
        scale, low = (spread(part.astype(jnp.float32), length) for part in (parts.scale, parts.zero))
        return (codes * scale + low).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerChannel(Affine):
    """The same over `group` rows, a channel at a time: KIVI's keys, whose outliers lie in fixed channels (section 3.1).

    Of [..., P, H] the codes are [..., P, H b / 8] and s and m float16[..., P / group, H].
    """

    def __post_init__(self):
        super().__post_init__()
        if self.group is None:
            raise FormatError("affine format: a scale a channel needs a group, the number of rows that share it")

    @property
    def block_rows(self):
        return self.group

    def __str__(self):
        return f"int{self.width}_g{self.group}_channel{self._clipped}"

    def check(self, length):
        return self.integers.check(length)

    def grouped(self, length):
        return length

    def encode(self, x):
        *lead, rows, length = x.shape
        require(self.check(length))
        if rows % self.block_rows:
            require(f"{self}: {rows} rows are no multiple of {self.block_rows}, whose channels share a scale")
        x = x.astype(jnp.float32)
        scale, low = self._range(x.reshape(*lead, -1, self.block_rows, length), -2)
        step = self._rows(scale)
        return self.assemble(self.code(x, step, -self._rows(low) / step), scale, low)

    def decode(self, parts, length, dtype):
        codes = self.integers.codes(parts.data, length).astype(jnp.float32)
        return (codes * self._rows(parts.scale) + self._rows(parts.zero)).astype(dtype)

    def bits(self, length):
        return self.width + 32 / self.block_rows

    def _rows(self, groups):
        """[..., P / group, H] -> float32[..., P, H]."""
        return jnp.repeat(groups.astype(jnp.float32), self.block_rows, axis=-2)
