"""Which blocks have the highest scores, in plain JAX: this file defines the op, kernels must match it to the last index."""

import jax
import jax.numpy as jnp


def top_blocks(scores: jax.Array, *, count: int) -> jax.Array:
    """scores float32[M, blocks], -inf where a block cannot be chosen -> int32[M, count]: the blocks of the `count` highest ones,
    of equal ones the first, ascending; `blocks` where there are fewer. count: at most blocks."""
    at = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    # Of the thousands of blocks that there are a sort is faster on GPUs than `top_k`, which takes 65 us for 1,024.
    found, picked = (x[..., :count] for x in jax.lax.sort((-scores, at), dimension=-1, num_keys=1, is_stable=True))
    return jnp.sort(jnp.where(found < jnp.inf, picked, scores.shape[-1]), axis=-1)
