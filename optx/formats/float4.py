"""Blocks of 4-bit floats."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats import fp4
from optx.formats.base import Format, Parts, pack_bits, spread, unpack_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float4(Format):
    """e2m1 codes two a byte (even index in the low nibble) in blocks: `mx` (OCP MX v1.0) or `nv` (NVIDIA NVFP4).

    mxfp4: x = 2^(e - 127) q, e: uint8 a block of 32 (e8m0, 255: NaN).
    nvfp4: x = o s q, s: e4m3 a block of 16, o: float32 a row of the packed axis. `scale` is uint8[..., D / 16 + 4]: the
    bytes of s, then those of o (little-endian), so that a slice of rows keeps both. Rules: formats/fp4.py.
    """

    top: ClassVar[float] = fp4.TOP  # largest magnitude of a code
    kind: str
    group: int | None = None  # the block of the kind, 32 or 16; nothing else is allowed

    def __post_init__(self):
        if self.kind not in ("mx", "nv"):
            raise FormatError(f"fp4 format: kind {self.kind!r}; allowed: mx, nv")
        block = {"mx": 32, "nv": 16}[self.kind]
        if self.group not in (None, block):
            raise FormatError(f"{self}: group {self.group}; allowed: {block}, or null for it")
        object.__setattr__(self, "group", block)

    def __str__(self):
        return f"{self.kind}fp4"

    def check(self, length):
        return (
            f"{self}: axis of {length} is not a multiple of its block of {self.group}" if length % self.group else None
        )

    def packed(self, length):
        return length // 2

    def grouped(self, length):
        return length // self.group + (fp4.OUTER if self.kind == "nv" else 0)

    def grid(self, x, shrink=1.0):
        *lead, length = x.shape
        absmax = jnp.max(jnp.abs(x.astype(jnp.float32).reshape(*lead, length // self.group, self.group)), axis=-1)
        return (fp4.mx_scale(absmax * shrink) if self.kind == "mx" else fp4.nv_scale(absmax, shrink)), None

    def steps(self, scale, zero, length):
        step = spread(self.factor(scale), length)
        return step, jnp.zeros_like(step)

    def code(self, x, step, offset):
        return fp4.codes(x / step).astype(jnp.float32)

    def value(self, code, step, offset):
        return fp4.values(code.astype(jnp.uint8)) * step

    def assemble(self, codes, scale, zero):
        return Parts(data=pack_bits(codes.astype(jnp.uint8), 4), scale=scale)

    def decode(self, parts, length, dtype):
        codes = fp4.values(unpack_bits(parts.data, 4))
        codes = codes.reshape(*codes.shape[:-1], length // self.group, self.group)
        if self.kind == "mx":
            x = codes * fp4.mx_factor(parts.scale)[..., None]
        else:  # code times block scale is exact, so the product is rounded once
            blocks, outer = fp4.nv_split(parts.scale)
            x = codes * blocks[..., None] * outer[..., None]
        return x.astype(dtype).reshape(*codes.shape[:-2], length)

    def factor(self, scale):
        """float32[..., blocks]: what a block's codes are multiplied by."""
        if self.kind == "mx":
            return fp4.mx_factor(scale)
        blocks, outer = fp4.nv_split(scale)
        return blocks * outer
