"""Cases and benchmark shapes of `matmul`: dense weights and the few rows of a decode step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape

OP = "matmul"


def call(rng, m, d, f):
    """x [m, d] with a row of zeros, w [d, f]."""
    x = rng.standard_normal((m, d), np.float32) * np.exp(rng.standard_normal((m, 1), np.float32))
    x[-1] = 0 if m > 1 else x[-1]
    w = np.resize(rng.standard_normal((min(f, 1000), d), np.float32), (f, d)).T / d**0.5
    return (jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)), {}


def site(d: int, f: int) -> dict:
    return {"weight": jax.ShapeDtypeStruct((d, f), jnp.bfloat16), "dtype": jnp.bfloat16}


def case(m, d, f) -> Case:
    return Case(op=OP, name=f"{m}x{d}x{f}", make=functools.partial(call, m=m, d=d, f=f), site=site(d, f))


CASES = (
    *(case(m, 4096, f) for f in (4096, 6144, 12288) for m in (1, 9, 33, 64, 65)),
    case(16, 12288, 4096),
    case(1025, 2048, 4096),
    case(40, 64 * 29, 8192),
    case(32, 4096, 24576 + 64),
)


def shape(m, d=4096, f=24576) -> Shape:
    return Shape(
        op=OP,
        name=f"{m}x{d}x{f}",
        make=functools.partial(call, m=m, d=d, f=f),
        site=site(d, f),
        bytes=2 * (d * f + m * (d + f)),
        flops=2 * m * d * f,
        copies=4,
        peers={"xla": jnp.matmul},
    )


SHAPES = (*(shape(m) for m in (1, 8, 32, 64)), shape(32, f=4096), shape(32, f=6144), shape(32, d=12288, f=4096))
