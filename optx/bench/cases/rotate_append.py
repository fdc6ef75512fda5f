"""Cases and benchmark shapes of `rotate_append`: new tokens of mixed rows, some of them padding, into half-full pools."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import tensor
from optx.bench.cases import Case, Shape
from optx.bench.cases.paged_decode import both, stored
from optx.cache import NEAR, Ragged, View
from optx.formats import Affine, Codebook, Float8, Int
from optx.nn.attention import paged_spec
from optx.nn.core import RMSNorm, Rope

OP = "rotate_append"
INT8, INT4, FP8 = Int(width=8), Int(width=4), Float8()
INT8_ZERO, INT4_ZERO = Int(width=8, symmetric=False), Int(width=4, symmetric=False)
CONTEXT = 40960  # tokens: positions lie below
# A rotated key is rounded to 16 bits before it gets its code, which tips some codes to the next one; the reference in float32
# does not round. The reference itself, in bfloat16: 7e-3, 1.5e-2, 3.8e-2.
TIPPED = {
    "int8": 1e-2,
    "fp8_e4m3": 3e-2,
    "int4": 5e-2,
    "int4_g64": 5e-2,
    "int4_affine": 5e-2,
    "int4_g32_affine": 5e-2,
    "codebook4": 5e-2,
    "int3": 1e-1,
    "int3_g32_affine": 1e-1,
    "int2": 2e-1,
    "int2_g32_affine_clip0.92": 2e-1,
}
TIES = 0.02  # steps of a code
TURNS = 6


def call(
    rng,
    *,
    tokens,
    heads,
    kv_heads,
    head_dim,
    page_size=16,
    dtype="bfloat16",
    format=None,
    joined=False,
    padding=0,
    rope: Rope | None = None,
    norm: dict | None = None,
    first: int = 0,
):
    """A call whose newest `padding` tokens are none. Half of the pool's slots keep what they hold; the last page holds NaN.

    first: of the cache; with it pages of exact tokens, other slots, are written as well."""
    pages = -(-2 * tokens // page_size)
    spec = stored(paged_spec(kv_heads, head_dim, dtype=dtype), format).replace(first=first)
    shape = (pages + 1, kv_heads, page_size, head_dim)
    formats = zip("kv", both(format), strict=True)
    pool = {name: _pool(rng.standard_normal(shape, np.float32), dtype, each) for name, each in formats}
    x = rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim), np.float32)
    x = jnp.asarray(x * np.exp(rng.standard_normal((tokens, heads + 2 * kv_heads, 1), np.float32)), dtype)
    x = x.at[0, -1].set(0)
    writes = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    positions = rng.integers(0, CONTEXT, tokens).astype(np.int32)
    real = tokens - padding
    writes[real:], positions[real:] = pages * page_size + np.arange(padding) * 5 * page_size, 0
    kwargs = {"positions": jnp.asarray(positions), "writes": jnp.asarray(writes), "spec": spec, "rope": rope}
    if spec.near is not None:
        pool |= {NEAR + name: _pool(rng.standard_normal(shape, np.float32), dtype, None) for name in "kv"}
        exact = writes.copy()
        exact[:real] = rng.permutation(pages * page_size)[:real]
        view = functools.partial(View, pool=pool, slots=jnp.zeros(1, jnp.int32))
        kwargs["view"] = view(writes=kwargs["writes"], near=view(writes=jnp.asarray(exact)))
        kwargs["ragged"] = Ragged.dense(1, tokens)
    for name in ("q_norm", "k_norm"):
        kwargs[name] = None if norm is None else _norm(rng, head_dim, **norm)
    if rope is None and norm is None and isinstance(format, Int):
        x = _untied(x, format)
    parts = (x, None, None) if joined else jnp.split(x, [heads, heads + kv_heads], axis=1)
    return (*parts, pool), kwargs


def _untied(x, format):
    """x without numbers that lie between two codes: XLA divides through a reciprocal, which tips them either way. The largest
    of a head is positive: as the least number it would lie half a step below the least code. It stays, or shrinks where there
    is a zero point; then scales move, and a few turns settle it."""
    at = jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    x = jnp.where(jnp.take_along_axis(x, at, axis=-1) < 0, -x, x)
    for _ in range(TURNS):
        steps = x.astype(jnp.float32) / tensor.quantize(x, format, axis=-1).scale.astype(jnp.float32)
        near = jnp.abs(steps - jnp.floor(steps) - 0.5) < TIES
        x = jnp.where(near, jnp.where(jnp.arange(x.shape[-1]) == at, x * (0.96 if format.has_zero else 1), 0), x)
    return x


def _pool(x, dtype, format):
    last = jnp.arange(len(x)) == len(x) - 1
    x = jnp.where(last[:, None, None, None], jnp.nan, jnp.asarray(x, dtype))
    return x if format is None else tensor.quantize(x, format, axis=-1)


def _norm(rng, head_dim, *, offset=0.0, dtype="bfloat16"):
    norm = RMSNorm(head_dim, offset=offset, dtype=dtype)
    weight = rng.standard_normal(head_dim, np.float32) * 0.1 + (1 - offset)
    norm.weight = nnx.Param(jnp.asarray(weight, dtype), axes=("embed",))
    return norm


def results(output, kwargs):
    """Queries; keys and values of the tokens' slots, and of all others: the page for padding is left out."""
    q, pool = output
    found = [q]
    for name in sorted(pool):
        stored = tensor.dense(pool[name])[:-1].astype(jnp.float32)
        flat = jnp.moveaxis(stored, 1, 2).reshape(-1, stored.shape[1], stored.shape[3])
        writes = np.asarray(kwargs["writes"] if name in "kv" else kwargs["view"].near.writes)
        writes = writes[writes < len(flat)]
        others = np.setdiff1d(np.arange(len(flat)), writes)
        found += [flat[writes], flat[others]]
    return found


def site(heads, kv_heads, head_dim, *, dtype="bfloat16", format=None, rope=None, norm=None, first=0, **_) -> dict:
    norm = None if norm is None else RMSNorm(head_dim, offset=norm.get("offset", 0.0))
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "cache": stored(paged_spec(kv_heads, head_dim, dtype=dtype), format).replace(first=first),
        "rope": rope,
        "q_norm": norm,
        "k_norm": norm,
    }


def case(name: str, tokens, heads, kv_heads, head_dim, *, small=True, turns=True, **kwargs) -> Case:
    kwargs = {"rope": Rope(theta=1e6, dim=head_dim) if turns else None} | kwargs
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    tolerances = TIPPED if kwargs["rope"] is not None or kwargs.get("norm") is not None else {}
    return Case(
        op=OP,
        name=name,
        make=functools.partial(call, tokens=tokens, **shape, **kwargs),
        site=site(**shape, **kwargs),
        tolerance=tolerances.get(str(both(kwargs.get("format"))[1]).split("_asym")[0], 5e-3),
        small=small,
        pick=results,
    )


FORMATS = {"int8": INT8, "int8_zero": INT8_ZERO, "int4": INT4, "int4_zero": INT4_ZERO, "fp8": FP8}
FEW_BITS = {
    "oscar2": tuple(Int(width=2, symmetric=False, clip=clip) for clip in (0.96, 0.92)),
    "oscar3": tuple(Int(width=3, symmetric=False, clip=clip) for clip in (0.96, 0.92)),
    "oscar2_least": tuple(Affine(width=2, group=32, clip=clip) for clip in (0.96, 0.92)),
    "affine3": Affine(width=3, group=32),
    "int4_groups": Int(width=4, symmetric=False, group=64),
    "affine": Affine(width=4, group=32),
    "affine_head": Affine(width=4),
    "turbo4": Codebook(width=4),
}
QWEN = {"heads": 32, "kv_heads": 8, "head_dim": 128, "norm": {}, "joined": True}
YARN = Rope(theta=1e4, dim=64, scaling="yarn", factor=8.0, attention_factor=1.2)

CASES = (
    case("one_token", 1, 8, 2, 128, norm={}, joined=True),
    case("padding", 7, 4, 2, 128, norm={}, padding=3),
    case("nothing_to_turn", 5, 4, 4, 64, turns=False),
    case("norm_alone", 5, 4, 2, 64, turns=False, norm={"offset": 1.0, "dtype": "float32"}),
    case("part_turned", 6, 4, 2, 256, rope=Rope(theta=1e4, dim=64), norm={}, joined=True),
    case("neighbours", 6, 6, 3, 64, rope=Rope(theta=1e4, dim=64, interleaved=True)),
    case("neighbours_part", 6, 4, 2, 96, rope=Rope(theta=1e4, dim=40, interleaved=True), norm={}),
    case("stretched", 6, 4, 1, 80, rope=YARN, joined=True),
    case("float16", 6, 4, 2, 96, dtype="float16", norm={"dtype": "float16"}),
    case("clipped", 9, 4, 2, 128, format=Int(width=4, symmetric=False, clip=0.9), norm={}, joined=True),
    case("page_of_24", 20, 2, 1, 64, page_size=24),
    *(case(f"{name}_as_given", 200, 4, 2, 64, turns=False, format=f, padding=2) for name, f in FORMATS.items()),
    *(case(name, 9, 4, 2, 128, format=f, norm={}, joined=True) for name, f in FORMATS.items()),
    *(case(name, 9, 4, 2, 128, format=f, norm={}, joined=True) for name, f in FEW_BITS.items()),
    case("exact_as_well", 9, 4, 2, 128, format=INT4_ZERO, norm={}, joined=True, padding=2, first=4),
    case("bfloat16_scales", 9, 4, 2, 80, format=Int(width=4, scale_dtype="bfloat16"), joined=True),
    *(case(f"qwen_{t}", t, **QWEN, page_size=64, padding=t // 8, small=False) for t in (1, 32, 67, 2048)),
    *(
        case(f"qwen_{name}_{t}", t, **QWEN, page_size=64, padding=t // 8, format=f, small=False)
        for name, f in FORMATS.items()
        for t in (32, 300)
    ),
)


def shape(tokens: int, stored=None, name: str | None = None, first: int = 0) -> Shape:
    """A layer of Qwen3-8B. A benchmark keeps its inputs, so copies of the (small) pool are in its time; a step makes none."""
    rope = Rope(theta=1e6, dim=128)
    facts = {"heads": 32, "kv_heads": 8, "head_dim": 128, "format": stored, "rope": rope, "norm": {}, "first": first}
    spec = site(**facts)["cache"]
    return Shape(
        op=OP,
        name=f"{name or stored or 'bfloat16'}_{tokens}x32/8x128",
        make=functools.partial(call, tokens=tokens, joined=True, page_size=64, **facts),
        site=site(**facts),
        bytes=tokens * (2 * (48 + 32) * 128 + sum(part.unit_bytes for part in spec.parts) + 4 * 128 + 8),
        flops=tokens * 48 * 128 * 10,
    )


SHAPES = (
    *(shape(tokens, stored) for tokens in (1, 32, 512) for stored in (None, INT8, INT4)),
    shape(32, INT4_ZERO, "int4_exact_as_well", first=4),
    *(shape(32, stored, name) for name, stored in FEW_BITS.items()),
)
