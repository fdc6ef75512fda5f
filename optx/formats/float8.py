"""fp8 with scales."""

import dataclasses

import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats.base import Format, Parts, scale_of, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8(Format):
    """fp8 with one scale a group: q = (x / s) in e4m3 (max 448) or e5m2 (max 57344), s = absmax / max."""

    kind: str = "e4m3"
    group: int | None = None
    scale_dtype: str = "float32"

    def __post_init__(self):
        if self.kind not in ("e4m3", "e5m2"):
            raise FormatError(f"fp8 format: kind {self.kind!r}; allowed: e4m3, e5m2")
        if self.group is not None and self.group < 1:
            raise FormatError(f"fp8 format: group {self.group}; a positive number of elements, or null for a channel")

    def __str__(self):
        return f"fp8_{self.kind}" + (f"_g{self.group}" if self.group else "")

    @property
    def dtype(self):
        return jnp.float8_e4m3fn if self.kind == "e4m3" else jnp.float8_e5m2

    def check(self, length):
        if self.group and length % self.group:
            return f"{self}: axis of {length} is not a multiple of the group {self.group}"
        return None

    def packed(self, length):
        return length

    def grouped(self, length):
        return length // (self.group or length)

    @property
    def top(self) -> float:
        return float(jnp.finfo(self.dtype).max)

    def grid(self, x, shrink=1.0):
        *lead, length = x.shape
        groups = self.grouped(length)
        absmax = jnp.max(jnp.abs(x.astype(jnp.float32).reshape(*lead, groups, length // groups)), axis=-1)
        return scale_of(absmax * shrink, self.top, self.scale_dtype), None

    def steps(self, scale, zero, length):
        step = spread(scale.astype(jnp.float32), length)
        return step, jnp.zeros_like(step)

    def code(self, x, step, offset):
        return jnp.clip(x / step, -self.top, self.top).astype(self.dtype).astype(jnp.float32)

    def value(self, code, step, offset):
        return code * step

    def assemble(self, codes, scale, zero):
        return Parts(data=codes.astype(self.dtype), scale=scale)

    def decode(self, parts, length, dtype):
        groups = self.grouped(length)
        lead = parts.data.shape[:-1]
        x = parts.data.astype(jnp.float32).reshape(*lead, groups, length // groups)
        return (x * parts.scale[..., None].astype(jnp.float32)).astype(dtype).reshape(*lead, length)
