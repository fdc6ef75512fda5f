"""What the TPU rows share: the generations they are built for, and what lies in memory as numbers of the vector unit."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from optx.formats import Float8, Format, Int

ARCHS = ("v5e", "v6e", "v7x")
LANES = 128
VMEM = 48 << 20  # bytes a kernel may take, of 64 MB (v7x) or 128 MB (v5e, v6e)


def arch_reason(target: Any) -> str | None:
    """Why the target is none that these rows are built for, or None."""
    if target.platform == "tpu" and target.arch in ARCHS:
        return None
    return f"built for tpu {', '.join(ARCHS)}; the target is {target.platform}/{target.arch}"


def dtype_reason(dtype) -> str | None:
    """Why activations of this dtype are not taken, or None, as where it is not known."""
    if dtype is None or jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16):
        return None
    return f"activations in {jnp.dtype(dtype).name}; allowed: float32, bfloat16"


def float16(bits):
    """float16 as its bits, uint16 -> float32: the vector unit has no float16. Subnormals by their value."""
    bits = bits.astype(jnp.int32)
    sign = jnp.where(bits >= 0x8000, -1.0, 1.0)
    size = bits & 0x7FFF
    normal = jax.lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    normal = jnp.where(size >= 0x7C00, jnp.where(size > 0x7C00, jnp.nan, jnp.inf), normal)
    return sign * jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)


def float16_bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def number(x):
    """What lies in memory -> float32."""
    if x.dtype == jnp.uint16:
        return float16(x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.int32)
    return x.astype(jnp.float32)


def weight_reason(format_: Format, length: int) -> str | None:
    """Why weights in this format, `length` numbers along the contraction, are not taken, or None."""
    if not (isinstance(format_, Float8) or (isinstance(format_, Int) and format_.width in (2, 4, 8))):
        return f"weights in {format_}; allowed: int8, int4, int2, fp8_e4m3, fp8_e5m2"
    parts = parts_of(format_)
    if length % (parts * LANES):
        return f"{length} numbers of {format_} to sum over; allowed: multiples of {parts * LANES}"
    lanes = (format_.group or length) // parts
    if (format_.group or 0) % parts or not lanes or (LANES % lanes and lanes % LANES):
        return f"groups of {format_.group} in {format_}; allowed: {parts} times a power of two, or a channel"
    return None


def parts_of(format_: Format) -> int:
    """Numbers that share a byte."""
    return 8 // format_.width if isinstance(format_, Int) else 1


def codes(data, format_: Format, dtype) -> list[jax.Array]:
    """Bytes [.., R, L] -> an array of codes as numbers of `dtype` for every number of a byte. They are `offset_of` too
    large, and zero points are not yet taken."""
    if isinstance(format_, Float8):
        return [data.astype(jnp.float32).astype(dtype)]
    width = format_.width
    # Four bytes are cut at once and widened as signed ones, for which there is an instruction.
    packs = data.dtype.itemsize == 1 and data.shape[-2] % 32 == 0
    if width < 8:
        mask = 2**width - 1
        if packs:
            words, mask = pltpu.bitcast(data, jnp.uint32), jnp.uint32(mask * 0x01010101)
            fields = [pltpu.bitcast((words >> at) & mask, jnp.int8) for at in range(0, 8, width)]
        else:
            fields = [(data.astype(jnp.int32) >> at) & mask for at in range(0, 8, width)]
    elif format_.symmetric:
        fields = [data]
    elif packs:
        fields = [pltpu.bitcast(pltpu.bitcast(data, jnp.uint32) ^ jnp.uint32(0x80808080), jnp.int8)]
    else:
        fields = [data.astype(jnp.int32) - 128]
    return [field.astype(jnp.int32).astype(jnp.float32).astype(dtype) for field in fields]


def offset_of(format_: Format | None) -> float:
    """What `codes` gives too much, beside the zero point of the format."""
    if not isinstance(format_, Int):
        return 0.0
    if format_.width == 8:
        return 0.0 if format_.symmetric else -128.0
    return 2.0 ** (format_.width - 1) if format_.symmetric else 0.0
