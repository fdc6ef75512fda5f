"""The Hopper kernel of `compressed_attention`: interpreted on small cases, and which kv heads it reads as one."""

import types

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

from optx.bench.cases import compressed_attention as cases
from optx.bench.cases import registry
from optx.bench.timing import relative_error
from optx.pallas.compressed_attention import mosaic_gpu_sm90 as kernel
from optx.pallas.paged_decode.mosaic_gpu_sm90 import Tiles

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
TILES = Tiles(sms=2, stages=2, registers=False)
name = lambda case: case.name  # noqa: E731


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.small], ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = kernel.compressed_attention(*args, **kwargs, tiles=TILES)
    for x, y in zip(found, registry.reference(case.op, args, kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_taken(case):
    """By the kernel, not by the reference inside it."""
    assert kernel.supports(case.site, HOPPER) is None
    site = case.site
    assert kernel.together(site["page_size"] // site["every"], site["kv_heads"], site["heads"] // site["kv_heads"])


@pytest.mark.parametrize(
    "each, kv_heads, group, heads",
    [(4, 8, 4, 4), (8, 8, 8, 2), (8, 3, 4, None), (1, 8, 4, None), (16, 3, 3, 1), (64, 8, 1, 2)],
)
def test_kv_heads_of_a_copy(each, kv_heads, group, heads):
    assert kernel.together(each, kv_heads, group) == heads


def test_pages_without_a_copy_go_to_the_reference():
    args, kwargs = cases.batch(np.random.default_rng(0), [70], heads=4, kv_heads=1, head_dim=64, page_size=32)
    found = kernel.compressed_attention(*args, **kwargs)
    for x, y in zip(found, registry.reference(cases.OP, args, kwargs), strict=True):
        assert relative_error(x, y) < 5e-3
    reason = kernel.supports(cases.site(4, 1, 64, 32), HOPPER)
    assert reason == "2 entries a page with 4 query heads a kv head: no rows for a copy"
