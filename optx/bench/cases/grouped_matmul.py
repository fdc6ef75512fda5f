"""Cases and benchmark shapes of `grouped_matmul`: rows sorted by expert, routed evenly, unevenly or to one expert."""

import jax
import jax.numpy as jnp
import numpy as np

from optx import formats, tensor
from optx.bench.cases import Case, Shape

OP = "grouped_matmul"


def even(rng, rows, experts):
    """Every row picks an expert by chance: what a trained router comes near."""
    return np.bincount(rng.integers(experts, size=rows), minlength=experts)


def zipf(rng, rows, experts):
    """The i-th most loved expert gets a share of 1 / i."""
    share = 1 / np.arange(1, experts + 1)
    return rng.permutation(rng.multinomial(rows, share / share.sum()))


def single(rng, rows, experts):
    return np.eye(experts, dtype=int)[rng.integers(experts)] * rows


def listed(*sizes):
    return lambda rng, rows, experts: np.array(sizes)


def batch(rng, tokens, experts, d, f, *, routing=even, rows=None, format=None, dtype="bfloat16"):
    """x, w, group_sizes; rows: those that belong to experts, the rest of `tokens` holds NaN."""
    rows = tokens if rows is None else rows
    sizes = routing(rng, rows, experts)
    key = jax.random.key(int(rng.integers(1 << 31)))
    x = jnp.where(jnp.arange(tokens)[:, None] < sizes.sum(), jax.random.normal(key, (tokens, d), dtype), jnp.nan)
    w = _weight(jax.random.fold_in(key, 1), (experts, d, f), dtype, format)
    return (x.astype(dtype), w, jnp.asarray(sizes, jnp.int32)), {}


def _weight(key, shape, dtype, format):
    made = lambda key, shape: (jax.random.normal(key, shape, jnp.float32) * shape[-2] ** -0.5).astype(dtype)  # noqa: E731
    if format is None:
        return jax.jit(made, static_argnums=1)(key, shape)
    one = jax.jit(lambda key: tensor.quantize(made(key, shape[1:]), formats.parse(format)))
    return jax.lax.map(one, jax.random.split(key, shape[0]))  # an expert at a time: float32 of all would not fit


def site(experts, d, f, *, format=None, dtype="bfloat16"):
    shape = (experts, d, f)
    if format is None:
        return {"weight": jax.ShapeDtypeStruct(shape, dtype), "dtype": dtype}
    weight = tensor.quantize(jax.ShapeDtypeStruct(shape, dtype), formats.parse(format))
    return {"weight": weight, "dtype": dtype}


def case(name, tokens, experts, d, f, *, small=False, tolerance=5e-3, **more):
    asked = {key: more[key] for key in ("format", "dtype") if key in more}
    return Case(
        op=OP,
        name=name,
        make=lambda rng: batch(rng, tokens, experts, d, f, **more),
        site=site(experts, d, f, **asked),
        small=small,
        tolerance=tolerance,
    )


PACKED = tuple(
    (name, 5e-3 if name.endswith("8") or name in ("fp8_e4m3", "int8_asym") else 8e-3)
    for name in (
        "int8",
        "int8_asym",
        "int8_g128",
        "int4",
        "int4_asym",
        "int4_g32",
        "int4_g64_asym",
        "int4_g128",
        "fp8_e4m3",
    )
)  # scales of a group enter weights, which are rounded to bfloat16 once more

CASES = [
    case("small", 70, 3, 128, 192, routing=listed(20, 0, 40), small=True),
    case("small_long", 150, 2, 192, 256, routing=listed(137, 9), small=True),
    case("small_int4", 40, 3, 128, 128, routing=listed(17, 0, 16), format="int4_g32_asym", small=True, tolerance=8e-3),
    case("small_int8", 40, 2, 128, 192, routing=listed(0, 33), format="int8", small=True),
    case("small_fp8", 24, 2, 64, 64, routing=listed(3, 20), format="fp8_e4m3", small=True),
    case("small_many_experts", 11, 130, 64, 64, rows=9, small=True),
    case("one_token", 1, 16, 256, 384),
    case("no_rows", 9, 5, 256, 128, rows=0),
    case("one_expert", 333, 1, 512, 320),
    case("fp16", 517, 7, 512, 256, dtype="float16"),
    case("all_to_one", 1500, 64, 512, 768, routing=single),
    case("decode", 256, 128, 512, 768),
    case("decode_zipf", 201, 128, 768, 512, rows=193, routing=zipf),
    case("prefill", 5000, 24, 1024, 768),
    case("prefill_zipf", 7001, 32, 512, 1536, rows=6900, routing=zipf),
    case("prefill_long", 4099, 4, 448, 320, rows=4098, routing=listed(2049, 0, 2048, 1)),
    *(
        case(f"{kind}_{name}", tokens, experts, 768, 640, rows=rows, routing=zipf, format=name, tolerance=tolerance)
        for name, tolerance in PACKED
        for kind, tokens, rows, experts in (("decode", 131, 130, 64), ("prefill", 3001, 2998, 12))
    ),
    case("one_token_int4", 1, 16, 256, 384, format="int4_g64"),
    case("all_to_one_int8", 1500, 64, 512, 768, routing=single, format="int8"),
    case("one_group_int4", 77, 8, 320, 192, format="int4"),
]


def ragged_dot(x, w, group_sizes):
    return jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def shipped(x, w, group_sizes):
    """The Mosaic GPU example of jax, in the best of its own settings for this problem."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
        x, w, group_sizes=group_sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
    )


def touched(rows, experts):
    """Experts with rows, to be expected of even routing."""
    return experts * (1 - (1 - 1 / experts) ** rows)


def shape(name, tokens, experts, d, f, *, format=None, routing=even, copies=2):
    weight = tensor.nbytes(site(experts, d, f, format=format)["weight"]) / experts
    return Shape(
        op=OP,
        name=f"{name}_{format or 'bf16'}",
        make=lambda rng: batch(rng, tokens, experts, d, f, format=format, routing=routing),
        site=site(experts, d, f, format=format),
        bytes=weight * touched(tokens, experts) + 2 * tokens * (d + f),
        flops=2 * tokens * d * f,
        copies=copies,
        peers={} if format else {"jax.lax.ragged_dot": ragged_dot, "ragged_dot_mgpu of jax": shipped},
    )


QWEN3_30B = {"gate_up": (128, 2048, 2 * 768), "down": (128, 768, 2048)}  # experts, D, F; 8 of 128 a token
SHAPES = [
    shape(f"qwen3_30b_{part}_{tokens}", 8 * tokens, *QWEN3_30B[part], format=format)
    for format in (None, "int8", "int4_g128", "fp8_e4m3")
    for tokens in (32, 4096)
    for part in QWEN3_30B
]
