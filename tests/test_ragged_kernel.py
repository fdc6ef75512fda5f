"""The Hopper kernel of `ragged_paged_attention`: interpreted on small cases, lowered for CUDA, and what it refuses."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx.bench.cases import ragged_paged_attention as cases
from optx.bench.timing import relative_error
from optx.formats import Int
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm90 as kernel

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = [case for case in cases.CASES if case.small]
LOWERED = [case for case in cases.CASES if case.name in ("page16", "window", "head_dim_256", "lists_by_head")]
name = lambda case: case.name  # noqa: E731


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        tiles = kernel.Tiles(block_kv=64, stages=2)
        found = kernel.ragged_paged_attention(*args, **kwargs, _tiles=tiles, _interpretable=True)
    wanted = reference.ragged_paged_attention(*(x.astype(jnp.float32) for x in args), **kwargs)
    for x, y in zip(case.pick(found, kwargs), case.pick(wanted, kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance


@pytest.mark.parametrize("case", LOWERED, ids=name)
def test_lowers_for_cuda(case):
    args, kwargs = case.make(np.random.default_rng(0))
    static = {key: kwargs.pop(key) for key in ("mask", "softcap") if key in kwargs}
    run = jax.jit(lambda args, kwargs: kernel.ragged_paged_attention(*args, **kwargs, **static)[:2])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(args, kwargs)
    assert [x.shape for x in exported.out_avals] == [args[0].shape, args[0].shape[:2]]


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_supports_its_cases(case):
    assert kernel.supports(case.site, HOPPER) is None


SITE = cases.site(8, 2, 128)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"head_dim": 80}, "80"),
        ({"heads": 130, "kv_heads": 2}, "at most 64"),
        ({"value_dim": 64}, "as wide as keys"),
        ({"cache": SITE["cache"].replace(dtype="float32")}, "float32"),
        ({"cache": SITE["cache"].replace(format=Int(width=3))}, "int3"),
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
        ({"want_scores": True}, "want_scores"),
        ({"logit_scale": 1.0}, "logit_scale"),
        ({"value_dim": 32}, "value_dim"),
        ({"sink_logits": jnp.zeros(3)}, "sink_logits"),
        ({"lengths": jnp.zeros((1, 9), jnp.int32)}, "lengths"),
        ({"table": jnp.zeros((3, 4, 5), jnp.int32)}, "table"),
        ({"v_pool": None}, "v_pool"),
        ({"q": jnp.zeros((13, 8, 64), jnp.float32)}, "q float32"),
    ],
)
def test_refuses(change, argument):
    (q, k_pool, v_pool), kwargs = SMALL[0].make(np.random.default_rng(0))
    given = {"q": q, "k_pool": k_pool, "v_pool": v_pool, **kwargs, "mask": Mask(), **change}
    with pytest.raises(ValueError, match=f"ragged_paged_attention.*{argument}"):
        kernel.ragged_paged_attention(given.pop("q"), given.pop("k_pool"), given.pop("v_pool"), **given)
