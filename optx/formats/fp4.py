"""Numbers of 4 bits (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) and the scales of blocks of them.

MXFP4: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 (MXFP4), 5.3.3 (e2m1), 5.4.1 (e8m0), 6.3 (the scale).
NVFP4: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, and "Introducing NVFP4
for Efficient and Accurate Low-Precision Inference" (developer.nvidia.com, 2025).
"""

import jax
import jax.numpy as jnp
import numpy as np

TOP = 6.0  # largest e2m1
E4M3_TOP = 448.0
E4M3_LEAST = 2.0**-9
OUTER = 4  # bytes of a row's float32 scale behind the scales of its blocks


def codes(x: jax.Array) -> jax.Array:
    """float32 -> uint8 codes 0..15 of the nearest e2m1, ties to the even code, saturating. Bit 3 is the sign."""
    size = jnp.abs(x)
    middles = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
    code = sum(((size >= at) if up else (size > at)).astype(jnp.uint8) for at, up in middles)
    return code | (jnp.signbit(x).astype(jnp.uint8) << 3)


def values(code: jax.Array) -> jax.Array:
    """Codes 0..15 -> float32. Doubled magnitudes stand as nibbles of one word, so that a shift looks them up."""
    doubled = (np.uint32(0xC8643210) >> ((code & 7) * 4).astype(jnp.uint32)).astype(jnp.int32) & 15
    return jnp.where(code >= 8, -0.5, 0.5) * doubled.astype(jnp.float32)


def mx_scale(absmax: jax.Array) -> jax.Array:
    """float32 -> e8m0 bytes: 2^(floor(log2 absmax) - 2) as exponent + 127; 127 (one) for zeros, 255 for what is not finite.

    Never 0: 2^-127 is a float32 subnormal, which XLA may take for zero.
    """
    exponent = (jax.lax.bitcast_convert_type(absmax, jnp.int32) >> 23) & 255
    byte = jnp.where(absmax > 0, jnp.maximum(exponent - 2, 1), 127)
    return jnp.where(jnp.isfinite(absmax), byte, 255).astype(jnp.uint8)


def mx_factor(byte: jax.Array) -> jax.Array:
    """e8m0 bytes -> float32 powers of two; 255 is NaN."""
    factor = jax.lax.bitcast_convert_type(byte.astype(jnp.int32) << 23, jnp.float32)
    smallest = jax.lax.bitcast_convert_type(jnp.int32(1 << 22), jnp.float32)  # 2^-127
    return jnp.where(byte == 255, jnp.nan, jnp.where(byte == 0, smallest, factor))


def nv_scale(absmax: jax.Array, shrink: float | jax.Array = 1.0) -> jax.Array:
    """float32[..., blocks] -> uint8[..., blocks + 4]: e4m3 of a block (of `shrink` times its largest), then the row's float32.

    outer = max / (6 * 448) over the row's finite blocks, block = absmax / 6 / outer in e4m3, 1 for zeros; a block that
    holds what is not finite has the NaN of e4m3.
    """
    finite = jnp.isfinite(absmax)
    largest = jnp.max(jnp.where(finite, absmax, 0), axis=-1, keepdims=True)
    outer = jnp.maximum(largest / (TOP * E4M3_TOP), float(jnp.finfo(jnp.float32).tiny) / E4M3_LEAST)
    outer = jnp.where(largest > 0, outer, 1)
    block = jnp.clip(absmax * shrink / TOP / outer, E4M3_LEAST, E4M3_TOP)
    block = jnp.where(finite, jnp.where(absmax > 0, block, 1), jnp.nan)
    return nv_join(block.astype(jnp.float8_e4m3fn), outer)


def nv_join(blocks: jax.Array, outer: jax.Array) -> jax.Array:
    """e4m3[..., blocks] and float32[..., 1] -> the stored bytes uint8[..., blocks + 4].

    For files with one float32 a tensor (`weight_scale_2` of ModelOpt): outer = that number for every row.
    """
    tail = jax.lax.bitcast_convert_type(outer.astype(jnp.float32)[..., 0], jnp.uint8)
    return jnp.concatenate([jax.lax.bitcast_convert_type(blocks, jnp.uint8), tail], axis=-1)


def nv_split(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of `nv_join`: float32[..., blocks], float32[..., 1]."""
    blocks = jax.lax.bitcast_convert_type(scale[..., :-OUTER], jnp.float8_e4m3fn).astype(jnp.float32)
    return blocks, jax.lax.bitcast_convert_type(scale[..., -OUTER:], jnp.float32)[..., None]
