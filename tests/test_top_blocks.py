"""The Hopper kernel of `top_blocks`: its program thread by thread, lowered for CUDA; the reference against NumPy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import Lanes

from optx.bench.cases import top_blocks as cases
from optx.pallas.top_blocks import mosaic_gpu_sm90 as kernel
from optx.pallas.top_blocks import reference

SMALL = [case for case in cases.CASES if case.small]
name = lambda case: case.name  # noqa: E731


def on_threads(scores, count):
    """The kernel's program on numpy arrays: what its launch would do."""
    plan = kernel.Plan(rows=scores.shape[0], blocks=scores.shape[1], count=count)
    padded = np.pad(np.array(scores), ((0, 0), (0, plan.width - plan.blocks)), constant_values=-np.inf)
    out = np.full((plan.rows, count), -1, np.int32)
    sums = np.full((plan.rows, 2 * plan.warps), np.nan, np.float32)
    kernel._program(Lanes(plan.rows, [out], plan.threads), plan, padded, out, sums)
    return out


def literal(scores, count):
    """Row by row."""
    found = []
    for row in np.asarray(scores):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        found.append(sorted(i if row[i] > -np.inf else len(row) for i in best))
    return np.array(found)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_equals_a_sort(case):
    (scores,), kwargs = case.make(np.random.default_rng(0))
    wanted = literal(scores, **kwargs)
    assert np.array_equal(reference.top_blocks(scores, **kwargs), wanted)
    assert np.array_equal(on_threads(scores, **kwargs), wanted)


def test_orders_all_floats():
    """Signs, both zeros, numbers without an exponent, infinities."""
    numbers = np.float32([-np.inf, -3e38, -1, -1e-42, -0.0, 0.0, 1e-42, 1, 3e38, np.inf])
    scores = np.random.default_rng(0).permuted(np.tile(numbers, (20, 4)), axis=1)
    for count in (1, 17, 40):
        assert np.array_equal(on_threads(scores, count), literal(scores, count))


@pytest.mark.parametrize("case", SMALL[:1], ids=name)
def test_lowers_for_cuda(case):
    (scores,), kwargs = case.make(np.random.default_rng(0))
    run = jax.jit(lambda scores: kernel.top_blocks(scores, **kwargs))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(scores)
    assert [x.shape for x in exported.out_avals] == [(len(scores), kwargs["count"])]


def test_more_scores_than_a_block_of_threads_takes():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((1, kernel.MOST + 1)), jnp.float32)
    assert np.array_equal(kernel.top_blocks(scores, count=9), reference.top_blocks(scores, count=9))
