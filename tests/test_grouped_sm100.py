"""`grouped_matmul` on Blackwell: interpreted with races looked for, tiles of one expert each, what it declines."""

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx.bench.cases import grouped_matmul as cases
from optx.bench.timing import relative_error
from optx.pallas.grouped_matmul import mosaic_gpu_sm100 as kernel
from optx.pallas.grouped_matmul import reference
from optx.pallas.matmul import gemm_sm100 as gemm

B200 = types.SimpleNamespace(platform="gpu", arch="sm100")


@pytest.mark.parametrize("sizes, rows", [((20, 0, 3), 30), ((0, 0, 0), 9), ((1, 40, 0), 41)], ids=str)
def test_interpreted(sizes, rows):
    """Experts of several tiles, of none; rows of no expert, which hold NaN and give 0; no tile at all."""
    args, _ = cases.batch(np.random.default_rng(0), rows, 3, 128, 256, routing=cases.listed(*sizes), rows=sum(sizes))
    tiles = gemm.Tiles(rows=16, depth=64, stages=2, grid=2, clip=False)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(kernel.grouped_matmul(*args, tiles=tiles))
    assert not gpu_callbacks.get_races().races_found
    wanted = reference.grouped_matmul(args[0].astype(jnp.float32), args[1].astype(jnp.float32), args[2])
    assert found.dtype == jnp.bfloat16 and not np.asarray(found, np.float32)[sum(sizes) :].any()
    assert relative_error(found.astype(jnp.float32), wanted) < 5e-3 or not sum(sizes)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_hold_every_row_once(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(100, np.ones(7) / 7) * (rng.random(7) < 0.7)
    made = kernel.cut(jnp.asarray(sizes), 110, 16)
    live, experts = int(made.experts[0]), np.asarray(made.experts[1:])
    assert live == sum(-(-n // 16) for n in sizes) <= len(experts)
    owner = np.repeat(np.arange(7), sizes)
    source = np.asarray(made.source)
    assert sorted(source[source < 110]) == list(range(sizes.sum()))
    for tile in range(live):
        assert (owner[source[tile][source[tile] < 110]] == experts[tile]).all()
    flat = source.reshape(-1)
    assert (flat[np.asarray(made.place)[: sizes.sum()]] == np.arange(sizes.sum())).all()
    assert (np.asarray(made.place)[sizes.sum() :] == flat.size).all()


def test_supports_says_why():
    ask = lambda **more: kernel.supports(cases.site(8, **({"d": 256, "f": 256} | more)), B200)  # noqa: E731
    assert ask() is None
    assert "allowed: dense" in ask(format="int8") and "allowed: bfloat16" in ask(dtype="float16")
    assert "F of 128" in ask(f=192)
