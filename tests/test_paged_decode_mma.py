"""`paged_decode` by warps' matrix instructions: interpreted with races looked for, parts and their pages, what it declines."""

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx.bench.cases import paged_decode as cases
from optx.bench.cases import registry
from optx.errors import LoweringError
from optx.formats import Int
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask
from optx.pallas.paged_decode import mosaic_gpu_mma as kernel
from optx.target import TARGETS

B200 = types.SimpleNamespace(platform="gpu", arch="sm100")
LOGIT_SCALE = cases.case("logit_scale", [70, 3], **cases.TINY, logit_scale=True, queries=2)
WIDE = cases.case("wide", [100, 40], **{**cases.TINY, "head_dim": 128, "page_size": 32, "heads": 20})
SMALL = [case for case in cases.CASES if case.small and kernel.supports(case.site, B200) is None]
SMALL = [case for case in SMALL if not case.site.get("want_scores")] + [LOGIT_SCALE, WIDE]


def interpreted(case, parts=2, seed=0):
    args, kwargs = case.make(np.random.default_rng(seed))
    tiles = kernel.Tiles(parts=parts, stages=2, interpreted=True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(kernel.paged_decode(*args, **kwargs, tiles=tiles))
    assert not gpu_callbacks.get_races().races_found
    return found, registry.errors(case, found, registry.reference(case.op, args, kwargs), kwargs)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(case):
    found, errors = interpreted(case)
    assert found[2] is None and max(errors) < case.tolerance


def test_parts_do_not_matter():
    case = next(case for case in SMALL if case.name == "small_window")
    (once, lse, _), _ = interpreted(case, parts=1)
    (cut, lse_cut, _), errors = interpreted(case, parts=5)
    real = np.asarray(case.make(np.random.default_rng(0))[1]["q_positions"]) >= 0
    assert max(errors) < case.tolerance
    np.testing.assert_allclose(once[real], cut[real], atol=2e-2)
    np.testing.assert_allclose(lse[real], lse_cut[real], rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_parts_read_every_page_once(parts):
    for length in (0, 1, 63, 64, 65, 1000):
        pages = -(-length // 64)
        counts = [int(kernel.pages_of_part(length, part, parts, 64)) for part in range(parts)]
        read = sorted(part + i * parts for part, count in enumerate(counts) for i in range(count))
        assert read == list(range(pages))


@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("page, head_dim", [(64, 128), (128, 128), (16, 64), (32, 256), (64, 256)])
def test_tiles_fit(major, page, head_dim):
    tiles = kernel.tiles_for(32, 8, 1, 128, page, head_dim, major)
    most = 99 << 10 if major in (8, 12) else 227 << 10
    assert tiles.stages >= 1 and tiles.stages * 4 * page * head_dim + kernel.ROWS * page * 2 + 1024 <= most
    assert 1 <= tiles.parts <= 128 and tiles.tma == (major >= 9)


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.name in ("page64", "group16", "fp16_dim256")])
def test_lowers(case):
    args, kwargs = case.make(np.random.default_rng(0))
    dynamic, static = registry.split(kwargs)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda args, dynamic: kernel.paged_decode(*args, **dynamic, **static)[:2])
    lowered = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(args, dynamic)
    assert lowered.out_avals[0].shape == args[0].shape


def test_rows_of_the_architectures(monkeypatch):
    site = dispatch.OpSite(op="paged_decode", args=cases.site(32, 8, 128, 64))
    for name, row in (("a100", "sm80"), ("rtx-4090", "sm89"), ("rtx-5090", "sm120")):
        choice = dispatch.select(site, TARGETS[name])
        assert str(choice) == f"mosaic_gpu/{row}/mma" and dispatch.NEVER_RUN in choice.note
    assert str(dispatch.select(site, TARGETS["h100"])) == "mosaic_gpu/sm90"
    assert str(dispatch.select(site, TARGETS["b200"])) == "mosaic_gpu/sm100"
    row = next(row for row in dispatch.rows("paged_decode") if row.name == "mosaic_gpu/sm90/mma")
    assert row in registry.kernels(SMALL[0], TARGETS["h100"]), "`verify_gpu` runs it there"
    only = [row, dispatch.rows("paged_decode")[-1]]
    monkeypatch.setattr(dispatch, "ROWS", tuple(only))
    assert str(dispatch.select(site, TARGETS["h100"])) == "xla", "never chosen by itself where it is only compared"


def test_supports_says_why():
    def ask(**more):
        shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 64} | more
        return kernel.supports(cases.site(**shape), B200)

    assert ask() is None
    assert "16-bit numbers" in ask(format=Int(width=8))
    assert "head_dim 80" in ask(head_dim=80) and "page size 256" in ask(page_size=256)
    assert "by blocks" in ask(mask=Mask(window=9, sinks=5, block=8))
    old = types.SimpleNamespace(platform="gpu", arch="sm80")
    assert "cp.async" in kernel.supports(cases.site(8, 2, 64, 16), old)
    args, kwargs = SMALL[0].make(np.random.default_rng(0))
    with pytest.raises(LoweringError, match="no scores"):
        kernel.paged_decode(*args, **kwargs, want_scores=True)
    with pytest.raises(LoweringError, match="all bfloat16"):
        kernel.paged_decode(args[0].astype(jnp.float32), *args[1:], **kwargs)
