"""`flash_attention` by warps' matrix instructions: interpreted with races looked for, lowered, rows by architecture, refusals."""

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx.bench.cases import flash_attention as cases
from optx.bench.cases.registry import in_float32
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.pallas import dispatch
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.flash_attention import mosaic_gpu_mma as kernel
from optx.target import TARGETS

ADA = types.SimpleNamespace(platform="gpu", arch="sm89")
EXTRA = (
    cases.case("sinks", 150, **cases.SMALL, draw=cases.SINKS, scale=-0.2),
    cases.case("no_keys", 140, **{**cases.SMALL, "batch": 2}, mask=cases.FULL, draw={"valid": cases.draw_no_keys}),
    cases.case("window", 300, **cases.SMALL, mask=Mask(window=90)),
    cases.case("dim128", 130, **{**cases.SMALL, "head_dim": 128}),
)
SMALL = [case for case in cases.CASES if case.small and kernel.supports(case.site, ADA) is None] + list(EXTRA)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out, lse, scores = kernel.flash_attention(*args, **kwargs, tiles=kernel.Tiles(interpreted=True))
        jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    wanted = reference.flash_attention(*in_float32(args), **kwargs)
    assert scores is None and relative_error(out.astype(jnp.float32), wanted[0]) < case.tolerance
    finite = np.isfinite(np.asarray(wanted[1]))
    np.testing.assert_array_equal(np.isfinite(np.asarray(lse)), finite)
    assert relative_error(jnp.where(finite, lse, 0), jnp.where(finite, wanted[1], 0)) < 1e-5


@pytest.mark.parametrize("head_dim, value_dim", kernel.HEAD_DIMS)
def test_lowers(head_dim, value_dim):
    args = [
        jax.ShapeDtypeStruct((2, 1000, n, w), jnp.bfloat16) for n, w in ((4, head_dim), (2, head_dim), (2, value_dim))
    ]
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda *args: kernel.flash_attention(*args)[:2])
    lowered = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(*args)
    assert [out.shape for out in lowered.out_avals] == [(2, 1000, 4, value_dim), (2, 1000, 4)]


def test_rows_of_the_architectures():
    site = dispatch.OpSite(op="flash_attention", args=cases.site(8, 8, 128, 128))
    for name, row in (("a100", "sm80/mma"), ("rtx-4090", "sm89/mma"), ("b200", "sm100"), ("rtx-5090", "sm120/mma")):
        assert str(dispatch.select(site, TARGETS[name])) == f"mosaic_gpu/{row}"
    assert str(dispatch.select(site, TARGETS["h100"])) == "mosaic_gpu/sm90"


def test_supports_says_why():
    assert kernel.supports({"head_dim": 128, "dtype": "bfloat16"}, ADA) is None
    assert "it has (64, 64), (128, 128)" in kernel.supports({"head_dim": 256}, ADA)
    assert "float32" in kernel.supports({"head_dim": 128, "dtype": "float32"}, ADA)
    with pytest.raises(LoweringError, match="mosaic_gpu/mma"):
        kernel.flash_attention(*(jnp.zeros((1, 8, 1, 256), jnp.bfloat16),) * 3)
