"""fp8 with scales."""

import dataclasses

import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats.base import Format, Parts, narrow, scale_of, spread


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
        return narrow(jnp.clip(x / step, -self.top, self.top), self.dtype).astype(jnp.float32)

    def value(self, code, step, offset):
        return code * step

    def assemble(self, codes, scale, zero):
        return Parts(data=narrow(codes, self.dtype), scale=scale)

    def decode(self, parts, length, dtype):
        groups = self.grouped(length)
        lead = parts.data.shape[:-1]
        x = parts.data.astype(jnp.float32).reshape(*lead, groups, length // groups)
        return (x * parts.scale[..., None].astype(jnp.float32)).astype(dtype).reshape(*lead, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Static(Format):
    """fp8 without a scale of its own: q = x in e4m3 or e5m2, clipped to its largest number. Whoever stores x divides by a scale
    that is known before (calibrated) and multiplies what it reads by it."""

    kind: str = "e4m3"

    def __post_init__(self):
        Float8(kind=self.kind)

    def __str__(self):
        return f"fp8_{self.kind}_static"

    @property
    def dtype(self):
        return Float8(kind=self.kind).dtype

    @property
    def top(self) -> float:
        return float(jnp.finfo(self.dtype).max)

    def check(self, length):
        return None

    def packed(self, length):
        return length

    def grouped(self, length):
        return None

    def encode(self, x):
        return Parts(data=narrow(jnp.clip(x.astype(jnp.float32), -self.top, self.top), self.dtype))

    def decode(self, parts, length, dtype):
        return parts.data.astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Block(Format):
    """e4m3 with one float32 scale a square block: q = x / s, s = absmax / 448 over `group` rows by `group` numbers of each.

    Of [..., F, D] the scales are float32[..., ceil(F / group), ceil(D / group)]; blocks at the far edges may be smaller. The
    weights of DeepSeek-V3 (arXiv:2412.19437, section 3.3), whose files call s `weight_scale_inv`.
    """

    group: int | None = None  # edge of a block; None: 128

    def __post_init__(self):
        if self.group is not None and self.group < 1:
            raise FormatError(f"fp8_block format: group {self.group}; a positive number of elements, or null for 128")
        object.__setattr__(self, "group", self.group or 128)

    def __str__(self):
        return "fp8_block" + (f"_g{self.group}" if self.group != 128 else "")

    @property
    def block_rows(self):
        return self.group

    @property
    def top(self) -> float:
        return float(jnp.finfo(jnp.float8_e4m3fn).max)

    def check(self, length):
        return None

    def packed(self, length):
        return length

    def grouped(self, length):
        return -(-length // self.group)

    def bits(self, length):
        return 8 + 32 * self.grouped(length) / (length * self.group)  # of rows that fill their blocks

    def encode(self, x):
        if x.ndim < 2:
            raise FormatError(f"{self}: a block is of rows; got an array of shape {list(x.shape)}")
        scale, zero = self.grid(x)
        step = self._step(scale, *x.shape[-2:])
        return self.assemble(self.code(x.astype(jnp.float32), step, None), scale, zero)

    def grid(self, x, shrink=1.0):
        *lead, f, d = x.shape
        side = self.group
        size = jnp.abs(x.astype(jnp.float32))
        size = jnp.pad(size, [(0, 0)] * len(lead) + [(0, -f % side), (0, -d % side)])
        blocks = size.reshape(*lead, -(-f // side), side, -(-d // side), side)
        return scale_of(jnp.max(blocks, axis=(-3, -1)) * shrink, self.top, jnp.float32), None

    def steps(self, scale, zero, length):
        """As the base's, for as many rows as whole blocks have."""
        step = self._step(scale, scale.shape[-2] * self.group, length)
        return step, jnp.zeros_like(step)

    def code(self, x, step, offset):
        return narrow(jnp.clip(x / step, -self.top, self.top), jnp.float8_e4m3fn).astype(jnp.float32)

    def value(self, code, step, offset):
        return code * step

    def assemble(self, codes, scale, zero):
        return Parts(data=narrow(codes, jnp.float8_e4m3fn), scale=scale)

    def decode(self, parts, length, dtype):
        step = self._step(parts.scale, parts.data.shape[-2], length)
        return (parts.data.astype(jnp.float32) * step).astype(dtype)

    def _step(self, scale, rows: int, length: int):
        """Scales [..., blocks of rows, blocks of a row] -> float32[..., rows, length]."""
        rowwise = jnp.repeat(scale.astype(jnp.float32), self.group, axis=-2)[..., :rows, :]
        return jnp.repeat(rowwise, self.group, axis=-1)[..., :length]
