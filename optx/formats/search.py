"""Scales chosen by the error that they make."""

import functools

import jax
import jax.numpy as jnp

from optx.formats.base import Format

SHRINK = 0.5  # least share of a group's range that is tried
STEPS = 51


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("exponent",))
def best_grid(format: Format, x: jax.Array, weight: jax.Array | None = None, *, exponent: float = 2.0):
    """float[..., D] -> (scale, zero) of each group with the least sum of weight |x - value|^exponent.

    weight: float[D] or None for ones, what an error at each input channel costs (mean x^2 of the activations: "imatrix" of
    llama.cpp, PR #4861). The range of every group is shrunk by 51 factors from 1 to 0.5.
    """
    x = x.astype(jnp.float32)
    length = x.shape[-1]
    groups = length // (format.group or length)

    def error(scale, zero):
        step, offset = format.steps(scale, zero, length)
        off = jnp.abs(x - format.value(format.code(x, step, offset), step, offset)) ** exponent
        off = off if weight is None else off * weight
        return jnp.sum(off.reshape(*off.shape[:-1], groups, -1), axis=-1)

    def attempt(i, best):
        grid = format.grid(x, 1 - (1 - SHRINK) * i / (STEPS - 1))
        cost = error(*grid)
        better = cost < best[0]
        return jnp.where(better, cost, best[0]), jax.tree.map(lambda new, old: _take(better, new, old), grid, best[1])

    first = format.grid(x)
    return jax.lax.fori_loop(1, STEPS, attempt, (error(*first), first))[1]


def _take(better, new, old):
    """By group; what lies behind the groups' scales (a row's own) is the same in both."""
    more = old.shape[-1] - better.shape[-1]
    return jnp.where(jnp.pad(better, [(0, 0)] * (better.ndim - 1) + [(0, more)]), new, old)
