"""norm_matmul on Hopper: of one token in the product's kernel, of more by the kernels of both ops, to the same bits."""

import math

import jax

from optx import tensor
from optx.pallas.add_norm.mosaic_gpu_sm90 import add_norm
from optx.pallas.matmul import mosaic_gpu_sm90 as dense
from optx.pallas.quant_matmul import mosaic_gpu_sm90 as packed
from optx.pallas.quant_matmul import mosaic_gpu_sm90_made as makers


def supports(args, target) -> str | None:
    """args: weight (dense or packed, abstract will do), dtype of x and activations (a format) if they are known."""
    w = args["weight"]
    if w.shape[0] > makers.WIDEST:
        return f"{w.shape[0]} numbers a token; allowed: {makers.WIDEST} at most"
    return (packed if tensor.is_packed(w) else dense).supports(args, target)


def product(x, w) -> jax.Array:
    """x [..., D] @ w [D, F] by the kernels of the products."""
    return packed.quant_matmul(x, w) if tensor.is_packed(w) else dense.matmul(x, w)


def norm_matmul(x, y, weight, w, *, eps: float, offset: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """As the reference, for bfloat16."""
    if math.prod(x.shape[:-1]) != 1:
        s, normed = add_norm(x, y, weight, eps=eps, offset=offset)
        return s, product(normed, w)
    rows = [part.reshape(1, -1) for part in (x, y) if part is not None]
    made = makers.normed(x, y, weight, eps=eps, offset=offset)
    *s, y = packed.made_matmul(made, [*rows, weight], w)
    return s[0].reshape(x.shape) if s else x, y.reshape(*x.shape[:-1], -1)
