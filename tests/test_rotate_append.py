"""`rotate_append`: the reference against its parts, the Hopper kernel run lane by lane, lowered for CUDA, what it refuses."""

import dataclasses
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lanes import Lanes

from optx import near, tensor
from optx.bench.cases import registry
from optx.bench.cases import rotate_append as cases
from optx.bench.cases.paged_decode import stored
from optx.bench.timing import relative_error
from optx.cache import CachePlan, Layout, Ragged, View
from optx.errors import LoweringError
from optx.formats import Affine, Float8, Int, PerChannel
from optx.hadamard import Rotation
from optx.nn.attention import Attention, FusedAttention, paged_spec
from optx.nn.core import RMSNorm, Rope
from optx.nn.rotated import RotatedHeads
from optx.pallas import dispatch
from optx.pallas.rotate_append import mosaic_gpu_sm90 as kernel
from optx.pallas.rotate_append import reference
from optx.passes.fuse_projections import join

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = [case for case in cases.CASES if case.small]
STEPPED = [
    c
    for c in SMALL
    if c.name in ("padding", "neighbours", "float16", "fp8", "exact_as_well", *cases.FORMATS, *cases.FEW_BITS)
    or "given" in c.name
]
name = lambda case: case.name  # noqa: E731


def on_lanes(*args, **kwargs):
    """The op with the kernel's program on numpy arrays: what its launch would do."""
    with mock.patch.object(kernel, "_run", run_lanes):
        return kernel.rotate_append(*args, **kwargs)


def run_lanes(plan, inputs, leaves):
    xs, writes, angles, norms = jax.tree.map(np.array, inputs)
    pools = [[np.array(x) for x in found] for found in leaves]
    out = np.zeros((plan.tokens, plan.heads, plan.head_dim), plan.dtype)
    lanes = Lanes(-(-plan.tokens * plan.units // kernel.WARPS), [out, *(x for found in pools for x in found)])
    kernel._program(lanes, plan, xs, writes, angles, norms, pools, out)
    return jnp.asarray(out), [[jnp.asarray(x) for x in found] for found in pools]


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_against_the_reference_in_float32(case):
    args, kwargs = case.make(np.random.default_rng(0))
    found, wanted = on_lanes(*args, **kwargs), registry.reference(case.op, args, kwargs)
    for x, y in zip(case.pick(found, kwargs), case.pick(wanted, kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance


@pytest.mark.parametrize("case", STEPPED, ids=name)
def test_rounds_where_the_reference_does(case):
    """Run step by step in 16 bits the reference gives the same bits, but where the order of a sum, or its division through
    a reciprocal, tips one."""
    args, kwargs = case.make(np.random.default_rng(0))
    (q, pool), (q_ref, pool_ref) = on_lanes(*args, **kwargs), stepwise(*args, **kwargs)
    parts = [(q, q_ref)]
    for stream in pool:
        both = zip(kernel._leaves(pool[stream]), kernel._leaves(pool_ref[stream]), strict=True)
        parts += [(x[:-1], y[:-1]) for x, y in both]
    for x, y in parts:
        if x.dtype == jnp.float32:  # a scale
            np.testing.assert_array_max_ulp(np.asarray(x), np.asarray(y), 1)
            continue
        x, y = (np.asarray(a).view(f"uint{8 * a.dtype.itemsize}") for a in (x, y))
        assert np.mean(x != y) <= (0.002 if kwargs["q_norm"] is not None else 0.0005 if x.dtype == np.uint8 else 0)


def stepwise(q, k, v, pool, *, positions, writes, spec, rope, q_norm, k_norm, view=None, ragged=None):
    """The reference, one operation a program: XLA keeps more than 16 bits between operations of one."""
    q, k, v = reference.separate(q, k, v, spec)
    with jax.disable_jit():
        q, k = (reference.rotate(x, norm, rope, positions) for x, norm in ((q, q_norm), (k, k_norm)))
        if view is not None:
            return q, near.append(spec, {"k": k, "v": v}, view, ragged)
        return q, spec.append(pool, {"k": k, "v": v}, writes)


@pytest.mark.parametrize("tokens", [40, 70])
def test_kivi_packs_the_blocks_that_a_step_completes(tokens):
    """Values by the kernel; keys by XLA, of the exact tokens that the kernel has stored: two steps of a row."""
    spec = stored(paged_spec(2, 128, dtype="bfloat16"), (PerChannel(width=4, group=32), Affine(width=4, group=32)))
    spec = spec.replace(recent=32)
    layout = Layout(pages=4, page_size=32, slots=1)
    rng, pools = np.random.default_rng(0), [CachePlan(specs=(spec,)).init(layout).layers[0]] * 2
    table = jnp.array([[[3, 0, 2, 1]]], jnp.int32)
    for first, stop in ((0, tokens), (tokens, tokens + 30)):
        x = jnp.asarray(rng.standard_normal((stop - first, 8, 128)), jnp.bfloat16)
        at = np.arange(first, stop)
        writes = jnp.asarray(np.asarray(table)[0, 0, at // 32] * 32 + at % 32, jnp.int32)
        ragged = dataclasses.replace(Ragged.dense(1, stop - first), positions=jnp.asarray(at, jnp.int32))
        for i, run in enumerate((on_lanes, reference.rotate_append)):
            where = {"table": table, "lengths": jnp.full((1, 1), stop, jnp.int32), "writes": writes}
            near_view = View(pool=pools[i], slots=jnp.zeros(1, jnp.int32), **where)
            view = dataclasses.replace(near_view, near=near_view)
            kwargs = {"positions": ragged.positions, "writes": writes, "spec": spec, "view": view, "ragged": ragged}
            q, pools[i] = run(x, None, None, pools[i], **kwargs)
    assert sorted(pools[0]) == sorted(pools[1]) == ["k", "near_k", "near_v", "v"]
    for found, wanted in zip(*(jax.tree.leaves({n: jax.tree.map(lambda x: x[:-1], p[n]) for n in p}) for p in pools)):
        tipped = np.mean(np.asarray(found) != np.asarray(wanted))
        assert tipped < 2e-3, "the last bit of a division"
    assert float(jnp.abs(tensor.dense(pools[0]["k"]).astype(jnp.float32)).max()) > 1, "blocks were packed"


def test_a_rotation_behind_the_positions_is_xlas():
    rope = RotatedHeads(rope=Rope(theta=1e6, dim=128), rotation=Rotation(d=128, seed=0, mixed=True))
    case = cases.case("rotated", 9, 4, 2, 128, format=cases.FEW_BITS["turbo4"], norm={}, joined=True, rope=rope)
    assert kernel.supports(case.site, HOPPER) is None
    args, kwargs = case.make(np.random.default_rng(0))
    for x, y in zip(case.pick(on_lanes(*args, **kwargs), kwargs), case.pick(stepwise(*args, **kwargs), kwargs)):
        assert relative_error(x, y) < 5e-3


def over_cache(attn, x):
    """x [T, D] as a row of its own and a padding token, over an empty cache -> (y, pool)."""
    layout, tokens = Layout(pages=2, page_size=16, slots=1), len(x)
    at = jnp.where(jnp.arange(tokens) < tokens - 1, jnp.arange(tokens), 0).astype(jnp.int32)
    view = View(
        pool=attn.cache.init(layout),
        slots=jnp.zeros(1, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (3, 16)),
        table=jnp.array([[[1, 0]]], jnp.int32),
        lengths=jnp.full((1, 1), tokens - 1, jnp.int32),
        writes=jnp.where(jnp.arange(tokens) < tokens - 1, 16 + at, 32).astype(jnp.int32),
    )
    ragged = Ragged.dense(1, tokens, jnp.array([tokens - 1], jnp.int32))
    return attn(x, dataclasses.replace(ragged, positions=at), view)


@pytest.mark.parametrize("gated", [False, True])
def test_projections_in_one_weight_or_three(gated, monkeypatch):
    calls, real = [], dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda op, *args, **kw: calls.append((op, args)) or real(op, *args, **kw))
    rngs = nnx.Rngs(0)
    norm = lambda: RMSNorm(16, rngs=rngs)  # noqa: E731
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "rope": Rope(theta=1e4, dim=16), "norm": norm, "gated": gated}
    attn = Attention(32, **shape, rngs=rngs)
    fused = FusedAttention(attn, join(attn.q, attn.k, attn.v))
    x = jax.random.normal(jax.random.key(0), (6, 32))
    (y, pool), (z, other) = over_cache(attn, x), over_cache(fused, x)
    given = [args for op, args in calls if op == "rotate_append"]
    assert [args[1].shape for args in given] == [(6, 4, 16), (6, 4, 16) if gated else (6, 8, 16)]
    for one, two in ((y[:5], z[:5]), (pool["k"][:2], other["k"][:2]), (pool["v"][:2], other["v"][:2])):
        assert relative_error(one, two) < 1e-6
    whole, _ = attn(x[:5], Ragged.dense(1, 5), None)
    assert relative_error(y[:5], whole) < 1e-6, "over a cache as within a sequence"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((7, 8))}, "q is float32[7, 8]; allowed: floating [T, N, H]"),
        ({"k": None, "v": None, "q": jnp.zeros((7, 4, 128))}, "allowed: [7, N + 4, 128], all heads, without k and v"),
        ({"v": None}, "v is None; allowed: [7, 2, 128]"),
        ({"k": jnp.zeros((7, 3, 128))}, "k is float32[7, 3, 128]; allowed: [7, 2, 128]"),
        ({"writes": jnp.zeros(6, jnp.int32)}, "writes is int32[6]; allowed: int32[7]"),
        ({"positions": jnp.zeros(7, jnp.int16)}, "positions is int16[7]; allowed: int32[7]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    (q, k, v, pool), kwargs = SMALL[1].make(np.random.default_rng(0))
    given = {"q": q, "k": k, "v": v, **kwargs, **change}
    with pytest.raises(LoweringError, match=re.escape(message)):
        dispatch.call("rotate_append", (), *(given.pop(name) for name in "qkv"), pool, **given)


@pytest.mark.parametrize("stored", [None, *cases.FORMATS], ids=str)
def test_what_is_not_finite_stays_in_its_head(stored):
    format_ = cases.FORMATS.get(stored)
    shape = {"tokens": 4, "heads": 2, "kv_heads": 2, "head_dim": 64, "format": format_}
    (q, k, v, pool), kwargs = cases.call(np.random.default_rng(0), **shape)
    v = v.at[1, 0, 5].set(jnp.nan).at[2, 1, 6].set(jnp.inf)
    _, found = on_lanes(q, k, v, pool, **kwargs)
    _, wanted = reference.rotate_append(q, k, v, pool, **kwargs)
    for x, y in zip(cases.results((q, found), kwargs), cases.results((q, wanted), kwargs), strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        assert relative_error(jnp.nan_to_num(x), jnp.nan_to_num(y)) < 1e-3  # the last bit of a scale: see above
    assert np.isnan(np.asarray(tensor.dense(found["v"])[:-1], np.float32)).any()


LOWERED = [
    c
    for c in SMALL
    if c.name
    in (
        "one_token",
        "exact_as_well",
        "oscar2",
        "affine",
        "affine_head",
        "turbo4",
        "part_turned",
        "neighbours",
        "float16",
        "int4_zero",
        "fp8",
        "int8",
    )
]


@pytest.mark.parametrize("case", LOWERED, ids=name)
def test_lowers_for_cuda_and_updates_the_pool_in_place(case):
    args, kwargs = case.make(np.random.default_rng(0))
    *parts, pool = args
    dynamic, static = registry.split(kwargs)
    run = lambda pool, parts, dynamic: kernel.rotate_append(*parts, pool, **dynamic, **static)  # noqa: E731
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(run, donate_argnums=0), platforms=["cuda"], disabled_checks=unchecked)
    exported = exported(pool, parts, dynamic)
    text, leaves = exported.mlir_module(), len(jax.tree.leaves(pool))
    assert text.count("operand_index = ") == text.count("tf.aliasing_output") == leaves
    heads = args[0].shape[1] - (2 * pool["k"].shape[1] if args[1] is None else 0)
    assert exported.out_avals[0].shape == (args[0].shape[0], heads, args[0].shape[2])


@pytest.mark.parametrize("case", [*cases.CASES, *cases.SHAPES], ids=name)
def test_supports_its_cases(case):
    assert kernel.supports(case.site, HOPPER) is None


SITE = cases.site(8, 2, 128, rope=Rope(theta=1e4, dim=128), norm={})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"head_dim": 81}, "81"),
        ({"head_dim": 576}, "576"),
        ({"rope": Rope(theta=1e4, dim=30)}, "30 numbers rotated by halves"),
        ({"rope": Rope(theta=1e4, dim=256)}, "256 numbers rotated"),
        ({"dtype": "float32"}, "activations of float32"),
        ({"cache": SITE["cache"].replace(dtype="float32")}, "pages of float32"),
        ({"cache": SITE["cache"].replace(format=Int(width=3)), "rope": Rope(theta=1e4, dim=40)}, "int3 of 128 numbers"),
        ({"cache": SITE["cache"].replace(format=Int(width=4, group=16))}, "int4_g16"),
        ({"cache": SITE["cache"].replace(format=Affine(width=4, group=16))}, "int4_g16_affine"),
        ({"cache": SITE["cache"].replace(format=Int(width=2)), "rope": Rope(theta=1e4, dim=20)}, "int2 of 128 numbers"),
        ({"cache": SITE["cache"].replace(format=Float8(kind="e5m2"))}, "fp8_e5m2"),
        ({"cache": SITE["cache"].replace(format=Int(width=8, scale_dtype="float8_e4m3fn"))}, "scales of float8_e4m3fn"),
        ({"cache": dataclasses.replace(SITE["cache"], kind="latent")}, "latent"),
        ({"k_norm": RMSNorm(128, out="float32")}, "a norm that returns float32"),
    ],
)
def test_declines(change, reason):
    assert reason in kernel.supports({**SITE, **change}, HOPPER)


def test_declines_other_chips():
    for platform, arch in (("gpu", "sm100"), ("cpu", None), ("tpu", "v6e")):
        assert "sm90" in kernel.supports(SITE, types.SimpleNamespace(platform=platform, arch=arch))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"dtype": "float32"}, "rotate_append: call pages of float32"),
        ({"head_dim": 576}, "rotate_append: call head_dim 576"),
    ],
)
def test_refuses(change, said):
    shape = {"tokens": 2, "heads": 2, "kv_heads": 1, "head_dim": 64} | change
    args, kwargs = cases.call(np.random.default_rng(0), **shape)
    with pytest.raises(LoweringError, match=f"{said}.*allowed"):
        kernel.rotate_append(*args, **kwargs)


def test_refuses_mixed_dtypes():
    (q, k, v, pool), kwargs = SMALL[1].make(np.random.default_rng(0))
    with pytest.raises(LoweringError, match="dtypes bfloat16, float16, bfloat16; allowed: bfloat16 or float16 alike"):
        kernel.rotate_append(q, k.astype(jnp.float16), v, pool, **kwargs)
