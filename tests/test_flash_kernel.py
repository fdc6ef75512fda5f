"""The Hopper kernel of `flash_attention`: interpreted on small cases, lowered for CUDA, its gradient, what it refuses."""

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx.bench.cases import flash_attention as cases
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.flash_attention import mosaic_gpu_sm90 as kernel

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = [case for case in cases.CASES if case.small]
LOWERED = [case for case in cases.CASES if case.name in ("hd64_causal", "mla_full", "hd256_everything", "window")]
# What the interpreter can run; few thread blocks, so that one computes several tiles.
TILES = kernel.Tiles(block_kv=64, registers=False, blocks=2)
name = lambda case: case.name  # noqa: E731


def interpreted(args, kwargs, tiles=TILES):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return kernel.flash_attention(*args, **kwargs, tiles=tiles)


def wanted(args, kwargs):
    return reference.flash_attention(*(x.astype(jnp.float32) for x in args), **kwargs)


def close(found, right, case):
    for x, y in zip(case.pick(found, {}), case.pick(right, {}), strict=True):
        assert relative_error(x, y) < case.tolerance


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    close(interpreted(args, kwargs), wanted(args, kwargs), case)


def test_twice_the_same():
    args, kwargs = SMALL[0].make(np.random.default_rng(1))
    once, again = interpreted(args, kwargs), interpreted(args, kwargs)
    assert all(bool(jnp.array_equal(x, y)) for x, y in zip(once[:2], again[:2], strict=True))


def test_gradient():
    """That of the reference, wherever out and lse go."""
    case = SMALL[0]
    args, kwargs = case.make(np.random.default_rng(2))
    args = tuple(x[:, :66] for x in args)

    def loss(function, *args):
        out, lse, _ = function(args, kwargs)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(lse)

    found = jax.grad(lambda *args: loss(interpreted, *args), (0, 1, 2))(*args)
    right = jax.grad(lambda *args: loss(wanted, *args), (0, 1, 2))(*args)
    assert all(relative_error(x, y) < 2e-2 for x, y in zip(found, right, strict=True))


@pytest.mark.parametrize("case", LOWERED, ids=name)
def test_lowers_for_cuda(case):
    args, kwargs = case.make(np.random.default_rng(0))
    static = {key: kwargs.pop(key) for key in ("mask", "softcap") if key in kwargs}
    run = jax.jit(lambda args, kwargs: kernel.flash_attention(*args, **kwargs, **static)[:2])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(args, kwargs)
    q, _, v = args
    assert [x.shape for x in exported.out_avals] == [(*q.shape[:3], v.shape[3]), q.shape[:3]]


def e4m3(length, n, kv_heads, h, value_dim):
    """q, k and v in e4m3 with their scales, and what they stand for."""
    rng = np.random.default_rng(3)
    widths = ((n, h), (kv_heads, h), (kv_heads, value_dim))
    stored = [jnp.asarray(rng.standard_normal((1, length, *width)), jnp.float8_e4m3fn) for width in widths]
    scales = [jnp.asarray(0.5 + rng.random((1, heads)), jnp.float32) for heads, _ in widths]
    meant = [x.astype(jnp.float32) * y[:, None, :, None] for x, y in zip(stored, scales, strict=True)]
    return stored, dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True)), meant


def test_e4m3_interpreted():
    stored, scales, meant = e4m3(100, 2, 1, 64, 64)
    tiles = kernel.Tiles(block_kv=128, registers=False, blocks=2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = kernel.flash_attention_e4m3(*stored, **scales, tiles=tiles)
    right = reference.flash_attention(*meant)
    assert found[0].dtype == jnp.bfloat16
    assert relative_error(found[0], right[0]) < 4e-2  # weights have 4 bits of mantissa
    assert relative_error(found[1], right[1]) < 1e-5


def test_e4m3_lowers_for_cuda():
    stored, scales, _ = e4m3(300, 4, 2, 192, 128)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda stored, scales: kernel.flash_attention_e4m3(*stored, **scales, dtype=jnp.float16)[:2])
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(stored, scales)
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [
        ((1, 300, 4, 128), jnp.float16),
        ((1, 300, 4), jnp.float32),
    ]


def test_e4m3_refuses():
    stored, scales, meant = e4m3(20, 2, 1, 64, 64)
    with pytest.raises(LoweringError, match="k_scale is"):
        kernel.flash_attention_e4m3(*stored, **{**scales, "k_scale": jnp.ones((1, 2))})
    with pytest.raises(LoweringError, match="scale is -1.0"):
        kernel.flash_attention_e4m3(*stored, **scales, scale=-1.0)
    with pytest.raises(LoweringError, match="q's dtype is float32; allowed: float8_e4m3fn"):
        kernel.flash_attention_e4m3(*meant, **scales)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=700, sinks=3)], ids=str)
def test_lists_hold_every_tile_once_and_take_the_same_time(mask):
    tiles = kernel.Tiles(blocks=7)
    rows = kernel.ROWS * tiles.warpgroups
    table = kernel._lists(mask, tiles, 4, 33, 33, 2, tiles.blocks)
    lists = [row[1 : 1 + row[0]] for row in table]
    assert sorted(np.concatenate(lists)) == list(range(4 * 33))
    spans = [kernel._band(mask, tiles, int(tile % 33) * rows, 33) for tile in range(4 * 33)]
    costs = [stop - start + sinks for start, stop, sinks in spans]
    loads = [sum(costs[tile] for tile in row) for row in lists]
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_supports_its_cases(case):
    assert kernel.supports(case.site, HOPPER) is None


SITE = cases.site(8, 2, 128, 128)


@pytest.mark.parametrize(
    "change, reason",
    [({"head_dim": 80}, "(80, 128)"), ({"value_dim": 64}, "(128, 64)"), ({"dtype": "float32"}, "float32")],
)
def test_declines(change, reason):
    assert reason in kernel.supports({**SITE, **change}, HOPPER)


def test_declines_other_chips():
    for platform, arch in (("gpu", "sm100"), ("cpu", "any"), ("tpu", "v6e")):
        assert "sm90" in kernel.supports(SITE, types.SimpleNamespace(platform=platform, arch=arch))


BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"q": jnp.zeros((1, 9, 2, 64), jnp.float32)}, "q's dtype is float32"),
        ({"v": jnp.zeros((1, 9, 1, 64), jnp.float16)}, "v's dtype is float16"),
        ({"k": jnp.zeros((1, 8, 1, 64), BF16)}, "k, v"),
        ({"v": jnp.zeros((1, 9, 1, 32), BF16)}, r"\(H, Hv\) is \(64, 32\)"),
        ({"q": jnp.zeros((9, 2, 64), BF16)}, "q is"),
        ({"sink_logits": jnp.zeros(3)}, "sink_logits"),
        ({"valid": jnp.zeros((1, 8), bool)}, "valid"),
        ({"segments": jnp.zeros((1, 9), jnp.float32)}, "segments"),
    ],
)
def test_refuses(change, argument):
    given = {
        "q": jnp.zeros((1, 9, 2, 64), BF16),
        "k": jnp.zeros((1, 9, 1, 64), BF16),
        "v": jnp.zeros((1, 9, 1, 64), BF16),
    }
    given |= change
    with pytest.raises(LoweringError, match=f"flash_attention.*{argument}"):
        kernel.flash_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
