"""Storage formats of tensors: how a row of numbers becomes packed bytes, scales and zero points, and back.

A format packs along the last axis of its input; `QTensor` (tensor.py) keeps the contraction axis there. Every method
works on concrete arrays, under `jax.jit` and under `jax.eval_shape`.
"""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from optx import formats_fp4 as fp4
from optx.errors import FormatError, did_you_mean
from optx.ggml import BLOCKS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a format stores: `data` packed along the last axis, `scale` and `zero` per group of the last axis."""

    data: jax.Array
    scale: jax.Array | None = None
    zero: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Base of the formats. `group` numbers share one scale; None: the last axis does (a channel, a token's head)."""

    can_encode: ClassVar[bool] = True

    @property
    def has_zero(self) -> bool:
        """Whether a group carries a zero point."""
        return False

    def check(self, length: int) -> str | None:
        """Why an axis of `length` numbers cannot be stored, or None."""
        raise NotImplementedError

    def encode(self, x: jax.Array) -> Parts:
        """float[..., D] -> Parts, round to nearest."""
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
    scale_dtype: str = "float16"  # codes are computed with the rounded scale, so its rounding adds no bias

    def __post_init__(self):
        if self.width not in (2, 3, 4, 8):
            raise FormatError(f"int format: width {self.width}; allowed: 2, 3, 4, 8")
        if self.group is not None and self.group < 1:
            raise FormatError(f"int format: group {self.group}; a positive number of elements, or null for a channel")

    @property
    def has_zero(self):
        return not self.symmetric

    def __str__(self):
        return f"int{self.width}" + (f"_g{self.group}" if self.group else "") + ("" if self.symmetric else "_asym")

    def check(self, length):
        need = {8: 1, 4: 2, 3: 8, 2: 4}[self.width]
        if self.group and length % self.group:
            return f"{self}: axis of {length} is not a multiple of the group {self.group}"
        return f"{self}: axis of {length} is not a multiple of {need}" if length % need else None

    def packed(self, length):
        return length * self.width // 8

    def grouped(self, length):
        return length // (self.group or length)

    def encode(self, x):
        *lead, length = x.shape
        _require(self.check(length))
        groups = self.grouped(length)
        x = x.astype(jnp.float32).reshape(*lead, groups, length // groups)
        levels = 2**self.width - 1
        if self.symmetric:
            span = 2 * jnp.max(jnp.abs(x), axis=-1, keepdims=True)
            low = None
        else:
            low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0)
            span = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0) - low
        scale = _scale(span, levels, self.scale_dtype)
        s = scale.astype(jnp.float32)
        offset = 2 ** (self.width - 1)
        zero = jnp.full_like(s, offset) if low is None else jnp.clip(jnp.round(-low / s), 0, levels)
        codes = jnp.clip(jnp.round(x / s) + zero, 0, levels).reshape(*lead, length)
        return Parts(
            data=self._pack(codes),
            scale=scale[..., 0],
            zero=None if low is None else zero[..., 0].astype(jnp.uint8),
        )

    def decode(self, parts, length, dtype):
        codes = self._unpack(parts.data, length)
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
        codes = codes.astype(jnp.uint8)
        if self.width == 3:
            return jnp.concatenate([_pack_bits(codes & 3, 2), _pack_bits(codes >> 2, 1)], axis=-1)
        return _pack_bits(codes, self.width)

    def _unpack(self, data, length):
        """Packed bytes -> int16 codes, centred on zero when symmetric."""
        if self.width == 8:
            return data.astype(jnp.int16)
        if self.width == 3:
            cut = length // 4
            codes = _unpack_bits(data[..., :cut], 2) | (_unpack_bits(data[..., cut:], 1) << 2)
        else:
            codes = _unpack_bits(data, self.width)
        codes = codes.astype(jnp.int16)
        return codes - 2 ** (self.width - 1) if self.symmetric else codes


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

    def encode(self, x):
        *lead, length = x.shape
        _require(self.check(length))
        groups = self.grouped(length)
        x = x.astype(jnp.float32).reshape(*lead, groups, length // groups)
        top = float(jnp.finfo(self.dtype).max)
        scale = _scale(jnp.max(jnp.abs(x), axis=-1, keepdims=True), top, self.scale_dtype)
        data = jnp.clip(x / scale.astype(jnp.float32), -top, top).astype(self.dtype)
        return Parts(data=data.reshape(*lead, length), scale=scale[..., 0])

    def decode(self, parts, length, dtype):
        groups = self.grouped(length)
        lead = parts.data.shape[:-1]
        x = parts.data.astype(jnp.float32).reshape(*lead, groups, length // groups)
        return (x * parts.scale[..., None].astype(jnp.float32)).astype(dtype).reshape(*lead, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float4(Format):
    """e2m1 codes two a byte (even index in the low nibble) in blocks: `mx` (OCP MX v1.0) or `nv` (NVIDIA NVFP4).

    mxfp4: x = 2^(e - 127) q, e: uint8 a block of 32 (e8m0, 255: NaN).
    nvfp4: x = o s q, s: e4m3 a block of 16, o: float32 a row of the packed axis. `scale` is uint8[..., D / 16 + 4]: the
    bytes of s, then those of o (little-endian), so that a slice of rows keeps both. Rules: optx/formats_fp4.py.
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

    def encode(self, x):
        *lead, length = x.shape
        _require(self.check(length))
        x = x.astype(jnp.float32).reshape(*lead, length // self.group, self.group)
        scale = (fp4.mx_scale if self.kind == "mx" else fp4.nv_scale)(jnp.max(jnp.abs(x), axis=-1))
        codes = fp4.codes(x / self.factor(scale)[..., None]).reshape(*lead, length)
        return Parts(data=_pack_bits(codes, 4), scale=scale)

    def decode(self, parts, length, dtype):
        codes = fp4.values(_unpack_bits(parts.data, 4))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGML(Format):
    """A block format of GGUF files, kept as the file's own bytes: uint8[..., blocks * bytes]."""

    can_encode: ClassVar[bool] = False
    block: str

    def __str__(self):
        name = self.block.lower()
        return f"gguf_{name}" if name in NAMES else name  # its MXFP4 lies otherwise than the one of `Float4`

    def check(self, length):
        n = BLOCKS[self.block].elements
        return f"{self}: axis of {length} is not a multiple of the block of {n}" if length % n else None

    def packed(self, length):
        return length // BLOCKS[self.block].elements * BLOCKS[self.block].bytes

    def grouped(self, length):
        return None

    def bits(self, length):
        return 8 * BLOCKS[self.block].bytes / BLOCKS[self.block].elements

    def encode(self, x):
        raise FormatError(f"{self} is a file format that optx reads but does not write; quantize to {', '.join(NAMES)}")

    def decode(self, parts, length, dtype):
        block = BLOCKS[self.block]
        *lead, size = parts.data.shape
        blocks = parts.data.reshape(*lead, size // block.bytes, block.bytes)
        return block.dequantize(blocks).astype(dtype).reshape(*lead, length)


NAMES = ("int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4")
_TEXT = re.compile(
    r"(?:int(?P<width>\d+)|fp8_(?P<kind>e4m3|e5m2)|(?P<fp4>mx|nv)fp4)(?:_g(?P<group>\d+))?(?P<asym>_asym)?"
)


def parse(text: str) -> Format:
    """`int4_g64`, `int8_asym`, `fp8_e4m3`, `mxfp4`, `q4_1` -> Format. Inverse of `str(format)`.

    A block type's own name in capitals, `MXFP4`, is that of the file.

    Raises: FormatError naming the nearest known format.
    """
    block = text.removeprefix("gguf_").upper()
    if block in BLOCKS and text not in NAMES:
        return GGML(block=block)
    match = _TEXT.fullmatch(text)
    if match is None or (match["asym"] and not match["width"]):
        known = (*NAMES, *(str(GGML(block=name)) for name in BLOCKS))
        raise FormatError(f"format {text!r} is not known{did_you_mean(text, known)}")
    group = int(match["group"]) if match["group"] else None
    if match["kind"]:
        return Float8(kind=match["kind"], group=group)
    if match["fp4"]:
        return Float4(kind=match["fp4"], group=group)
    return Int(width=int(match["width"]), group=group, symmetric=not match["asym"])


def writable(name: str, *, symmetric: bool = True, **fields) -> Format:
    """The format called `name` (one of NAMES) with `fields` set. Raises FormatError for what it cannot have."""
    if name not in NAMES:
        raise FormatError(f"format {name!r} is not one that optx writes{did_you_mean(name, NAMES)}")
    format_ = dataclasses.replace(parse(name), **fields)
    if symmetric:
        return format_
    if not isinstance(format_, Int):
        raise FormatError(f"{name} has no zero point; set symmetric: true")
    return dataclasses.replace(format_, symmetric=False)


def _require(reason: str | None):
    if reason:
        raise FormatError(reason)


def _scale(span, levels, dtype):
    """span / levels in the range of `dtype`; 1 for a group of zeros, NaN for one with a NaN or an infinity in it.

    A stored scale is never 0 and never infinite: dividing by it would turn numbers into NaN.
    """
    info = jnp.finfo(dtype)
    tiny = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))  # XLA may flush float32 subnormals
    scale = jnp.where(span > 0, jnp.clip(span / levels, tiny, float(info.max)), 1)
    return jnp.where(jnp.isfinite(span), scale, jnp.nan).astype(dtype)


def _pack_bits(codes, width):
    """uint8 codes of `width` bits [..., D] -> bytes [..., D * width / 8], lowest bits first."""
    per = 8 // width
    codes = codes.reshape(*codes.shape[:-1], -1, per)
    shifts = jnp.asarray(np.arange(per) * width, jnp.uint8)
    return jnp.sum(codes << shifts, axis=-1, dtype=jnp.uint8)


def _unpack_bits(data, width):
    """Inverse of `_pack_bits`."""
    per = 8 // width
    shifts = jnp.asarray(np.arange(per) * width, jnp.uint8)
    codes = (data[..., None] >> shifts) & jnp.uint8(2**width - 1)
    return codes.reshape(*data.shape[:-1], -1)
