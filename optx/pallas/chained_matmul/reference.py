"""chained_matmul in plain JAX."""

import jax

from optx import tensor
from optx.pallas.add_norm.reference import add_norm
from optx.pallas.gated_act.reference import gated_act


def chained_matmul(
    row, x, weight, o, gate_up, down, following=None, sync=None, *, activation: str, eps: float, offset: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What a block does behind its attention: s = x + row @ o; y = (act(gate) * up) @ down of [gate | up] = norm(s) @ gate_up.

    row [T, D']; x [T, D]; weight [D] of the norm; o [D', D], gate_up [D, 2F], down [F, D], dense or packed
    -> (s [T, D], y [T, D], sync). following: (weight [D], w [D, E]) of the next norm, alike, and of the product that reads it
    -> (s + y, norm(s + y) @ w [T, E], sync). sync: int32[1], zero, at which thread blocks of a kernel wait for each other; one
    call's goes into the next, so that none has to be made; None: it is made.
    """
    s, normed = add_norm(x, tensor.matmul(row, o), weight, eps=eps, offset=offset)
    y = tensor.matmul(gated_act(tensor.matmul(normed, gate_up), None, activation=activation), down)
    if following is None:
        return s, y, sync
    weight, w = following
    s, normed = add_norm(s, y, weight, eps=eps, offset=offset)
    return s, tensor.matmul(normed, w), sync
