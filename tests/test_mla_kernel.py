"""The Hopper kernels over MLA latents: interpreted on small cases, lowered for CUDA, and what they refuse."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx.bench.cases import mla as cases
from optx.bench.cases import registry
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.formats import Int
from optx.pallas.attention import reference
from optx.pallas.mla import lists_sm90
from optx.pallas.mla import mosaic_gpu_sm90 as kernel

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
REFERENCE = {cases.DECODE: reference.paged_attention, cases.RAGGED: reference.ragged_paged_attention}
SMALL = [case for case in cases.CASES if case.small]
LOWERED = [
    case for case in cases.CASES if case.name in ("mla_tokens4", "mla_page128", "mla_mixed_window", "mla_head_scaled")
]
name = lambda case: case.name  # noqa: E731


def interpreted(case, args, kwargs, **sizes):
    tiles = kernel.Tiles(**{"tokens": 4, "heads": 8, "splits": 1, "registers": False, **sizes})
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return getattr(module_of(case), case.op)(*args, **kwargs, tiles=tiles)


def module_of(case):
    return lists_sm90 if case.site["selected"] else kernel


def wanted(case, args, kwargs):
    return REFERENCE[case.op](*registry.in_float32(args), **kwargs)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    found = interpreted(case, args, kwargs)
    for x, y in zip(case.pick(found, kwargs), case.pick(wanted(case, args, kwargs), kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance


def test_splits_and_clusters_twice():
    """Two blocks of heads share their copies, two programs share a row; twice the same bits."""
    case = SMALL[0]
    sizes = {"queries": 1, "heads": 16, "rank": 64, "rope": 64, "page_size": 32}
    args, kwargs = cases.decode(np.random.default_rng(0), [270, 0], **sizes)
    found, again = (interpreted(case, args, kwargs, tokens=1, splits=2, cluster=True) for _ in range(2))
    for x, y, z in zip(found[:2], wanted(case, args, kwargs)[:2], again[:2], strict=True):
        assert relative_error(x, y) < case.tolerance
        assert jnp.array_equal(x, z)


@pytest.mark.parametrize("case", LOWERED, ids=name)
def test_lowers_for_cuda(case):
    args, kwargs = case.make(np.random.default_rng(0))
    static = {key: kwargs.pop(key) for key in ("mask", "softcap", "value_dim") if key in kwargs}
    run = jax.jit(lambda args, kwargs: getattr(module_of(case), case.op)(*args, **kwargs, **static)[:2])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(args, kwargs)
    q = args[0]
    assert [x.shape for x in exported.out_avals] == [(*q.shape[:-1], static["value_dim"]), q.shape[:-1]]


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_supports_its_cases(case):
    assert module_of(case).supports(case.site, HOPPER) is None


def test_lists_that_are_declined():
    """Whole contexts, scales beside sinks, and what the kernel over latents declines."""
    site = {**cases.site(32, 192, 64, scaled=8), "selected": True}
    assert lists_sm90.supports(site, HOPPER) is None
    assert "whole contexts" in lists_sm90.supports({**site, "selected": False}, HOPPER)
    assert "8 scales" in lists_sm90.supports({**site, "sink_logits": True}, HOPPER)
    assert "100 + 156" in lists_sm90.supports({**site, "value_dim": 100}, HOPPER)


SITE = cases.site(16, 512, 64)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"heads": 12}, "12 heads"),
        ({"kv_heads": 2}, "one latent head"),
        ({"value_dim": None}, "value_dim"),
        ({"value_dim": 100}, "100 + 476"),
        ({"page_size": 8}, "page size 8"),
        ({"want_scores": True}, "scores"),
        ({"cache": SITE["cache"].replace(dtype="float32")}, "float32"),
        ({"cache": SITE["cache"].replace(format=Int(width=8))}, "int8"),
        ({"cache": dataclasses.replace(SITE["cache"], kind="paged")}, "paged"),
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
        ({"want_scores": True}, "want_scores"),
        ({"value_dim": None}, "value_dim"),
        ({"logit_scale": jnp.zeros(3)}, "logit_scale"),
        ({"sink_logits": jnp.zeros(3)}, "sink_logits"),
        ({"lengths": jnp.zeros((1, 9), jnp.int32)}, "lengths"),
        ({"table": jnp.zeros((2, 4, 5), jnp.int32)}, "table"),
        ({"q_positions": jnp.zeros((4, 2), jnp.int32)}, "q_positions"),
        ({"v_pool": jnp.zeros((3, 1, 32, 128), jnp.bfloat16)}, "v_pool"),
        ({"q": jnp.zeros((4, 1, 12, 192), jnp.bfloat16)}, "heads 12"),
        ({"q": jnp.zeros((4, 1, 8, 192), jnp.float32)}, "dtypes q float32"),
        ({"q": jnp.zeros((4, 9, 8, 192), jnp.bfloat16)}, "q bfloat16"),
    ],
)
def test_refuses(change, argument):
    (q, k_pool, v_pool), kwargs = SMALL[0].make(np.random.default_rng(0))
    given = {"q": q, "k_pool": k_pool, "v_pool": v_pool, **kwargs, **change}
    with pytest.raises(LoweringError, match=f"paged_decode.*{argument}"):
        kernel.paged_decode(given.pop("q"), given.pop("k_pool"), given.pop("v_pool"), **given)
