"""quant_matmul in plain JAX: x[..., D] @ dequantize(w[D, F]), accumulated in float32 (int32 where codes of int8 meet)."""

import jax
import jax.numpy as jnp

from optx import tensor
from optx.formats import Float8, Format, Int
from optx.tensor import QTensor


def quant_matmul(x: jax.Array, w: QTensor, activations: Format | None = None) -> jax.Array:
    """x [..., D], w QTensor [D, F] -> [..., F] in x's dtype.

    activations: the format that rows of x are rounded to first, one scale a row or a group of D (w8a8); None: x as it is.
    Where x and w are both int8 or both fp8, one scale a row and a channel, their codes are multiplied:
    y = s_x s_w sum(q_x q_w).
    """
    if activations is None:
        return tensor.matmul(x, w)
    codes = tensor.quantize(x, activations, axis=-1)
    if not (_plain(activations, w.length) and _plain(w.format, w.length) and codes.data.dtype == w.data.dtype):
        return tensor.matmul(codes.dequantize(), w)
    total = jnp.int32 if isinstance(activations, Int) else jnp.float32
    y = jnp.matmul(codes.data, w.data.T, preferred_element_type=total).astype(jnp.float32)
    return (y * codes.scale.astype(jnp.float32) * w.scale[:, 0].astype(jnp.float32)).astype(x.dtype)


def _plain(format: Format, length: int) -> bool:
    """Codes that are numbers of 8 bits, one scale for all of a row."""
    eight = isinstance(format, Float8) or (isinstance(format, Int) and format.width == 8 and format.symmetric)
    return eight and format.grouped(length) == 1
