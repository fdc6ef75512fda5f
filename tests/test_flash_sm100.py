"""The Blackwell kernel of `flash_attention`: interpreted with races looked for, every head dim assembled up to the assembler,
which steps are masked, what it declines."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx.bench.cases import flash_attention as cases
from optx.bench.cases.registry import in_float32, split
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.flash_attention import mosaic_gpu_sm100 as kernel

B200 = types.SimpleNamespace(platform="gpu", arch="sm100")
EXTRA = (
    cases.case("sinks", 150, **cases.SMALL, draw=cases.SINKS, scale=-0.2),
    cases.case("no_keys", 140, **{**cases.SMALL, "batch": 2}, mask=cases.FULL, draw={"valid": cases.draw_no_keys}),
    cases.case("window", 600, **cases.SMALL, mask=Mask(window=150)),
    cases.case("wide", 260, **{**cases.SMALL, "head_dim": 256, "heads": 1}),
    cases.case("growth", 400, **cases.SMALL, scale=3.0),
)
SMALL = [case for case in cases.CASES if case.small] + list(EXTRA)


def interpreted(args, kwargs):
    tiles = dataclasses.replace(kernel.tiles_for(args[0].shape[-1], args[2].shape[-1]), interpreted=True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(kernel.flash_attention(*args, **kwargs, tiles=tiles))
    assert not gpu_callbacks.get_races().races_found
    return found


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    out, lse, scores = interpreted(args, kwargs)
    wanted = reference.flash_attention(*in_float32(args), **kwargs)
    assert scores is None and out.dtype == args[0].dtype
    assert relative_error(out.astype(jnp.float32), wanted[0]) < case.tolerance
    finite = np.isfinite(np.asarray(wanted[1]))
    np.testing.assert_array_equal(np.isfinite(np.asarray(lse)), finite)
    assert relative_error(jnp.where(finite, lse, 0), jnp.where(finite, wanted[1], 0)) < 1e-5


MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(window=1),
    Mask(window=200),
    Mask(causal=False, window=300),
    Mask(window=200, sinks=5),
    Mask(lag=32),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
def test_runs_of_steps_hold_all_that_is_seen(mask, length):
    call = kernel.Call(mask=mask, scale=1, softcap=None, tiles=kernel.Tiles(), length=length, group=1)
    at = np.arange(length)
    seen = np.asarray(mask(at[:, None], at[None]))
    for row in range(0, length, 256):
        rows = seen[row : row + 256]
        runs = [(int(a), int(b), masked) for a, b, masked in kernel.spans(call, row, 256)]
        assert all(a[1] == b[0] for a, b in zip(runs, runs[1:], strict=False)), "one after another"
        met = np.zeros(length, bool)
        for first, last, masked in runs:
            assert 0 <= first <= last <= -(-length // 128)
            keys = slice(first * 128, last * 128)
            met[keys] = True
            if not masked and first < last:
                assert rows[:, keys].all() and last * 128 <= length
        assert not rows[:, ~met].any()


@pytest.mark.parametrize("head_dim, value_dim", kernel.HEAD_DIMS)
def test_lowers(head_dim, value_dim):
    args = [
        jax.ShapeDtypeStruct((2, 1000, n, w), jnp.bfloat16) for n, w in ((4, head_dim), (2, head_dim), (2, value_dim))
    ]
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda *args: kernel.flash_attention(*args)[:2])
    lowered = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(*args)
    assert [out.shape for out in lowered.out_avals] == [(2, 1000, 4, value_dim), (2, 1000, 4)]


@pytest.mark.parametrize("head_dim, value_dim", kernel.HEAD_DIMS)
def test_tiles_fit(head_dim, value_dim):
    tiles = kernel.tiles_for(head_dim, value_dim)
    assert tiles.stages >= 1 and tiles.tiles * (kernel.BLOCK + value_dim) <= 512
    rows = tiles.tiles * kernel.ROWS + tiles.stages * kernel.BLOCK
    assert 2 * (rows * head_dim + tiles.stages * kernel.BLOCK * value_dim) <= kernel.SHARED


def test_gradient_is_that_of_the_reference():
    args, kwargs = SMALL[0].make(np.random.default_rng(1))
    static = split(kwargs)[1]
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda q: kernel.flash_attention(q, *args[1:], **static)[0].astype(jnp.float32).sum())
    )
    assert jaxpr(args[0]).out_avals[0].shape == args[0].shape


def test_supports_says_why():
    assert kernel.supports({"head_dim": 128, "dtype": "bfloat16"}, B200) is None
    assert "it has (64, 64)" in kernel.supports({"head_dim": 80}, B200)
    assert "float32" in kernel.supports({"head_dim": 128, "dtype": "float32"}, B200)
    with pytest.raises(LoweringError, match=r"\(H, Hv\) is \(80, 80\)"):
        kernel.flash_attention(*(jnp.zeros((1, 8, 1, 80), jnp.bfloat16),) * 3)
