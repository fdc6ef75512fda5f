"""Cases and benchmark shapes of `norm_matmul`: one token, and more, where it is two kernels."""

import functools

from optx.bench.cases import Case, Shape, add_norm, matmul, quant_matmul
from optx.formats import parse

OP = "norm_matmul"


def weight_of(rng, d: int, f: int, stored: str | None):
    """w [d, f], packed as `stored` or dense."""
    (_, w), _ = matmul.call(rng, 1, d, f) if stored is None else quant_matmul.call(rng, 1, d, f, parse(stored))
    return w


def site(d: int, f: int, stored: str | None) -> dict:
    return matmul.site(d, f) if stored is None else quant_matmul.site(d, f, parse(stored))


def call(rng, d, f, *, stored, tokens=1, **kwargs):
    (x, y, weight), kwargs = add_norm.call(rng, tokens, d, **kwargs)
    return (x, y, weight, weight_of(rng, d, f, stored)), kwargs


def case(d, f, stored, *, name="", small=False, **kwargs) -> Case:
    return Case(
        op=OP,
        name="_".join(part for part in (stored or "bf16", f"{kwargs.get('tokens', 1)}x{d}x{f}", name) if part),
        make=functools.partial(call, d=d, f=f, stored=stored, **kwargs),
        site=site(d, f, stored),
        tolerance=1e-2,  # its norm and its product are rounded to 16 bits one after the other
        small=small,
    )


QWEN = ((4096, 6144), (4096, 24576))  # qkv, gate and up
CASES = (
    case(512, 320, "int4_g128", small=True),
    case(256, 192, "fp8_e4m3", small=True, added=False, name="alone"),
    case(512, 128, "int8_g64_asym", small=True, offset=1.0, weight="float32", name="offset"),
    *(case(*sizes, stored) for sizes in QWEN for stored in (None, "int4_g128", "int4", "int8", "fp8_e4m3", "mxfp4", "nvfp4")),
    *(case(4096, 6144, stored, added=False, name="alone") for stored in (None, "int4_g128")),
    *(case(4096, 4096, stored) for stored in (None, "int4_g128", "fp8_e4m3")),  # a sum over two thread blocks
    *(case(5120, 17408, stored, weight="float32", name="wide_weight") for stored in (None, "int4_g128_asym")),
    case(1152, 1088, "int4_g64", offset=1.0, name="offset"),
    case(16384, 4096, "int4_g128"),
    case(8192, 57344, None),
    case(512, 51200, "int4_g128"),  # several items a block
    *(case(4096, 6144, stored, tokens=3) for stored in (None, "int4_g128")),
)  # fmt: skip


def shape(d: int, f: int, stored: str | None) -> Shape:
    weight = 2 * d * f if stored is None else site(d, f, stored)["weight"].nbytes
    return Shape(
        op=OP,
        name=f"{stored or 'bf16'}_{d}x{f}",
        make=functools.partial(call, d=d, f=f, stored=stored),
        site=site(d, f, stored),
        bytes=weight + 8 * d + 2 * f,
        flops=2 * d * f,
        copies=4,
    )


SHAPES = tuple(shape(*sizes, stored) for sizes in QWEN for stored in (None, "fp8_e4m3", "int4_g128"))
