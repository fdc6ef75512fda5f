"""Cases and benchmark shapes of `gated_matmul`: one token, and more, where it is two kernels."""

import functools

from optx.bench.cases import Case, Shape, gated_act
from optx.bench.cases.norm_matmul import site as product_site
from optx.bench.cases.norm_matmul import weight_of

OP = "gated_matmul"


def call(rng, d, f, *, stored, tokens=1, activation="silu"):
    (both, _), kwargs = gated_act.call(rng, tokens, d, joined=True, activation=activation)
    return (both, weight_of(rng, d, f, stored)), kwargs


def site(d: int, f: int, stored: str | None, activation: str = "silu") -> dict:
    return product_site(d, f, stored) | gated_act.site(d, activation=activation)


def case(d, f, stored, *, tokens=1, activation="silu", small=False) -> Case:
    return Case(
        op=OP,
        name="_".join((stored or "bf16", f"{tokens}x{d}x{f}", activation)),
        make=functools.partial(call, d=d, f=f, stored=stored, tokens=tokens, activation=activation),
        site=site(d, f, stored, activation),
        tolerance=gated_act.TOLERANCE + 5e-3,
        small=small,
    )


CASES = (
    case(512, 320, "int4_g128", small=True),
    case(192, 128, "fp8_e4m3", small=True),
    *(case(12288, 4096, stored) for stored in (None, "int4_g128", "int4", "int8", "fp8_e4m3", "mxfp4", "nvfp4")),
    *(case(14336, 4096, stored, activation="gelu_tanh") for stored in (None, "int4_g128")),
    case(1088, 1152, "int4_g64"),
    case(3072, 24576, None),
    case(512, 51200, "int4_g128"),
    *(case(12288, 4096, stored, tokens=3) for stored in (None, "int4_g128")),
)


def shape(d: int, f: int, stored: str | None) -> Shape:
    weight = 2 * d * f if stored is None else site(d, f, stored)["weight"].nbytes
    return Shape(
        op=OP,
        name=f"{stored or 'bf16'}_{d}x{f}",
        make=functools.partial(call, d=d, f=f, stored=stored),
        site=site(d, f, stored),
        bytes=weight + 4 * d + 2 * f,
        flops=2 * d * f,
        copies=4,
    )


SHAPES = tuple(shape(12288, 4096, stored) for stored in (None, "fp8_e4m3", "int4_g128"))
