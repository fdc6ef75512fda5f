"""`quant_matmul` on TPU: the kernel of `tpu_matmul.py` with one matrix.

w8a8 (`activations`): int8 by int8 or fp8 by fp8 goes to the matrix unit as codes where both have one scale a row and a
channel; other activation formats are rounded outside the kernel and multiplied as numbers.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import LoweringError
from optx.formats import Float8, Format, Int
from optx.pallas.tpu_common import arch_reason, dtype_reason, weight_reason
from optx.pallas.tpu_matmul import LONGEST, Plan, Tiles, all_tiles, product
from optx.pallas.tpu_matmul import tiles as tiles_for
from optx.tensor import QTensor


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why the kernel declines: reads `weight` (a QTensor, abstract or not) and, where given, `activations` (a
    Format) and `dtype` (of x)."""
    weight, activations = args["weight"], args.get("activations")
    if reason := arch_reason(target) or _reason(weight) or dtype_reason(args.get("dtype")):
        return reason
    if isinstance(activations, Float8) and isinstance(weight.format, Float8) and target.arch != "v7x":
        return f"{target.arch} has no fp8 matrix unit: {activations} activations would be emulated; allowed: v7x"
    return None


def _reason(w) -> str | None:
    if not isinstance(w, QTensor):
        return "a QTensor [D, F]"
    if w.ndim != 2:
        return f"a weight of {w.ndim} axes; allowed: [D, F]"
    if w.axis != -2:
        return f"a weight packed along axis {w.axis}; allowed: -2, the contracted one"
    if w.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a weight that stands for {w.dtype}; allowed: float32, bfloat16"
    return weight_reason(w.format, w.length)


def quant_matmul(
    x: jax.Array, w: QTensor, activations: Format | None = None, *, tiles: Tiles | None = None, interpret=False
) -> jax.Array:
    """x [..., D] in float32 or bfloat16, w QTensor [D, F] -> [..., F] in x's dtype, accumulated in float32.

    activations: the format that rows of x are rounded to first. interpret: False, True, or pltpu.InterpretParams.
    Raises: LoweringError naming the argument for shapes, dtypes and formats that it does not take.
    """
    say = functools.partial("quant_matmul (mosaic_tpu): {} is {}; allowed: {}".format)
    if reason := _reason(w):
        stored = w.format if isinstance(w, QTensor) else w.dtype
        raise LoweringError(say("w", f"{stored}{list(w.shape)}", reason))
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise LoweringError(say("x's dtype", x.dtype, "float32, bfloat16"))
    d, outputs = w.shape
    if not x.ndim or x.shape[-1] != d or d * x.dtype.itemsize > LONGEST:
        raise LoweringError(say("x", list(x.shape), f"[..., {d}], of at most {LONGEST} bytes a row"))
    if activations is not None and (reason := activations.check(d)):
        raise LoweringError(say("activations", activations, reason))
    tokens = math.prod(x.shape[:-1])
    native = activations is not None and _kind(activations, d) == _kind(w.format, d) is not None
    if not tokens:
        return jnp.zeros((*x.shape[:-1], outputs), x.dtype)
    cut = tiles or tiles_for(tokens=tokens, length=d, outputs=outputs, itemsize=x.dtype.itemsize, format_=w.format)
    if native:
        cut = Tiles(tokens=-(-cut.tokens // 32) * 32, outputs=cut.outputs)
    plan = Plan(format=w.format, length=d, tiles=cut, ragged=False, native=native, interpret=interpret)
    return _call(x.reshape(tokens, d), w, activations=activations, plan=plan).reshape(*x.shape[:-1], outputs)


def _kind(format_: Format, length: int):
    """What a matrix unit multiplies codes of: signed bytes or a kind of fp8, one scale a row; None for other formats."""
    if format_.grouped(length) != 1:
        return None
    if isinstance(format_, Float8):
        return format_.kind
    return "int8" if isinstance(format_, Int) and format_.width == 8 and format_.symmetric else None


@functools.partial(jax.jit, static_argnames=("activations", "plan"))
def _call(x, w: QTensor, *, activations: Format | None, plan: Plan):
    stacked = jax.tree.map(lambda part: part[None], w)
    visits = all_tiles(-(-x.shape[0] // plan.tiles.tokens))
    if activations is None:
        return product(x, stacked, visits, plan)
    rounded = tensor.quantize(x, activations, axis=-1)
    if not plan.native:
        return product(rounded.dequantize().astype(x.dtype), stacked, visits, plan)
    scale = rounded.scale[:, 0].astype(jnp.float32)
    return product(rounded.data, stacked, visits, plan, row_scale=scale).astype(x.dtype)
