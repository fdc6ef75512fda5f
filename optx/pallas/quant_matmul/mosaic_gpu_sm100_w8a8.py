"""`quant_matmul` with 8-bit activations on Blackwell: fp8 x fp8 and int8 x int8, one scale a row and a channel.

Rows of x are rounded by XLA; codes meet on the tensor cores (`optx.pallas.matmul.gemm_sm100`) and a finished sum is multiplied
by both scales. Never run on hardware so far.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import LoweringError
from optx.formats import Float8, Format, Int
from optx.pallas.matmul import gemm_sm100 as gemm
from optx.pallas.quant_matmul.mosaic_gpu_sm100 import shape_reason
from optx.tensor import QTensor

DEPTH = 128  # contracted numbers of a step: a row of the widest swizzle


def plan_for(rows: int, w: QTensor, tiles: gemm.Tiles | None = None) -> gemm.Plan:
    d, f = w.shape
    first = tiles or gemm.Tiles(rows=16, depth=DEPTH, stages=2)
    plan = gemm.Plan(tiles=first, depth=d, outputs=f, rows=rows, factors=2)
    return (
        plan
        if tiles
        else dataclasses.replace(plan, tiles=gemm.tiles_for(plan, DEPTH, w.data.dtype, w.data.dtype, most=256))
    )


def quant_matmul(
    x: jax.Array, w: QTensor, activations: Format | None = None, *, tiles: gemm.Tiles | None = None
) -> jax.Array:
    """x [..., D] rounded to `activations`, times w QTensor [D, F] -> [..., F] in x's dtype.

    Raises: LoweringError for what `supports` declines.
    """
    reason = _declines(w, activations)
    if reason:
        raise LoweringError(f"quant_matmul: {reason}")
    d, f = w.shape
    if x.shape[-1] != d:
        raise LoweringError(f"quant_matmul: x {list(x.shape)} meets w {list(w.shape)}; allowed: x [..., {d}]")
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], f), x.dtype)
    codes = tensor.quantize(x.reshape(-1, d), activations, axis=-1)
    factors = (w.scale[:, 0].astype(jnp.float32), codes.scale[:, 0].astype(jnp.float32))
    y = gemm.product(codes.data, w.data, *factors, plan=plan_for(len(codes.data), w, tiles), dtype=x.dtype)
    return y.reshape(*x.shape[:-1], f)


def supports(args, target) -> str | None:
    """args: weight (QTensor, abstract will do), activations (a format)."""
    return _declines(args["weight"], args.get("activations"))


def _declines(w, activations) -> str | None:
    if activations is None:
        return "activations as they are; allowed: int8 or fp8"
    if not isinstance(w, QTensor):
        return f"w is {type(w).__name__}; allowed: QTensor"
    for name, form in (("activations", activations), ("w", w.format)):
        eight = isinstance(form, Float8) or (isinstance(form, Int) and form.width == 8 and form.symmetric)
        if not eight or form.group not in (None, w.length):
            return f"{name} in {form}; allowed: int8 or fp8, symmetric, one scale a row and a channel"
    if isinstance(activations, Int) != isinstance(w.format, Int):
        return f"activations in {activations} by w in {w.format}; allowed: int8 by int8, fp8 by fp8"
    return shape_reason(w, DEPTH)
