"""quant_matmul in plain JAX: x[..., D] @ dequantize(w[D, F]), accumulated in float32."""

from optx.tensor import matmul


def quant_matmul(x, w):
    """x [..., D], w QTensor [D, F] -> [..., F] in x's dtype."""
    return matmul(x, w)
