"""matmul in plain JAX: x[..., D] @ w[D, F], accumulated in float32."""

import jax

from optx import tensor


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D], w [D, F] -> [..., F] in x's dtype."""
    return tensor.matmul(x, w)
