"""Scales chosen by the error that they make."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optx.formats.base import Format

SHRINK = 0.5  # least share of a group's range that is tried
STEPS = 51
CLIPS = 11  # tried by `clipped_grid`


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("exponent",))
def best_grid(format: Format, x: jax.Array, weight: jax.Array | None = None, *, exponent: float = 2.0):
    """float[..., D] -> (scale, zero) of each group with the least sum of weight |x - value|^exponent.

    weight: float[D] or None for ones, what an error at each input channel costs (mean x^2 of the activations: "imatrix" of
    llama.cpp, PR #4861). The range of every group is shrunk by 51 factors from 1 to 0.5.
    """

    def cost(off):
        off = jnp.abs(off) ** exponent
        return jnp.sum(off if weight is None else off * _grouped(weight, off.shape[-1]), axis=-1)

    return least(format, x, cost)


@functools.partial(jax.jit, static_argnums=(0,))
def clipped_grid(format: Format, x: jax.Array, gram: jax.Array):
    """float[F, D] -> (scale, zero) of each group g with the least e_g^T gram_gg e_g, e being its error.

    gram: float32[D, D], mean of the inputs' outer products: the error of what the group adds to the output. The rule of AWQ's
    clip search (Lin et al. 2023, arXiv:2306.00978), which sums over sampled tokens.
    """
    width = format.group or x.shape[-1]
    blocks = jnp.stack([gram[i : i + width, i : i + width] for i in range(0, x.shape[-1], width)])
    return least(format, x, lambda off: jnp.einsum("fgi,gij,fgj->fg", off, blocks, off), CLIPS)


def least(format: Format, x: jax.Array, cost: Callable, steps: int = STEPS):
    """(scale, zero) of each group with the least cost(x - value): float32[..., groups, group] -> [..., groups]."""
    x = x.astype(jnp.float32)
    length = x.shape[-1]

    def error(scale, zero):
        step, offset = format.steps(scale, zero, length)
        return cost(_grouped(x - format.value(format.code(x, step, offset), step, offset), format.group or length))

    def attempt(i, best):
        grid = format.grid(x, 1 - (1 - SHRINK) * i / (steps - 1))
        found = error(*grid)
        better = found < best[0]
        return jnp.where(better, found, best[0]), jax.tree.map(lambda new, old: _take(better, new, old), grid, best[1])

    first = format.grid(x)
    return jax.lax.fori_loop(1, steps, attempt, (error(*first), first))[1]


def _grouped(x: jax.Array, width: int) -> jax.Array:
    """[..., D] -> [..., groups, width]."""
    return x.reshape(*x.shape[:-1], -1, width)


def _take(better, new, old):
    """By group; what lies behind the groups' scales (a row's own) is the same in both."""
    more = old.shape[-1] - better.shape[-1]
    return jnp.where(jnp.pad(better, [(0, 0)] * (better.ndim - 1) + [(0, more)]), new, old)
