"""Cases and benchmark shapes of `add_norm`: a residual stream of very different lengths, one token of it zeros."""

import functools

import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape

OP = "add_norm"


def call(rng, tokens, d, *, added=True, dtype="bfloat16", weight="bfloat16", offset=0.0, eps=1e-6):
    x, y = (rng.standard_normal((tokens, d), np.float32) for _ in range(2))
    x *= np.exp(rng.standard_normal((tokens, 1), np.float32))
    x[-1], y[-1] = (0, 0) if tokens > 1 else (x[-1], y[-1])
    scale = rng.standard_normal(d, np.float32) * 0.1 + (1 - offset)
    y = jnp.asarray(y, dtype) if added else None
    return (jnp.asarray(x, dtype), y, jnp.asarray(scale, weight)), {"eps": eps, "offset": offset}


def site(d: int, *, dtype="bfloat16", weight="bfloat16", **_) -> dict:
    return {"d": d, "dtype": dtype, "weights": (weight,)}


def case(tokens, d, *, name="", small=True, **kwargs) -> Case:
    return Case(
        op=OP,
        name="_".join([f"{tokens}x{d}", *([name] if name else [])]),
        make=functools.partial(call, tokens=tokens, d=d, **kwargs),
        site=site(d, **kwargs),
        small=small,
    )


CASES = (
    case(1, 4096),
    case(3, 4096, added=False, name="alone"),
    case(2, 64),
    case(3, 1152, offset=1.0, name="offset"),
    case(2, 1024, weight="float32", name="wide_weight"),
    case(2, 2560, dtype="float16", weight="float16", name="float16"),
    case(2, 8200, weight="float32", offset=1.0, name="part_of_a_chunk"),
    case(2, 16384, eps=1e-5),
    case(2, 14336, added=False, name="alone"),
    *(case(t, 4096, small=False) for t in (32, 67, 2048)),
    *(case(t, 8192, small=False) for t in (1, 32, 67, 2048)),
    case(256, 4096, added=False, small=False, name="alone"),
)


def shape(tokens: int, d: int) -> Shape:
    return Shape(
        op=OP,
        name=f"{tokens}x{d}",
        make=functools.partial(call, tokens=tokens, d=d),
        site=site(d),
        bytes=2 * d * (4 * tokens + 1),
        flops=6 * tokens * d,
    )


SHAPES = tuple(shape(tokens, d) for d in (4096, 8192) for tokens in (1, 32, 256))
