"""matmul on Hopper for the few rows of a decode step: the ring and the matrix units of `quant_matmul`, without the widening.

Past 64 rows the time is that of the products, which are left to XLA. From 9 to 64 XLA loses 4 to 9 percent of the read
bandwidth (measured on an H100; 4096 x 24576, 4096 x 6144, 4096 x 4096, 12288 x 4096). Up to 8 it reads as fast, but wants the
rows padded to 8: one kernel more a product (a step of Qwen3-8B at batch 1: 6.10 ms by XLA, 5.90 here).
"""

import math

import jax
import jax.numpy as jnp

from optx.pallas.matmul import xla_gpu
from optx.pallas.quant_matmul.mosaic_gpu_sm90 import BLOCK, dense_matmul

ROWS = range(1, 65)
BYTES, OUTPUTS = 16 << 20, 4096  # of the smallest weight: smaller ones do not fill the chip


def supports(args, target) -> str | None:
    """args: weight (dense, abstract will do), dtype of x if it is known."""
    w, dtype = args["weight"], args.get("dtype") or args["weight"].dtype
    if jnp.dtype(w.dtype) != jnp.bfloat16 or jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype)} and w {jnp.dtype(w.dtype)}; allowed: bfloat16"
    if len(w.shape) != 2 or w.shape[0] % BLOCK or w.shape[1] % BLOCK:
        return f"w {list(w.shape)}; allowed: D and F in multiples of {BLOCK}"
    size = 2 * math.prod(w.shape)
    if size < BYTES or w.shape[1] < OUTPUTS:
        return f"w {list(w.shape)} is {size:,} bytes; XLA is as fast below {BYTES:,} bytes or {OUTPUTS:,} outputs"
    return None


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """bfloat16 x [..., D] @ w [D, F] -> [..., F]; 1 to 64 rows here, others by XLA."""
    rows = math.prod(x.shape[:-1])
    return dense_matmul(x, w) if rows in ROWS else xla_gpu.matmul(x, w)
