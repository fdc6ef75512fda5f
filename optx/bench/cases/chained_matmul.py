"""Cases and benchmark shapes of `chained_matmul`: all products of one token between two attentions, and of more."""

import functools

import jax.numpy as jnp

from optx import tensor
from optx.bench.cases import Case, Shape, add_norm
from optx.bench.cases.norm_matmul import site as product_site
from optx.bench.cases.norm_matmul import weight_of

OP = "chained_matmul"


def _sizes(heads: int, d: int, f: int, following: int | None) -> list[tuple[int, int]]:
    """[D, F] of o, gate and up, down and the product that follows, if one does."""
    return [(heads, d), (d, 2 * f), (f, d), *([] if following is None else [(d, following)])]


def call(rng, heads, d, f, *, stored, following=None, tokens=1, activation="silu", **kwargs):
    (x, _, weight), kwargs = add_norm.call(rng, tokens, d, added=False, **kwargs)
    row = jnp.asarray(rng.standard_normal((tokens, heads)), x.dtype)
    *ws, last = (weight_of(rng, *size, stored) for size in _sizes(heads, d, f, following))
    args = (row, x, weight, *ws, last) if following is None else (row, x, weight, *ws, (weight[::-1], last))
    return args, kwargs | {"activation": activation}


def site(heads, d, f, *, stored, following=None, activation="silu", weight="bfloat16", eps=1e-6, offset=0.0) -> dict:
    weights = tuple(product_site(*size, stored)["weight"] for size in _sizes(heads, d, f, following))
    norm = {"norm": weight, "eps": eps, "offset": offset}
    return norm | {"weights": weights, "activation": activation, "dtype": "bfloat16"}


def case(heads, d, f, stored, *, following=None, name="", small=False, tokens=1, **kwargs) -> Case:
    last = [] if following is None else [str(following)]
    return Case(
        op=OP,
        name="_".join([stored or "bf16", f"{tokens}x{heads}x{d}x{f}", *last, *([name] if name else [])]),
        make=functools.partial(
            call, heads=heads, d=d, f=f, stored=stored, following=following, tokens=tokens, **kwargs
        ),
        site=site(heads, d, f, stored=stored, following=following, **kwargs),
        tolerance=2e-2,  # seven roundings to 16 bits one after the other
        small=small,
        pick=lambda output, kwargs: output[:2],
    )


QWEN = (4096, 4096, 12288)  # heads, stream, gates of Qwen3-8B; its qkv has 6144 outputs
FORMATS = (None, "int4_g128", "int4", "int8", "fp8_e4m3")
CASES = (
    case(512, 256, 512, "int4_g128", small=True),
    case(256, 512, 256, "fp8_e4m3", following=320, small=True),
    case(128, 256, 384, None, following=192, small=True, offset=1.0, activation="gelu_tanh"),
    *(case(*QWEN, stored, following=following) for stored in FORMATS for following in (None, 6144)),
    *(case(2048, 1024, 3072, stored, following=4096, name="0.6b") for stored in (None, "int4_g128", "fp8_e4m3")),
    *(case(4096, 2560, 9728, stored, following=6144, name="4b") for stored in (None, "int4_g128", "fp8_e4m3")),
    *(case(5120, 5120, 17408, stored, following=7168, name="14b") for stored in (None, "int4_g128")),
    case(4096, 4096, 14336, "int8_g128", following=6144, weight="float32"),
    case(1024, 640, 2048, None, following=1536, offset=1.0, activation="gelu_tanh", name="offset"),
    *(case(*QWEN, stored, following=6144, tokens=3) for stored in (None, "int4_g128")),
)  # fmt: skip


def shape(stored: str | None) -> Shape:
    facts = site(*QWEN, stored=stored, following=6144)
    return Shape(
        op=OP,
        name=f"{stored or 'bf16'}_qwen3_8b",
        make=functools.partial(call, heads=4096, d=4096, f=12288, stored=stored, following=6144),
        site=facts,
        bytes=sum(tensor.nbytes(w) for w in facts["weights"]) + 30 * 4096,
        flops=2 * sum(d * f for d, f in _sizes(*QWEN, 6144)),
        copies=2,
    )


SHAPES = tuple(shape(stored) for stored in (None, "fp8_e4m3", "int4_g128"))
