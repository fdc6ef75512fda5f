"""gated_matmul on Hopper: of one token in the product's kernel, of more by the kernels of both ops, to the same bits."""

import math

import jax

from optx.pallas.gated_act import mosaic_gpu_sm90 as gated_act
from optx.pallas.norm_matmul import mosaic_gpu_sm90 as norm_matmul
from optx.pallas.norm_matmul.mosaic_gpu_sm90 import product
from optx.pallas.quant_matmul import mosaic_gpu_sm90_made as makers
from optx.pallas.quant_matmul.mosaic_gpu_sm90 import made_matmul


def supports(args, target) -> str | None:
    """args: f, activation, weight (dense or packed, abstract will do), dtype of the activations, activations (a format)."""
    return gated_act.supports(args, target) or norm_matmul.supports(args, target)


def gated_matmul(both, w, *, activation: str) -> jax.Array:
    """As the reference, for bfloat16."""
    if math.prod(both.shape[:-1]) != 1:
        return product(gated_act.gated_act(both, None, activation=activation), w)
    (y,) = made_matmul(makers.gated(both, activation), [both.reshape(1, -1)], w)
    return y.reshape(*both.shape[:-1], -1)
