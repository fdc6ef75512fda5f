"""matmul on Hopper for the few rows of a decode step: the ring and the matrix units of `quant_matmul`, without the widening.

XLA reads less than the memory gives up to 16 rows, and up to 32 where there are more numbers to contract than outputs: it cuts
those in parts and adds them up in a kernel of their own. From there on it is as fast or faster, with many outputs at 16 rows
already; rows between 8, 16, 32 and 64 were not timed (one H100, us, here and by XLA: 16 rows by 4096 x 6144 19.4 and 20.2, by
4096 x 24576 68.4 and 67.2, by 4096 x 151936 421 and 404; 32 rows by 4096 x 6144 21.1 and 19.7, by 12288 x 4096 36.3 and 38.5; 64
rows by 12288 x 4096 37.3 and 36.4). Up to 8 rows it wants them padded to 8: one kernel more a product (a step of Qwen3-8B at
batch 1: 6.10 ms by XLA, 5.90 here). Where kernels come up while those before them end, weights are asked for before that here,
up to 64 rows.
"""

import math

import jax
import jax.numpy as jnp

from optx.pallas.late import overlapping
from optx.pallas.matmul import xla_gpu
from optx.pallas.quant_matmul.mosaic_gpu_sm90 import BLOCK, dense_matmul

# Most rows that are multiplied here, the others by XLA.
MOST = 16
DEEP = 32  # where there are more numbers to contract than outputs
WIDE, MANY = 8, 4  # where there are `MANY` times as many outputs as numbers to contract
OVERLAPPED = 64  # where kernels come up while those before them end
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
    """bfloat16 x [..., D] @ w [D, F] -> [..., F]; few rows here, others by XLA."""
    d, f = w.shape
    rows = math.prod(x.shape[:-1])
    most = DEEP if d > f else WIDE if f >= MANY * d else MOST
    most = OVERLAPPED if overlapping() else most
    return dense_matmul(x, w) if 0 < rows <= most else xla_gpu.matmul(x, w)
