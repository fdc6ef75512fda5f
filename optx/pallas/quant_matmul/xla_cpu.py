"""quant_matmul on CPU through XLA: dequantize right before use, or not at all where one row meets a large table.

Left alone, XLA schedules the dequantization of every weight first (it depends on no activation) and holds the whole model
dense; a barrier ties it to x. XLA on CPU has no integer dot that is faster than a float32 one, so packed weights cost
their unpacking on top of the float32 product.
"""

import jax
import jax.numpy as jnp

from optx.formats import Format
from optx.tensor import QTensor, matmul_rows

LARGE = 1 << 23  # numbers; above, one row of x is multiplied and summed on the fly (2x faster than storing 32 MB)
LANES = 32


def supports(args, target) -> str | None:
    if target.platform != "cpu":
        return f"is for cpu, not {target.platform}"
    activations = args.get("activations")
    return None if activations is None else f"activations in {activations}; allowed: as they are"


def quant_matmul(x: jax.Array, w: QTensor, activations: Format | None = None) -> jax.Array:
    """x [..., D], w QTensor [D, F] -> [..., F] in x's dtype. activations: none here (`supports`)."""
    assert activations is None, f"xla_cpu: activations in {activations}"
    w, x = jax.lax.optimization_barrier((w, x))
    rows = w.rows()
    if x.size != w.length or w.size < LARGE or w.length % LANES:
        return matmul_rows(x, rows)
    blocks = rows.reshape(-1, w.length // LANES, LANES).astype(jnp.float32)
    y = jnp.sum(jnp.sum(blocks * x.reshape(-1, LANES), axis=1), axis=-1)
    return jax.lax.optimization_barrier(y).reshape(*x.shape[:-1], -1).astype(x.dtype)
