"""norm_matmul in plain JAX."""

import jax

from optx import tensor
from optx.pallas.add_norm.reference import add_norm


def norm_matmul(x, y, weight, w, *, eps: float, offset: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """s = x + y and norm(s) @ w: x [T, D]; y [T, D], or None: s = x; weight [D]; w [D, F], dense or packed
    -> (s [T, D], [T, F])."""
    s, normed = add_norm(x, y, weight, eps=eps, offset=offset)
    return s, tensor.matmul(normed, w)
