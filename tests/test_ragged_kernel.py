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
from optx.cache import Ragged
from optx.errors import LoweringError
from optx.formats import Int
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm90 as kernel
from optx.pallas.ragged_paged_attention import scored_sm90 as scored

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = [case for case in cases.CASES if case.small and not case.site["want_scores"]]
SCORED = [case for case in cases.CASES if case.small and case.site["want_scores"]]
LOWERED = [case for case in cases.CASES if case.name in ("page64", "window_int4", "blocks_int8", "newest")]
SMS = 4  # few, so that one computes several units, and enough to cut one
name = lambda case: case.name  # noqa: E731


def interpreted(args, kwargs, **changes):
    packed = hasattr(args[1], "scale")
    tiles = kernel.tiles(args[0].shape[-1], "int8" if packed else "dense")
    tiles = dataclasses.replace(tiles, interpretable=True, sms=SMS, stages=2, **changes)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return kernel.ragged_paged_attention(*args, **kwargs, tiles=tiles)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_interpreted(case):
    args, kwargs = case.make(np.random.default_rng(0))
    found = case.pick(interpreted(args, kwargs), kwargs)
    wanted = reference.ragged_paged_attention(*cases.in_float32(args), **kwargs)
    for x, y in zip(found, case.pick(wanted, kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance
    if case.name == "small":
        for x, y in zip(case.pick(interpreted(args, kwargs), kwargs), found, strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("case", SCORED, ids=name)
def test_scores(monkeypatch, case):
    """Outputs of the kernel, scores of its lse; what nobody attends to, and rows without a query that counts, have zeros."""
    args, kwargs = case.make(np.random.default_rng(0))
    monkeypatch.setattr(
        scored, "kernel", types.SimpleNamespace(ragged_paged_attention=lambda *a, **k: interpreted(a, k))
    )
    found = jax.jit(lambda *args: scored.ragged_paged_attention(*args, **kwargs))(*args)
    wanted = reference.ragged_paged_attention(*cases.in_float32(args), **kwargs)
    for x, y in zip(case.pick(found, kwargs), case.pick(wanted, kwargs), strict=True):
        assert relative_error(x, y) < case.tolerance
    counts = np.asarray(kwargs["ragged"].counts)
    assert (np.asarray(wanted[2]).any(axis=(1, 2)) == (counts > 1 if "prompts" in kwargs else counts > 0)).all()
    np.testing.assert_array_equal(np.asarray(found[2]) == 0, np.asarray(wanted[2]) == 0)
    assert scored.ragged_paged_attention(*args, **kwargs | {"want_scores": False})[2] is None


def test_whole_units_sum_each_sequence_in_its_own_order():
    """Bit for bit what a row gives with fewer rows beside it."""
    (q, k_pool, v_pool), kwargs = SMALL[0].make(np.random.default_rng(0))
    ragged = kwargs["ragged"]
    together = interpreted((q, k_pool, v_pool), kwargs, whole=True)
    for row in np.flatnonzero(np.asarray(ragged.counts) > 0):
        others = jnp.arange(ragged.batch) != row
        alone = interpreted((q, k_pool, v_pool), kwargs | {"ragged": ragged.without(others)}, whole=True)
        mine = np.asarray(ragged.rows) == row
        for x, y in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32)[mine], np.asarray(y, np.float32)[mine])


@pytest.mark.parametrize("case", LOWERED, ids=name)
def test_lowers_for_cuda(case):
    args, kwargs = case.make(np.random.default_rng(0))
    static = {key: kwargs.pop(key) for key in ("mask", "softcap") if key in kwargs}
    run = jax.jit(lambda args, kwargs: kernel.ragged_paged_attention(*args, **kwargs, **static)[:2])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(args, kwargs)
    assert [x.shape for x in exported.out_avals] == [args[0].shape, args[0].shape[:2]]


def scheduled(counts, lengths, **changes):
    """Units and cuts of a call with 8 query heads over 2 kv heads of 128, blocks of 128 tokens."""
    counts, lengths = np.array(counts), np.array([lengths])
    tokens, width = int(counts.sum()) + 3, -(-int(lengths.max()) // 16)
    rows = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(3, len(counts))])
    ragged = Ragged(
        rows=jnp.asarray(rows, jnp.int32),
        starts=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        positions=jnp.zeros(tokens, jnp.int32),
        longest=int(counts.max()),
    )
    shape = jax.ShapeDtypeStruct
    q, pool = shape((tokens, 8, 128), jnp.bfloat16), shape((width + 1, 2, 16, 128), jnp.bfloat16)
    table = shape((1, len(counts), width), jnp.int32)
    plan = kernel._plan(q, pool, pool, ragged, table, Mask(), None, None, None, None, kernel.Tiles(**changes))
    units, cuts, where = kernel._schedule(plan, ragged, jnp.asarray(lengths, jnp.int32))
    return plan, ragged, np.asarray(units), np.asarray(cuts), np.asarray(where)


@pytest.mark.parametrize("sms", [1, 5, 132])
@pytest.mark.parametrize(
    "counts, lengths",
    [
        ([40, 1, 1, 130, 0, 17], [140, 71, 301, 643, 0, 17]),
        ([1, 1, 1], [1, 5000, 129]),
        ([0, 700], [0, 4000]),
        ([2048], [30000]),
        ([0, 0], [0, 0]),
    ],
)
def test_schedule_gives_every_step_to_one_part(counts, lengths, sms):
    plan, ragged, units, cuts, where = scheduled(counts, lengths, sms=sms)
    real = [u for u in range(plan.units) if units[u, kernel.STEPS] > 0]
    heads = {0, 1} if sum(counts) else set()
    seen = {(t, h) for u in real for h in [units[u, kernel.HEAD]] for t in range(*_tokens(units[u]))}
    assert seen == {(t, h) for t in range(sum(counts)) for h in heads}
    done, first, last = {}, {}, {}
    for part in range(sms):
        (unit, step, before, whole, waves, inside), (stop, stop_step, after, *_) = cuts[part], cuts[part + 1]
        mine = [int(kernel._in_wave(whole, wave, part, sms)) for wave in range(waves)]
        assert inside == sum(units[u, kernel.STEPS] for u in mine)
        for u in mine:
            assert u >= whole and u not in done and units[u, kernel.FROM] == units[u, kernel.UPTO]  # nothing to merge
            done[u], first[u] = list(range(units[u, kernel.STEPS])), units[u, kernel.FROM]
            last[u] = first[u]
        steps = 0
        while (unit, step) < (stop, stop_step):
            assert unit < whole
            end = stop_step if unit == stop else units[unit, kernel.STEPS]
            done[unit] = [*done.get(unit, []), *range(step, end)]
            first.setdefault(unit, part)
            last[unit] = part
            steps, unit, step = steps + end - step, unit + 1, 0
        assert steps == after - before
    assert done == {u: list(range(units[u, kernel.STEPS])) for u in real}
    assert all((units[u, kernel.FROM], units[u, kernel.UPTO]) == (first[u], last[u]) for u in real)
    rows = where[: sum(counts)].ravel()
    assert len(set(rows)) == len(rows)  # every token and head has a row of its own


def _tokens(unit):
    return unit[kernel.TOKEN], unit[kernel.TOKEN] + unit[kernel.NUMBER]


def test_parts_cost_alike():
    _, _, units, cuts, _ = scheduled([2048] + [1] * 64, [8192] + [8192] * 64)
    steps = np.diff(cuts[:, 2])
    decodes = cuts[:-1, 0] < 2 * 64
    assert steps[decodes].max() - steps[decodes].min() <= 4
    assert 20 < decodes.sum() < 80  # a share of the SMs streams pages while the others multiply


def test_long_contexts_go_in_waves():
    _, _, _, cuts, _ = scheduled([2048], [30000])
    assert cuts[0, 4] == 0  # 64 tiles of 2 heads: less than a wave of 132
    _, _, units, cuts, _ = scheduled([4096], [30000])
    assert cuts[0, 4] == 1 and cuts[0, 3] == (units[:, kernel.STEPS] > 0).sum() - 132
    for counts, lengths in (([4096], [4096]), ([4096, 1], [30000, 30000])):  # tiles that differ; decodes
        assert scheduled(counts, lengths)[3][0, 4] == 0


@pytest.mark.parametrize("case", cases.CASES, ids=name)
def test_supports_its_cases(case):
    row = scored if case.site["want_scores"] else kernel
    assert row.supports(case.site, HOPPER) is None
    assert (scored if row is kernel else kernel).supports(case.site, HOPPER) is not None


SITE = cases.site(8, 2, 128)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"head_dim": 80}, "80"),
        ({"heads": 40, "kv_heads": 2}, "at most 16"),
        ({"value_dim": 64}, "as wide as keys"),
        ({"page_size": 8}, "not 8"),
        ({"want_scores": True}, "scores"),
        ({"cache": SITE["cache"].replace(dtype="float32")}, "float32"),
        ({"cache": SITE["cache"].replace(format=Int(width=8, group=32))}, "int8_g32"),
        ({"cache": SITE["cache"].replace(format=Int(width=8, group=64))}, "int8_g64"),
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
        ({"logit_scale": jnp.zeros((3, 1, 8))}, "logit_scale"),
        ({"value_dim": 32}, "value_dim"),
        ({"sink_logits": jnp.zeros(3)}, "sink_logits"),
        ({"lengths": jnp.zeros((1, 9), jnp.int32)}, "lengths"),
        ({"table": jnp.zeros((3, 4, 5), jnp.int32)}, "table"),
        ({"v_pool": None}, "v_pool"),
        ({"q": jnp.zeros((13, 8, 64), jnp.float32)}, "q float32"),
        ({"q": jnp.zeros((12, 8, 64), jnp.bfloat16)}, "ragged of 13 tokens"),
    ],
)
def test_refuses(change, argument):
    (q, k_pool, v_pool), kwargs = SMALL[0].make(np.random.default_rng(0))
    given = {"q": q, "k_pool": k_pool, "v_pool": v_pool, **kwargs, "mask": Mask(), **change}
    with pytest.raises(LoweringError, match=f"ragged_paged_attention.*{argument}"):
        kernel.ragged_paged_attention(given.pop("q"), given.pop("k_pool"), given.pop("v_pool"), **given)
