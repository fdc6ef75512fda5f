"""The Hopper kernel of `quant_matmul` with 8-bit activations: interpreted, lowered for CUDA, tile choice, what it refuses."""

import dataclasses
import re
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx import tensor
from optx.bench.cases import registry
from optx.bench.cases import w8a8 as cases
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.formats import Float4, Float8, Int
from optx.pallas.quant_matmul import mosaic_gpu_sm90_w8a8 as kernel
from optx.pallas.quant_matmul import reference

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = [case for case in cases.CASES if case.small]
name = lambda case: case.name  # noqa: E731


def interpreted(case, args, kwargs):
    """Two thread blocks with several items each, where there are as many."""
    by_rows = args[0].shape[0] > 64
    tiles = kernel.Tiles(
        rows=128 if by_rows else 64,
        cols=32,
        by_rows=by_rows,
        stages=3,
        band=2,
        programs=2,
        interpretable=True,
    )
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return kernel.quant_matmul(*args, **kwargs, tiles=tiles)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    found = interpreted(case, args, kwargs)
    assert found.dtype == args[0].dtype
    wanted = reference.quant_matmul(*registry.in_float32(args), **kwargs)
    assert relative_error(found, wanted) < case.tolerance
    if case is SMALL[0]:
        np.testing.assert_array_equal(found, interpreted(case, args, kwargs))


STORED = [cases.FP8, cases.FP8_BLOCKS, cases.INT8, cases.INT8_BLOCKS, Float8(kind="e5m2")]


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_relayout_and_back(stored, rng):
    w = tensor.quantize(jnp.asarray(rng.normal(size=(256, 30)), jnp.bfloat16), stored)
    panels = kernel.relayout(w)
    assert panels.shape == w.shape and panels.size == w.size and panels.ndim == 2
    back = tensor.canonical(panels)
    back.validate()
    assert jax.tree.structure(back) == jax.tree.structure(w)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))
    np.testing.assert_array_equal(panels.dequantize(), w.dequantize())
    abstract = tensor.lift(kernel.relayout, jax.eval_shape(lambda: w))
    assert jax.tree.structure(abstract) == jax.tree.structure(panels) and abstract.nbytes == panels.nbytes
    assert kernel.supports({"weight": abstract, "activations": stored}, HOPPER) is None


@pytest.mark.parametrize("d, keep", [(1024, True), (384, True), (256, False)])
@pytest.mark.parametrize("format_", [cases.FP8, cases.INT8, Float8(kind="e5m2")], ids=str)
def test_rounding_rows(format_, d, keep, rng, monkeypatch):
    """The codes and scales of `encode`, NaN and infinities included, whether a row is read once or twice."""
    monkeypatch.setattr(kernel, "KEEP", d if keep else 0)
    x = rng.normal(size=(5, d)) * np.exp(rng.normal(size=(5, 1)) * 3)
    x[1], x[2, 7], x[3, 9] = 0, np.nan, -np.inf
    x = jnp.asarray(x, jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        codes, scale = kernel._round_rows.__wrapped__(x, format_=format_)
    want = format_.encode(x)
    finite = np.asarray([0, 1, 4])
    np.testing.assert_array_equal(scale[finite], want.scale[finite].astype(jnp.float32))
    assert np.isnan(np.asarray(scale)[[2, 3], 0]).all() and codes.dtype == want.data.dtype
    same = np.asarray(codes[finite].astype(jnp.float32)) == np.asarray(want.data[finite].astype(jnp.float32))
    assert same.mean() > 0.998


def test_panels_are_read_as_they_lie(rng):
    args, kwargs = SMALL[-1].make(rng)
    want = interpreted(SMALL[-1], args, kwargs)
    np.testing.assert_array_equal(interpreted(SMALL[-1], (args[0], kernel.relayout(args[1])), kwargs), want)


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_lowers_for_cuda(case):
    weight, activations = case.site["weight"], case.site["activations"]
    x = jax.ShapeDtypeStruct((130, weight.length), jnp.bfloat16)
    run = jax.jit(lambda x, w: kernel.quant_matmul(x, w, activations))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(x, weight)
    assert [out.shape for out in exported.out_avals] == [(130, weight.shape[1])]


@pytest.mark.parametrize("item", [*cases.CASES, *cases.SHAPES], ids=name)
def test_supports_its_cases(item):
    assert kernel.supports(item.site, HOPPER) is None


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("f", [8, 1000, 4096, 24576, 152064])
def test_tiles_fit(f, blocks):
    for m in (1, 16, 64, 65, 130, 1000, 8192):
        tiles = kernel.tiles_for(m, f, blocks)
        assert kernel._fixed(tiles) + tiles.stages * kernel._stage(tiles, blocks) <= kernel.SHARED
        assert 3 <= tiles.stages <= 32 and tiles.wg_rows == 64 and tiles.wg_cols % 8 == 0
        assert tiles.wg_cols <= (128 if blocks else 256), "sums of a warpgroup fit its registers"
        assert tiles.rows <= 64 or m > 64


def site(**changes):
    given = {"d": 256, "f": 512, "activations": cases.FP8, "stored": cases.FP8, **changes}
    return cases.site(**given)


REFUSED = [
    (site(activations=None), "activations as they are"),
    (site(activations=Int(width=4)), "activations in int4"),
    (site(activations=Int(width=8, symmetric=False)), "activations in int8_asym"),
    (site(activations=Float8(group=64)), "activations in fp8_e4m3_g64"),
    (site(stored=Int(width=4, group=64)), "w in int4_g64"),
    (site(stored=Float4(kind="mx")), "w in mxfp4"),
    (site(stored=cases.INT8), "activations in fp8_e4m3 by w in int8"),
    (site(d=192), "w of D = 192; takes multiples of 128"),
    ({**site(), "weight": jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)}, "w bfloat16"),
    ({**site(), "weight": site()["weight"].T}, "w bfloat16.*in fp8_e4m3"),
]


@pytest.mark.parametrize("args, reason", REFUSED, ids=[reason[:24] for _, reason in REFUSED])
def test_declines_and_refuses_alike(args, reason):
    assert re.match(reason, kernel.supports(args, HOPPER))
    with pytest.raises(LoweringError, match=rf"quant_matmul \(mosaic_gpu/sm90 w8a8\): {reason.partition(';')[0]}"):
        weight = args["weight"]
        jax.eval_shape(
            lambda x, w: kernel.quant_matmul(x, w, args["activations"]),
            jax.ShapeDtypeStruct((4, weight.shape[0]), jnp.bfloat16),
            weight,
        )


def test_declines_other_chips():
    for platform, arch in (("gpu", "sm100"), ("cpu", None), ("tpu", "v6e")):
        assert "sm90" in kernel.supports(site(), types.SimpleNamespace(platform=platform, arch=arch))


@pytest.mark.parametrize(
    "shape, dtype", [((4, 128), jnp.bfloat16), ((4, 256), jnp.float32), ((0, 256), jnp.bfloat16), ((), jnp.bfloat16)]
)
def test_refuses_x(shape, dtype):
    w = tensor.quantize(jnp.ones((256, 8), jnp.bfloat16), cases.FP8)
    with pytest.raises(LoweringError, match=r"x .*; allowed: "):
        kernel.quant_matmul(jnp.zeros(shape, dtype), w, cases.FP8)


def test_declines_x_of_32_bits():
    assert kernel.supports({**site(), "dtype": "float32"}, HOPPER) == "x float32; takes bfloat16 and float16"
    assert kernel.supports({**site(), "dtype": "float16"}, HOPPER) is None


def test_expert_weights_are_declined():
    weight = tensor.quantize(jax.ShapeDtypeStruct((3, 256, 512), jnp.bfloat16), cases.FP8)
    assert "a QTensor" in kernel.supports({"weight": weight, "activations": cases.FP8}, HOPPER)


def test_a_scale_of_the_whole_row_may_be_called_a_group():
    """A group as long as the contracted axis is one scale a row."""
    whole = Float8(kind="e4m3", group=256)
    assert kernel.supports(site(activations=whole, stored=whole), HOPPER) is None
    assert dataclasses.replace(whole, group=None) == cases.FP8
