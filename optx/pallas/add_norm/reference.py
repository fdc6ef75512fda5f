"""add_norm in plain JAX."""

import jax
import jax.numpy as jnp


def add_norm(x, y, weight, *, eps: float, offset: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """s = x + y and s / sqrt(mean(s^2) + eps) * (offset + weight) (arXiv:1910.07467).

    x [T, D]; y [T, D], or None: s = x; weight [D]. -> (s [T, D], its norm [T, D]), both in the dtype of s. The norm is
    float32 until its result is rounded.
    """
    s = x if y is None else x + y
    return s, rms_norm(s, weight, eps=eps, offset=offset)


def rms_norm(x, weight, *, eps: float, offset: float = 0.0, out=None) -> jax.Array:
    """x [..., D] over its last axis, weight [D] -> [..., D] in the dtype `out`, or that of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (offset + weight.astype(jnp.float32))).astype(out or x.dtype)
