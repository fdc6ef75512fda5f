"""matmul on Blackwell for the few rows of a decode step and the many of a prompt: `optx.pallas.matmul.gemm_sm100`.

Rows in between are left to XLA's library. Never run on hardware so far: the bounds of ROWS, BYTES and OUTPUTS are those measured
on Hopper, PROMPT is where pairs of thread blocks fill the chip with outputs of 4,096.
"""

import math

import jax
import jax.numpy as jnp

from optx.pallas.matmul import gemm_sm100 as gemm
from optx.pallas.matmul import xla_gpu

ROWS, PROMPT = range(1, 65), 1024
BYTES, OUTPUTS = 16 << 20, 4096  # of the smallest weight: smaller ones do not fill the chip
DEPTH = 64


def supports(args, target) -> str | None:
    """args: weight (dense, abstract will do), dtype of x if it is known."""
    w, dtype = args["weight"], args.get("dtype") or args["weight"].dtype
    if jnp.dtype(w.dtype) != jnp.bfloat16 or jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype)} and w {jnp.dtype(w.dtype)}; allowed: bfloat16"
    if len(w.shape) != 2 or w.shape[0] % DEPTH or w.shape[1] % gemm.OUTPUTS:
        return f"w {list(w.shape)}; allowed: D in multiples of {DEPTH}, F of {gemm.OUTPUTS}"
    size = 2 * math.prod(w.shape)
    if size < BYTES or w.shape[1] < OUTPUTS:
        return f"w {list(w.shape)} is {size:,} bytes; XLA is left those below {BYTES:,} bytes or {OUTPUTS:,} outputs"
    return None


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """bfloat16 x [..., D] @ w [D, F] -> [..., F]; 1 to 64 rows and 1,024 or more here, others by XLA."""
    rows = math.prod(x.shape[:-1])
    if rows not in ROWS and rows < PROMPT:
        return xla_gpu.matmul(x, w)
    return gemm.dense(x.reshape(rows, -1), w).reshape(*x.shape[:-1], -1)
