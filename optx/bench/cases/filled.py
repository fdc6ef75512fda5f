"""Large arrays of random numbers and codes, made on the device."""

import functools

import jax
import jax.numpy as jnp

from optx.formats import Affine, Codebook, Float8
from optx.tensor import QTensor


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_codes(key, shape, format):
    """A packed pool of random codes: sizes as those of encoded normal numbers."""
    codes, scales, zeros = jax.random.split(key, 3)
    *lead, length = shape
    data = jax.random.bits(codes, (*lead, format.packed(length)), jnp.uint8)
    size = 1 / 24
    rows = (*lead[:-1], lead[-1] // format.block_rows, format.grouped(length))
    if isinstance(format, Codebook):
        size = 1
    elif isinstance(format, Float8):  # no code that is not a number: 0x7f and 0xff
        data = jax.lax.bitcast_convert_type(data & 0xF7, jnp.float8_e4m3fn)
        size = 1 / 128
    elif format.width == 8:
        data, size = data if format.has_zero else jax.lax.bitcast_convert_type(data, jnp.int8), 1 / 48
    else:
        size = 4 / 2**format.width
    scale = (size * jax.random.uniform(scales, rows, minval=0.5)).astype(getattr(format, "scale_dtype", "float16"))
    zero = None
    if isinstance(format, Affine):
        zero = -(2.0 ** (format.width - 1)) * scale
    elif format.has_zero:
        middle = 2 ** (format.width - 1)
        zero = jax.random.randint(zeros, rows, middle - middle // 4, middle + middle // 4 + 1).astype(jnp.uint8)
    kwargs = {"format": format, "length": length, "axis": -1, "dtype": jnp.dtype("bfloat16")}
    return QTensor(data=data, scale=scale, zero=zero, **kwargs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random(key, shape, dtype):
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)
