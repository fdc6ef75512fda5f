"""gated_matmul in plain JAX."""

import jax

from optx import tensor
from optx.pallas.gated_act.reference import gated_act


def gated_matmul(both, w, *, activation: str) -> jax.Array:
    """(act(gate) * up) @ w: gate and up side by side in both [T, 2D]; w [D, F], dense or packed -> [T, F]."""
    return tensor.matmul(gated_act(both, None, activation=activation), w)
