"""What a storage format is: how a row of numbers becomes packed bytes, scales and zero points, and back.

A format packs along the last axis of its input; `QTensor` (tensor.py) keeps the contraction axis there. Every method
works on concrete arrays, under `jax.jit` and under `jax.eval_shape`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from optx.errors import FormatError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a format stores: `data` packed along the last axis, `scale` and `zero` per group of the last axis."""

    data: jax.Array
    scale: jax.Array | None = None
    zero: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Base of the formats. `group` numbers share one scale; None: the last axis does (a channel, a token's head).

    Rounding is split so that a pass may choose codes or scales by a rule of its own: `grid` gives the scales, `steps` spreads
    them over the axis, `code` and `value` work number by number, `assemble` packs.
    """

    can_encode: ClassVar[bool] = True

    @property
    def has_zero(self) -> bool:
        """Whether a group carries a zero point."""
        return False

    @property
    def block_rows(self) -> int:
        """Rows of the packed array that share their scales: of R rows of `data`, `scale` has ceil(R / block_rows)."""
        return 1

    def check(self, length: int) -> str | None:
        """Why an axis of `length` numbers cannot be stored, or None."""
        raise NotImplementedError

    def encode(self, x: jax.Array) -> Parts:
        """float[..., D] -> Parts, round to nearest with the scales of `grid`."""
        require(self.check(x.shape[-1]))
        scale, zero = self.grid(x)
        return self.assemble(self.code(x.astype(jnp.float32), *self.steps(scale, zero, x.shape[-1])), scale, zero)

    def grid(self, x: jax.Array, shrink: float | jax.Array = 1.0) -> tuple[jax.Array, jax.Array | None]:
        """float[..., D] -> (scale, zero) as they are stored; shrink: of each group's range, for a search."""
        raise NotImplementedError

    def steps(self, scale: jax.Array, zero: jax.Array | None, length: int) -> tuple[jax.Array, jax.Array]:
        """Stored scale and zero -> (step, offset) float32[..., D]: a number is step * (code - offset)."""
        raise NotImplementedError

    def code(self, x: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        """float32 -> float32 codes, number by number: the nearest."""
        raise NotImplementedError

    def value(self, code: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        """Inverse of `code`, float32."""
        raise NotImplementedError

    def assemble(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> Parts:
        """Codes [..., D] with the scales and zeros that they were made with -> Parts."""
        raise NotImplementedError

    def decode(self, parts: Parts, length: int, dtype) -> jax.Array:
        """Parts -> dtype[..., D] with D = length."""
        raise NotImplementedError

    def packed(self, length: int) -> int:
        """Entries of `data` along the last axis for `length` numbers."""
        raise NotImplementedError

    def grouped(self, length: int) -> int | None:
        """Entries of `scale` along the last axis, or None when the format has no scale of its own."""
        raise NotImplementedError

    def bits(self, length: int) -> float:
        """Bits a number, scales and zero points included, on an axis of `length` numbers."""
        parts = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((length,), jnp.float32))
        return 8 * sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(parts)) / length


def require(reason: str | None):
    if reason:
        raise FormatError(reason)


def narrow(x: jax.Array, dtype) -> jax.Array:
    """x rounded to a float of fewer bits. Without the barrier XLA may take the way there and back for nothing (on GPUs it does:
    `xla_allow_excess_precision`), and a program would read numbers that were never rounded."""
    return jax.lax.optimization_barrier(x.astype(dtype))


def scale_of(span, levels, dtype):
    """span / levels in the range of `dtype`; 1 for a group of zeros, NaN for one with a NaN or an infinity in it.

    A stored scale is never 0 and never infinite: dividing by it would turn numbers into NaN.
    """
    info = jnp.finfo(dtype)
    tiny = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))  # XLA may flush float32 subnormals
    scale = jnp.where(span > 0, jnp.clip(span / levels, tiny, float(info.max)), 1)
    return narrow(jnp.where(jnp.isfinite(span), scale, jnp.nan), dtype)


def pack_bits(codes, width):
    """uint8 codes of `width` bits [..., D] -> bytes [..., D * width / 8], lowest bits first."""
    per = 8 // width
    codes = codes.reshape(*codes.shape[:-1], -1, per)
    shifts = jnp.asarray(np.arange(per) * width, jnp.uint8)
    return jnp.sum(codes << shifts, axis=-1, dtype=jnp.uint8)


def unpack_bits(data, width):
    """Inverse of `pack_bits`."""
    per = 8 // width
    shifts = jnp.asarray(np.arange(per) * width, jnp.uint8)
    codes = (data[..., None] >> shifts) & jnp.uint8(2**width - 1)
    return codes.reshape(*data.shape[:-1], -1)


def pack_codes(codes: jax.Array, width: int) -> jax.Array:
    """uint8 codes of 1 to 4 bits [..., D] -> bytes [..., D * width / 8]; 3 bits are a plane of the two low ones, then one of the
    high ones."""
    if width == 3:
        return jnp.concatenate([pack_bits(codes & 3, 2), pack_bits(codes >> 2, 1)], axis=-1)
    return pack_bits(codes, width)


def unpack_codes(data: jax.Array, width: int) -> jax.Array:
    """Inverse of `pack_codes`."""
    if width != 3:
        return unpack_bits(data, width)
    cut = data.shape[-1] // 3 * 2
    return unpack_bits(data[..., :cut], 2) | (unpack_bits(data[..., cut:], 1) << 2)


def spread(groups: jax.Array, length: int) -> jax.Array:
    """[..., G] -> [..., D], each group's number D / G times."""
    wide = jnp.broadcast_to(groups[..., None], (*groups.shape, length // groups.shape[-1]))
    return wide.reshape(*groups.shape[:-1], length)
