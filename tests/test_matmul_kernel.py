"""`matmul`, dense weights: the Hopper kernel of few rows interpreted and lowered, rows padded to eight, what is left to XLA."""

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx.bench.cases import matmul as cases
from optx.bench.timing import relative_error
from optx.pallas.late import overlapped
from optx.pallas.matmul import mosaic_gpu_sm90 as kernel
from optx.pallas.matmul import reference, xla_gpu
from optx.pallas.quant_matmul.mosaic_gpu_sm90 import Tiles, _dense, dense_matmul

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")


def inputs(m, d, f):
    (x, w), _ = cases.call(np.random.default_rng(0), m, d, f)
    return x, w, reference.matmul(x.astype(jnp.float32), w.astype(jnp.float32))


@pytest.mark.parametrize(("m", "strips", "share"), [(9, 2, 1), (5, 1, 2)])
def test_interpreted(m, strips, share):
    x, w, wanted = inputs(m, 256, 192)
    tiles = Tiles(rows=16, strips=strips, blocks=1, stages=2, share=share, grid=2, registers=False)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = dense_matmul(x, w, tiles=tiles)
    assert relative_error(found.astype(jnp.float32), wanted) < 5e-3


HERE = {  # (rows, D, F): whether the kernel takes them where kernels wait for each other
    (1, 4096, 4096): True,
    (16, 4096, 4096): True,
    (17, 4096, 4096): False,
    (8, 4096, 24576): True,
    (9, 4096, 24576): False,
    (32, 12288, 4096): True,
    (33, 12288, 4096): False,
    (65, 12288, 4096): False,
}


@pytest.mark.parametrize(("m", "d", "f"), HERE)
def test_lowers_for_hopper(m, d, f):
    """Few rows go by the kernel, more of them where kernels come up early and ask for their weights before."""
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    for run, here in ((kernel.matmul, HERE[m, d, f]), (overlapped(lambda x, w: kernel.matmul(x, w)), m <= 64)):
        lowered = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)
        found = lowered(jax.ShapeDtypeStruct((m, d), jnp.bfloat16), jax.ShapeDtypeStruct((d, f), jnp.bfloat16))
        assert found.out_avals[0].shape == (m, f)
        assert ("@mosaic_gpu_v2" in found.mlir_module()) == here


@pytest.mark.parametrize("rows", [9, 32, 64])
@pytest.mark.parametrize(
    ("d", "f"), [(4096, 24576), (4096, 6144), (12288, 4096), (2048, 4096), (448, 32768), (7168, 18432)]
)
def test_tiles_fit_an_sm(rows, d, f):
    tiles = _dense(rows, d // 64, f // 64)
    stage = (tiles.rows + tiles.strips * 64) * 64 * 2 * tiles.blocks
    assert tiles.stages >= 3 and tiles.stages * stage < 227 << 10
    assert (d // 64) % (tiles.blocks * tiles.parts) == 0 or tiles.parts == 1


def test_few_rows_are_padded_and_cut_off():
    x, w, wanted = inputs(3, 128, 64)
    assert relative_error(xla_gpu.matmul(x, w).astype(jnp.float32), wanted) < 5e-3
    assert xla_gpu.matmul(x[:0], w).shape == (0, 64)
    assert xla_gpu.matmul(x[0], w).shape == (64,)
    assert "8,128" in str(jax.make_jaxpr(xla_gpu.matmul)(x, w)) and "8,128" not in str(
        jax.make_jaxpr(reference.matmul)(x, w)
    )


def test_supports():
    asked = lambda d, f, dtype=jnp.bfloat16: kernel.supports({"weight": jax.ShapeDtypeStruct((d, f), dtype)}, HOPPER)  # noqa: E731
    assert asked(4096, 4096) is None
    assert asked(4096, 4096, jnp.float32) == "x is float32 and w float32; allowed: bfloat16"
    assert "multiples of 64" in asked(4096, 5000)
    assert "XLA is as fast below" in asked(4096, 1024)
