"""The Hopper kernel of `paged_decode`: interpreted on small cases, lowered for CUDA, and what it refuses."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx.bench.cases import paged_decode as cases
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.formats import Affine, Float8, Int, PerChannel
from optx.pallas.attention.reference import Mask
from optx.pallas.paged_decode import mosaic_gpu_sm90 as kernel

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = [case for case in cases.CASES if case.small]
LOWERED = [
    case
    for case in cases.CASES
    if case.name
    in (
        "page16",
        "blocks_int8",
        "newest",
        "oscar2",
        "kivi4_queries",
        "turbo4",
        "window_page128",
        "window_int4",
        "int8_zero_page128_dim256",
        "fp8_queries",
        "lists",
    )
]
TILES = kernel.Tiles(sms=2, stages=2, registers=False)
name = lambda case: case.name  # noqa: E731


def interpreted(args, kwargs, **tiles):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return kernel.paged_decode(*args, **kwargs, tiles=dataclasses.replace(TILES, **tiles))


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    found = interpreted(args, kwargs)
    wanted = cases.exact(args, kwargs)
    for x, y in zip(case.pick(found, kwargs), case.pick(wanted, kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance


def test_split_and_repeat():
    """However the tiles are shared out the result is the same up to rounding; the same call gives the same bits."""
    args, kwargs = SMALL[0].make(np.random.default_rng(0))
    first, again, split = (interpreted(args, kwargs, wgs=wgs, sms=sms) for wgs, sms in ((2, 2), (2, 2), (1, 5)))
    for x, y, z in zip(first[:2], again[:2], split[:2], strict=True):
        assert np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
        assert relative_error(z, x) < 5e-3


@pytest.mark.parametrize("case", LOWERED, ids=name)
def test_lowers_for_cuda(case):
    args, kwargs = case.make(np.random.default_rng(0))
    static = {key: kwargs.pop(key) for key in ("mask", "softcap") if key in kwargs}
    run = jax.jit(lambda args, kwargs: kernel.paged_decode(*args, **kwargs, **static)[:2])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(args, kwargs)
    assert [x.shape for x in exported.out_avals] == [args[0].shape, args[0].shape[:3]]


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_supports_its_cases(case):
    assert kernel.supports(case.site, HOPPER) is None


@pytest.mark.parametrize("shape", cases.SHAPES, ids=name)
def test_supports_its_shapes(shape):
    assert kernel.supports(shape.site, HOPPER) is None


def test_tiles_fill_shared_memory():
    for head_dim in kernel.HEAD_DIMS:
        for fmt in ("dense", "int8", "int4", "fp8", "int2", "codebook4"):
            for rows in (1, 128):
                for small in (0, 3072):
                    tiles = kernel.tiles(head_dim, fmt, small, rows)
                    assert 2 <= tiles.stages <= 8 and tiles.wgs in kernel.REGISTERS


SITE = cases.site(8, 2, 128, 64)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"head_dim": 80}, "80"),
        ({"heads": 34}, "at most 16"),
        ({"page_size": 8}, "page size 8"),
        ({"cache": SITE["cache"].replace(dtype="float32")}, "float32"),
        ({"cache": SITE["cache"].replace(dtype="float16", format=Int(width=8))}, "float16"),
        ({"cache": SITE["cache"].replace(format=Int(width=8, group=32))}, "int8_g32"),
        ({"cache": SITE["cache"].replace(format=Int(width=8, group=64))}, "int8_g64"),
        ({"cache": SITE["cache"].replace(format=Int(width=4, group=8))}, "groups of 8 numbers"),
        ({"cache": SITE["cache"].replace(format=PerChannel(width=4, group=32))}, "of values"),
        ({"cache": cases.stored(SITE["cache"], (PerChannel(width=4, group=16), Affine(width=4)))}, "by 16 tokens"),
        ({"cache": cases.stored(SITE["cache"], (Int(width=4), Int(width=8)))}, "k int4, v int8"),
        ({"cache": cases.stored(SITE["cache"], (Int(width=8), Int(width=8, symmetric=False)))}, "keys or values alone"),
        ({"cache": SITE["cache"].replace(format=Int(width=2)), "head_dim": 64}, "int2 of 64 numbers"),
        ({"cache": SITE["cache"].replace(format=Float8(kind="e5m2"))}, "fp8_e5m2"),
        ({"cache": dataclasses.replace(SITE["cache"], kind="latent")}, "latent"),
    ],
)
def test_declines(change, reason):
    assert reason in kernel.supports({**SITE, **change}, HOPPER)


def test_declines_other_chips():
    for platform, arch in (("gpu", "sm100"), ("cpu", None), ("tpu", "v6e")):
        assert "sm90" in kernel.supports(SITE, types.SimpleNamespace(platform=platform, arch=arch))


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"value_dim": 32}, "v_pool"),
        ({"v_pool": None}, "v_pool"),
        ({"q": jnp.zeros((3, 1, 4, 64), jnp.float32)}, "dtypes"),
        ({"q": jnp.zeros((3, 9, 4, 64), jnp.bfloat16)}, "query tokens 9"),
        ({"q": jnp.zeros((3, 1, 17, 64), jnp.bfloat16)}, "query heads 17"),
        ({"q": jnp.zeros((3, 1, 4, 128), jnp.bfloat16)}, "pools"),
        ({"lengths": jnp.zeros((1, 9), jnp.int32)}, "lengths"),
        ({"lengths": jnp.zeros((1, 3), jnp.int16)}, "dtype of lengths"),
        ({"positions": jnp.zeros((3, 5), jnp.int32)}, "positions"),
        ({"table": jnp.zeros((3, 4, 5), jnp.int32)}, "table"),
        ({"sink_logits": jnp.zeros(3)}, "sink_logits"),
        ({"logit_scale": jnp.zeros((3, 4, 5))}, "logit_scale"),
        ({"tiles": kernel.Tiles(wgs=4)}, "tiles"),
        ({"tiles": kernel.Tiles(tokens=128, stages=6, wgs=2)}, "shared memory"),
        ({"mask": Mask(window=9), "q_positions": jnp.zeros((3, 2), jnp.int32)}, "q_positions"),
    ],
)
def test_refuses(change, argument):
    (q, k_pool, v_pool), kwargs = SMALL[0].make(np.random.default_rng(0))
    given = {"q": q, "k_pool": k_pool, "v_pool": v_pool, **kwargs, **change}
    with pytest.raises(LoweringError, match=f"paged_decode.*{argument}.*allowed"):
        kernel.paged_decode(given.pop("q"), given.pop("k_pool"), given.pop("v_pool"), **given)


def test_refuses_formats():
    (q, k_pool, v_pool), kwargs = next(c for c in SMALL if c.name == "small_int8").make(np.random.default_rng(0))
    with pytest.raises(LoweringError, match="alike for keys and values"):
        kernel.paged_decode(q, k_pool, v_pool.dequantize().astype(q.dtype), **kwargs)
    with pytest.raises(LoweringError, match="dtype of q float16"):
        kernel.paged_decode(q.astype(jnp.float16), k_pool, v_pool, **kwargs)
    grouped = [dataclasses.replace(x, format=Int(width=8, group=32)) for x in (k_pool, v_pool)]
    with pytest.raises(LoweringError, match="int8_g32"):
        kernel.paged_decode(q, *grouped, **kwargs)
    (q, k_pool, v_pool), kwargs = next(c for c in SMALL if c.name == "small_kivi4").make(np.random.default_rng(0))
    wide = dataclasses.replace(k_pool, format=PerChannel(width=4, group=64))
    with pytest.raises(LoweringError, match="page size 32; allowed: a multiple of the 64 tokens"):
        kernel.paged_decode(q, wide, v_pool, **kwargs)
