"""matmul on GPUs through XLA.

Of one row XLA makes a multiplication and a sum that miss the copy engine's speed by up to four times; of eight rows a product
for the matrix units, whose time is that of reading the weight. Sums are float32 in the product whatever it returns; asked for
a float32 result that is rounded after, cuBLAS writes it out in full and a second kernel rounds it.
"""

import math

import jax
import jax.numpy as jnp

ROWS = 8  # of the smallest product for the matrix units


def supports(args, target) -> str | None:
    return None if target.platform == "gpu" else f"is for gpu, not {target.platform}"


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D], w [D, F] -> [..., F] in x's dtype."""
    rows = math.prod(x.shape[:-1])
    if not 0 < rows < ROWS:
        return jnp.matmul(x, w, preferred_element_type=x.dtype)
    wide = jnp.pad(x.reshape(rows, -1), ((0, ROWS - rows), (0, 0)))
    wide = jax.lax.optimization_barrier(wide)  # or XLA multiplies the rows that are kept alone
    return jnp.matmul(wide, w, preferred_element_type=x.dtype)[:rows].reshape(*x.shape[:-1], -1)
