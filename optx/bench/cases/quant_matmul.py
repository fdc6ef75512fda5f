"""Cases and benchmark shapes of `quant_matmul` with 16-bit activations: every packed format, one row to a prefill."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from optx import formats, tensor
from optx.bench.cases import Case, Shape
from optx.tensor import QTensor

OP = "quant_matmul"


def call(rng, m, d, f, stored, *, lead=()):
    """x [*lead, m, d] with a row of zeros, w [d, f] whose outputs differ in size (some alike but for it: to save time)."""
    x = rng.standard_normal((*lead, m, d), np.float32) * np.exp(rng.standard_normal((*lead, m, 1), np.float32))
    x[..., -1, :] = 0 if m > 1 else x[..., -1, :]
    w = np.resize(rng.standard_normal((min(f, 1000), d), np.float32), (f, d)).T
    w = w * (np.exp(rng.standard_normal(f, np.float32)) / d**0.5)
    return (jnp.asarray(x, jnp.bfloat16), tensor.quantize(jnp.asarray(w, jnp.bfloat16), stored)), {}


def site(d: int, f: int, stored) -> dict:
    return {"weight": tensor.quantize(jax.ShapeDtypeStruct((d, f), jnp.bfloat16), stored), "dtype": jnp.bfloat16}


def case(stored: str, m, d, f, *, small=False, **kwargs) -> Case:
    format_ = formats.parse(stored)
    make = functools.partial(call, m=m, d=d, f=f, stored=format_, **kwargs)
    return Case(op=OP, name=f"{stored}_{m}x{d}x{f}", make=make, site=site(d, f, format_), small=small)


def rounded(stored: str, m, d, f) -> Case:
    """Activations in the weight's format, blocks of 4-bit floats both."""
    format_ = formats.parse(stored)

    def make(rng):
        args, _ = call(rng, m, d, f, format_)
        return args, {"activations": format_}

    about = site(d, f, format_) | {"activations": format_}
    return Case(op=OP, name=f"{stored}_both_{m}x{d}x{f}", make=make, site=about, small=False)


GROUPED = [f"int{width}_g{group}{zero}" for width in (4, 8) for group in (32, 64, 128) for zero in ("", "_asym")]
CHANNEL = ["int4", "int4_asym", "int8", "int8_asym", "fp8_e4m3"]

CASES = (
    case("int4_g128", 5, 256, 128, small=True),
    case("int4_g32_asym", 9, 128, 192, small=True),
    case("int8", 16, 128, 128, small=True),
    case("int8_g64_asym", 3, 128, 64, small=True),
    case("fp8_e4m3", 2, 128, 64, small=True),
    case("mxfp4", 8, 128, 64, small=True),
    case("nvfp4", 8, 128, 64, small=True),
    *(case(stored, 16, 1024, 448) for stored in (*GROUPED, *CHANNEL, "fp8_e4m3_g128", "mxfp4", "nvfp4")),
    *(case("int4_g128", m, 512, 1088) for m in (1, 7, 13, 33, 65, 200, 1001)),
    *(
        case(stored, m, 320, 320)
        for m, stored in ((1, "int4_g64_asym"), (70, "int8"), (300, "fp8_e4m3"), (300, "nvfp4"))
    ),
    *(case("int4_g128", m, 4096, f) for m in (1, 16, 64, 128) for f in (4096, 6144)),
    case("int8", 16, 4096, 4096),
    case("int4_g128_asym", 3, 12288, 4096),
    case("int4_g128", 4, 512, 51200),
    case("int8", 16, 512, 51200),
    case("int4_g128", 6, 512, 448, lead=(2, 3)),
    case("int4_g128", 16, 4096, 24576),
    case("int8_g32_asym", 700, 1024, 12352),
    case("fp8_e4m3_g128", 700, 1024, 12352),
    case("mxfp4", 700, 1024, 12352),
    *(case(stored, 40, 1024, 1024) for stored in (*GROUPED, *CHANNEL, "fp8_e4m3_g128", "mxfp4", "nvfp4")),
    *(rounded(stored, m, 4096, f) for stored in ("mxfp4", "nvfp4") for m, f in ((3, 4096), (64, 6144), (1001, 1024))),
)


def xla(x, w: QTensor):
    """The reference left to XLA: dequantized and multiplied."""
    return tensor.matmul(x, w)


def shape(stored: str, m, d=4096, f=24576) -> Shape:
    format_ = formats.parse(stored)
    packed = site(d, f, format_)["weight"].nbytes
    return Shape(
        op=OP,
        name=f"{stored}_{m}x{d}x{f}",
        make=functools.partial(call, m=m, d=d, f=f, stored=format_),
        site=site(d, f, format_),
        bytes=packed + 2 * m * (d + f),
        flops=2 * m * d * f,
        copies=4,
        peers={"xla": xla},
    )


def both(stored: str, m, d=4096, f=24576) -> Shape:
    """`shape` with activations in the weight's format."""
    base, format_ = shape(stored, m, d, f), formats.parse(stored)

    def make(rng):
        return base.make(rng)[0], {"activations": format_}

    about = dict(base.site) | {"activations": format_}
    return dataclasses.replace(base, name=f"{stored}_both_{m}x{d}x{f}", make=make, site=about, unit="fp8", peers={})


SHAPES = (
    *(both(stored, m) for stored in ("mxfp4", "nvfp4") for m in (16, 4096)),
    *(shape("int4_g128", m) for m in (1, 16, 64, 256, 4096)),
    *(shape(stored, 16) for stored in ("int8", "fp8_e4m3", "mxfp4", "nvfp4")),
    shape("int4_g128", 16, f=4096),
    shape("int4_g128", 16, d=12288, f=4096),
)
