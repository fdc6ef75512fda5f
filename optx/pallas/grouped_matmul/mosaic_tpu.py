"""`grouped_matmul` on TPU: the kernel of `tpu_matmul.py` over visits of (tile of tokens, expert).

A tile that holds the end of one expert's tokens and the start of the next is visited once for each, and keeps the other's
rows. Experts without tokens are not visited, so their weights are not read. The number of visits is bounded by shapes:
tiles + experts; those left over stand at the last block and copy nothing.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import LoweringError
from optx.pallas.tpu_common import arch_reason, dtype_reason, weight_reason
from optx.pallas.tpu_matmul import LONGEST, Plan, Tiles, product
from optx.pallas.tpu_matmul import tiles as tiles_for
from optx.tensor import QTensor, Tensor

DTYPES = (jnp.float32, jnp.bfloat16)


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why the kernel declines: reads `weight` [E, D, F], an array or a QTensor, abstract or not, and, where given,
    `dtype` (of x)."""
    return arch_reason(target) or _reason(args["weight"]) or dtype_reason(args.get("dtype"))


def _reason(w: Tensor) -> str | None:
    if w.ndim != 3:
        return f"weights of {w.ndim} axes; allowed: [E, D, F]"
    if w.dtype not in DTYPES:
        return f"weights that stand for {w.dtype}; allowed: float32, bfloat16"
    if not isinstance(w, QTensor):
        if tensor.is_qtensor(w):
            return "an array or a QTensor"
        odd = [n for n in w.shape[1:] if n % 128]
        return f"{odd[0]} numbers of a dense matrix; allowed: multiples of 128" if odd else None
    if w.axis != -2:
        return f"weights packed along axis {w.axis}; allowed: -2, the contracted one"
    return weight_reason(w.format, w.length)


def grouped_matmul(
    x: jax.Array, w: Tensor, group_sizes: jax.Array, *, tiles: Tiles | None = None, interpret=False
) -> jax.Array:
    """out[t] = x[t] @ w[e(t)], as `grouped_matmul.reference.grouped_matmul`.

    x [T, D] in float32 or bfloat16, sorted by expert; w [E, D, F] dense or QTensor; group_sizes int[E]. Rows past their sum
    give 0. interpret: False, True, or pltpu.InterpretParams. -> [T, F] in x's dtype, accumulated in float32.
    Raises: LoweringError naming the argument for shapes, dtypes and formats that it does not take.
    """

    def refuse(argument, got, allowed):
        raise LoweringError(f"grouped_matmul (mosaic_tpu): {argument} is {got}; allowed: {allowed}")

    packed = isinstance(w, QTensor)
    if reason := _reason(w):
        refuse("w", f"{w.format if packed else w.dtype}{list(w.shape)}", reason)
    experts, d, outputs = w.shape
    if x.dtype not in DTYPES:
        refuse("x's dtype", x.dtype, "float32, bfloat16")
    if x.ndim != 2 or x.shape[1] != d or d * x.dtype.itemsize > LONGEST:
        refuse("x", list(x.shape), f"[T, {d}], of at most {LONGEST} bytes a row")
    if group_sizes.shape != (experts,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        refuse("group_sizes", f"{group_sizes.dtype}{list(group_sizes.shape)}", f"integers [{experts}]")
    tokens = x.shape[0]
    if not tokens or not experts:
        return jnp.zeros((tokens, outputs), x.dtype)
    cut = tiles or tiles_for(
        tokens=min(2 * tokens // experts + 1, tokens),
        length=d,
        outputs=outputs,
        itemsize=x.dtype.itemsize,
        format_=w.format if packed else None,
    )
    plan = Plan(format=w.format if packed else None, length=d, tiles=cut, ragged=True, interpret=interpret)
    return _call(x, w, group_sizes, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def _call(x, w, group_sizes, *, plan: Plan):
    return product(x, w, schedule(group_sizes, x.shape[0], plan.tiles.tokens), plan)


def schedule(group_sizes: jax.Array, tokens: int, size: int) -> jax.Array:
    """int32[6, tiles + E] visits of `tpu_matmul.product`: experts in order, tiles in order, every tile at least once."""
    experts, tiles = group_sizes.shape[0], -(-tokens // size)
    count = tiles + experts
    # What follows the last expert's rows is a group of its own without rows to fill: its tiles are written as 0.
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), tokens)
    ends = jnp.append(ends, tiles * size)
    starts = jnp.append(0, ends[:-1])
    first_tile = starts // size
    first_tile = first_tile.at[experts].set(-(-starts[experts] // size))  # tiles that an expert has begun are its own
    visits = jnp.where(ends > starts, -(-ends // size) - first_tile, 0)
    upto = jnp.cumsum(visits)
    visit = jnp.arange(count, dtype=jnp.int32)
    group = jnp.sum(visit[:, None] >= upto, axis=1, dtype=jnp.int32)
    idle = group > experts
    group = jnp.minimum(group, experts)
    tile = first_tile[group] + visit - (upto - visits)[group]
    tile = jnp.where(idle, tiles - 1, tile)
    last = jnp.max(jnp.where(group_sizes > 0, jnp.arange(experts), 0))  # whose weights are there already
    matrix = jnp.where(group < experts, group, last)
    start = jnp.clip(starts[group] - tile * size, 0, size)
    stop = jnp.where((group < experts) & ~idle, jnp.clip(ends[group] - tile * size, 0, size), start)
    changed = lambda x: jnp.append(True, x[1:] != x[:-1])  # noqa: E731
    return jnp.stack([tile, matrix, start, stop, changed(tile), changed(matrix)]).astype(jnp.int32)
