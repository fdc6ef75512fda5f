"""quant_matmul in plain JAX: x[..., D] @ dequantize(w[D, F]), accumulated in float32."""

import jax

from optx import tensor
from optx.formats import Format
from optx.tensor import QTensor


def quant_matmul(x: jax.Array, w: QTensor, activations: Format | None = None) -> jax.Array:
    """x [..., D], w QTensor [D, F] -> [..., F] in x's dtype.

    activations: the format that rows of x are rounded to first, one scale a row or a group of D (w8a8); None: x as it is.
    """
    if activations is not None:
        codes = jax.lax.optimization_barrier(
            tensor.quantize(x, activations, axis=-1)
        )  # XLA drops a conversion to fp8 and back
        x = codes.dequantize()
    return tensor.matmul(x, w)
