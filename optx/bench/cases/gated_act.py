"""Cases and benchmark shapes of `gated_act`."""

import functools

import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape

OP = "gated_act"
# Three roundings to 16 bits follow each other, which the reference in float32 does not make.
TOLERANCE = 1e-2


def call(rng, tokens, f, *, joined=False, activation="silu", dtype="bfloat16"):
    """Gates from -40 to 40, and each beside a number of ordinary size."""
    gate = rng.standard_normal((tokens, f), np.float32) * np.exp(rng.standard_normal((tokens, 1), np.float32))
    gate[:, :4] = (0, -0.0, 40, -40)
    up = rng.standard_normal((tokens, f), np.float32)
    if joined:
        return (jnp.asarray(np.concatenate([gate, up], axis=-1), dtype), None), {"activation": activation}
    return (jnp.asarray(gate, dtype), jnp.asarray(up, dtype)), {"activation": activation}


def site(f: int, *, activation="silu", dtype="bfloat16", **_) -> dict:
    return {"f": f, "dtype": dtype, "activation": activation}


def case(tokens, f, *, small=True, **kwargs) -> Case:
    joined, activation, dtype = (kwargs.get(key) for key in ("joined", "activation", "dtype"))
    words = [f"{tokens}x{f}", activation, dtype, "joined" if joined else None]
    return Case(
        op=OP,
        name="_".join(word for word in words if word),
        make=functools.partial(call, tokens=tokens, f=f, **kwargs),
        site=site(f, **kwargs),
        tolerance=TOLERANCE,
        small=small,
    )


CASES = (
    case(1, 12288, joined=True),
    case(3, 1032, joined=True),
    case(2, 1024),
    case(5, 24),
    case(3, 1024, dtype="float16"),
    case(3, 1024, dtype="float16", joined=True, activation="gelu_tanh"),
    case(2, 6144, activation="gelu_tanh"),
    *(case(t, 12288, joined=True, small=False) for t in (32, 67, 2048)),
    case(256, 14336, activation="gelu_tanh", small=False),
)


def shape(tokens: int, f: int = 12288) -> Shape:
    return Shape(
        op=OP,
        name=f"{tokens}x{f}",
        make=functools.partial(call, tokens=tokens, f=f, joined=True),
        site=site(f),
        bytes=6 * tokens * f,
        flops=6 * tokens * f,
    )


SHAPES = tuple(shape(tokens) for tokens in (1, 32, 256))
