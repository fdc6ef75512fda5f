"""Cases and benchmark shapes of `quant_matmul` with 8-bit activations: int8 and fp8, a scale a channel or per 128."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optx import tensor
from optx.bench.cases import Case, Shape
from optx.formats import Float8, Format, Int
from optx.tensor import QTensor

OP = "quant_matmul"
INT8, INT8_BLOCKS = Int(width=8), Int(width=8, group=128)
FP8, FP8_BLOCKS = Float8(kind="e4m3"), Float8(kind="e4m3", group=128)


def call(rng, m, d, f, activations, stored, *, dtype=jnp.bfloat16, lead=(), shared=1):
    """x [*lead, m, d] whose rows and columns differ in size, w [d, f]; shared: outputs that have the same scales."""
    x = rng.standard_normal((*lead, m, d), np.float32)
    x *= np.exp(rng.standard_normal((*lead, m, 1), np.float32)) * np.exp(rng.standard_normal(d, np.float32) / 2)
    x[..., -1, :] = 0 if m > 1 else x[..., -1, :]
    w = jnp.asarray(rng.standard_normal((d, f), np.float32) * np.exp(rng.standard_normal(f, np.float32)), dtype)
    w = tensor.quantize(w, stored)
    if shared > 1:
        w = QTensor(**{**vars(w), "scale": jnp.repeat(w.scale[::shared], shared, axis=0)})
    return (jnp.asarray(x, dtype), w), {"activations": activations}


def site(d: int, f: int, activations: Format, stored: Format) -> dict:
    weight = tensor.quantize(jax.ShapeDtypeStruct((d, f), jnp.bfloat16), stored)
    return {"weight": weight, "activations": activations}


def case(name, m, d, f, activations, stored, *, small=True, **kwargs) -> Case:
    make = functools.partial(call, m=m, d=d, f=f, activations=activations, stored=stored, **kwargs)
    return Case(op=OP, name=f"w8a8_{name}", make=make, site=site(d, f, activations, stored), small=small)


CASES = (
    case("fp8", 70, 256, 72, FP8, FP8),
    case("int8", 70, 256, 72, INT8, INT8),
    case("fp8_blocks", 70, 256, 72, FP8_BLOCKS, FP8_BLOCKS),
    case("int8_blocks_of_w", 5, 256, 40, INT8, INT8_BLOCKS),
    case("row", 1, 384, 100, FP8, FP8),
    case("blocks_of_x", 3, 256, 24, FP8_BLOCKS, FP8),
    case("blocks_of_w", 3, 256, 24, FP8, FP8_BLOCKS),
    case("deepseek", 130, 512, 384, FP8_BLOCKS, FP8_BLOCKS, shared=128, small=False),
    case("e5m2", 64, 512, 512, FP8, Float8(kind="e5m2"), small=False),
    case("float16", 65, 512, 264, FP8, FP8, dtype=jnp.float16, lead=(2,), small=False),
    case("int8_groups_of_x", 17, 1024, 136, INT8_BLOCKS, INT8_BLOCKS, small=False),
    case("one_output", 40, 128, 1, INT8, INT8, small=False),
    case("eight_outputs", 40, 256, 8, INT8, INT8),
    case("decode_fp8", 16, 4096, 6144, FP8, FP8, small=False),
    case("decode_int8", 64, 11008, 4096, INT8, INT8, small=False),
    case("decode_blocks", 33, 7168, 2304, FP8_BLOCKS, FP8_BLOCKS, shared=128, small=False),
    case("ragged_fp8", 1001, 2816, 5003, FP8, FP8, small=False),
    case("ragged_blocks", 1001, 2816, 5003, FP8_BLOCKS, FP8_BLOCKS, small=False),
    case("long_rows", 300, 28672, 520, INT8, INT8, small=False),
    case("many_rows_fp8", 1030, 4096, 264, FP8, FP8, small=False),
    case("many_rows_int8", 1900, 2304, 264, INT8, INT8, small=False),
    case("prompt_fp8", 1030, 1024, 768, FP8, FP8, small=False),
    case("prompt_int8", 1030, 1024, 768, INT8, INT8, small=False),
    case("many_rows_blocks", 2050, 2304, 3100, FP8_BLOCKS, FP8_BLOCKS, small=False),
)


def xla(x, w, activations):
    """The same through XLA: codes by `encode`, one product of codes, scales after it. Takes one scale a row and a channel."""
    codes = activations.encode(x)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    wide = jnp.int32 if w.data.dtype == jnp.int8 else jnp.float32
    y = jax.lax.dot_general(codes.data, w.data, contract, preferred_element_type=wide).astype(jnp.float32)
    return (y * codes.scale.astype(jnp.float32) * w.scale[:, 0].astype(jnp.float32)).astype(x.dtype)


def shape(name, m, d, f, activations, stored) -> Shape:
    scales = (m + f) * 4 * (d // 128 if activations.group or stored.group else 1)
    peers = {} if activations.group or stored.group else {"xla, 8-bit product": xla}
    return Shape(
        op=OP,
        name=f"w8a8_{name}",
        make=functools.partial(call, m=m, d=d, f=f, activations=activations, stored=stored),
        site=site(d, f, activations, stored),
        bytes=2 * m * d + f * d + scales + 2 * m * f,
        flops=2 * m * d * f,
        unit="fp8",
        peers=peers,
    )


SHAPES = (
    shape("fp8_8192x8192x8192", 8192, 8192, 8192, FP8, FP8),
    shape("int8_8192x8192x8192", 8192, 8192, 8192, INT8, INT8),
    shape("fp8_blocks_8192x8192x8192", 8192, 8192, 8192, FP8_BLOCKS, FP8_BLOCKS),
    shape("fp8_1x4096x24576", 1, 4096, 24576, FP8, FP8),
    shape("fp8_16x4096x24576", 16, 4096, 24576, FP8, FP8),
    shape("fp8_64x4096x24576", 64, 4096, 24576, FP8, FP8),
    shape("int8_64x4096x24576", 64, 4096, 24576, INT8, INT8),
    shape("fp8_blocks_16x7168x4096", 16, 7168, 4096, FP8_BLOCKS, FP8_BLOCKS),
    shape("fp8_blocks_64x4096x24576", 64, 4096, 24576, FP8_BLOCKS, FP8_BLOCKS),
)
