"""Cases and benchmark shapes of `top_blocks`: rows of scores, with ties, blocks that are always chosen, and few that can be."""

import functools

import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape

OP = "top_blocks"


def batch(rng, rows, blocks, count, *, levels=None):
    """levels: so many different scores; None: as many as there are blocks. The first two blocks are always chosen, those from a
    place of the row on never."""
    scores = rng.standard_normal((rows, blocks)) if levels is None else rng.integers(0, levels, (rows, blocks)) / levels
    at, seen = np.arange(blocks), rng.integers(1, blocks + 1, (rows, 1))
    seen[0], seen[-1] = blocks, 1
    scores = np.where(at < seen, np.where(at < 2, np.inf, scores), -np.inf)
    return (jnp.asarray(scores, jnp.float32),), {"count": count}


def case(name, *sizes, small=True, **more):
    return Case(op=OP, name=name, make=functools.partial(_made, sizes, more), site={}, small=small, tolerance=0)


def _made(sizes, more, rng):
    return batch(rng, *sizes, **more)


CASES = (
    case("nsa", 16, 1024, 16),
    case("odd", 5, 133, 7),
    case("few", 3, 5, 4),
    case("all", 4, 64, 64),
    case("ties", 9, 700, 33, levels=3),
    case("zeros", 3, 300, 20, levels=1),
    case("million", 1, 16384, 128),
    case("wide", 3, 9000, 1000, levels=40),
    case("many_rows", 5000, 512, 16, small=False),
)
SHAPES = tuple(
    Shape(
        op=OP,
        name=name,
        make=functools.partial(_made, sizes, {}),
        site={},
        bytes=4 * sizes[0] * (sizes[1] + sizes[2]),
        flops=0,
    )
    for name, sizes in (("16x1024", (16, 1024, 16)), ("256x1024", (256, 1024, 16)), ("1x16384", (1, 16384, 128)))
)
