"""The Blackwell kernel of `paged_decode` and `ragged_paged_attention`: interpreted with races looked for, assembled up to the
assembler, borders of masks and steps of units, packed codes, what it declines."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx.bench.cases import paged_decode as decodes
from optx.bench.cases import ragged_paged_attention as chunks
from optx.bench.cases import registry
from optx.errors import LoweringError
from optx.formats import Affine, Float8, Float8Static, Int
from optx.pallas.attention import inner_sm100
from optx.pallas.attention.page_formats import Pages, pages_of
from optx.pallas.attention.reference import Mask
from optx.pallas.flash_attention import mosaic_gpu_sm100 as flash
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm100 as kernel
from optx.tensor import dense, is_qtensor, quantize

B200 = types.SimpleNamespace(platform="gpu", arch="sm100")
TINY = {"heads": 4, "kv_heads": 1, "head_dim": 64, "page_size": 64}
APART = Mask(window=40, sinks=7, lag=9, skip=5)
INTERPRETED = [
    (decodes.case("plain", [300, 0, 129], **TINY), 1),
    (
        decodes.case(
            "window", [400, 17], **TINY, mask=Mask(window=20, sinks=2), gaps=True, softcap=20.0, sink_logits=True
        ),
        2,
    ),
    (
        decodes.case(
            "lists", [270, 3], **{**TINY, "kv_heads": 2}, queries=2, asked=[2, 1], dtype="float16", lists=2, gaps=True
        ),
        1,
    ),
    (decodes.case("int8", [300, 30], **TINY, mask=APART, format=Int(width=8), gaps=True), 1),
    (
        decodes.case(
            "int4", [200], **{**TINY, "head_dim": 128, "page_size": 128}, format=Int(width=4, symmetric=False)
        ),
        1,
    ),
    (decodes.case("factors", [150, 30], **TINY, logit_scale=True, softcap=20.0, format=Int(width=8)), 1),
    (decodes.case("static", [70], **TINY, logit_scale=True, format=Float8Static()), 1),
    (chunks.case("chunks", [70, 0, 5], [30, 0, 150], **TINY, padding=3), 2),
]


def pages_in(pool) -> Pages:
    return pages_of(pool.format if is_qtensor(pool) else None)


@pytest.mark.parametrize("case, parts", INTERPRETED, ids=lambda x: getattr(x, "name", None))
def test_interpreted(case, parts):
    args, kwargs = case.make(np.random.default_rng(0))
    tiles = kernel.tiles_for(args[0].shape[-1], pages_in(args[1]), 1, 2, case.op == "paged_decode")
    tiles = dataclasses.replace(tiles, stages=1 if is_qtensor(args[1]) else 2, parts=parts, interpreted=True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(getattr(kernel, case.op)(*args, **kwargs, tiles=tiles))
    assert not gpu_callbacks.get_races().races_found
    errors = registry.errors(case, found, registry.reference(case.op, args, kwargs), kwargs)
    assert found[2] is None and max(errors) < case.tolerance


MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(window=1),
    Mask(window=0, sinks=4),
    Mask(window=90, sinks=4),
    Mask(lag=0, skip=4),
    APART,
]
MASKS += [Mask(lag=50, skip=9, block=32), Mask(window=50, sinks=9, block=32)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("op", ["paged_decode", "ragged_paged_attention"])
def test_steps_and_borders_hold_what_is_seen(op, mask):
    """The table of units against the mask by positions: a token is in one unit and sees what it should, in steps that are met."""
    rng = np.random.default_rng(0)
    if op == "paged_decode":
        _, kwargs = decodes.batch(rng, [700, 0, 1, 260], **TINY, queries=2, asked=[2, 0, 1, 1], gaps=True, mask=mask)
        asked = kwargs["q_positions"].reshape(-1)
        ragged = dataclasses.replace(kernel.Ragged.dense(4, 2), positions=asked)
        newest = jnp.max(kwargs["q_positions"], axis=1)
    else:
        args = rng, [70, 1, 0, 5], [300, 200, 0, 2]
        _, kwargs = chunks.batch(*args, **TINY, dtype="bfloat16", gaps=True, mask=mask)
        ragged = kwargs["ragged"]
        asked, newest = ragged.positions, ragged.positions[jnp.maximum(ragged.starts + ragged.counts - 1, 0)]
    table, lengths, positions = kwargs["table"], kwargs["lengths"], kwargs["positions"]
    longest = ragged.longest if ragged.rectangular else None
    tiles = kernel.tiles_for(64, Pages(code="dense"), 1, 1, longest is not None)
    plan = kernel.Plan(
        heads=4, kv_heads=1, head_dim=64, page=64, lists=1, tokens=len(asked), batch=4, longest=longest, mask=mask, scale=1.0,
        softcap=None, k=Pages(code="dense"), v=Pages(code="dense"), tiles=tiles,
    )  # fmt: skip
    units = kernel.units_of(plan, ragged)
    lo, hi, hidden, sunk = kernel.borders(plan, units, asked[units.token], newest, positions, table, lengths)
    facts = np.asarray(kernel.facts_of(plan, units, lengths[:, units.row], lo, hi, hidden, sunk))[0]
    slot = np.arange(table.shape[2] * 64)
    at = np.asarray(positions)[np.asarray(table)[0]].reshape(4, -1)
    tokens = np.flatnonzero(np.asarray(units.real))
    assert sorted(np.asarray(units.token).reshape(-1)[tokens]) == [
        t for t in range(len(asked)) if asked[t] >= 0 and ragged.rows[t] < 4
    ]
    for u, i in np.argwhere(np.asarray(units.real)):
        token, row = int(units.token[u, i]), int(units.row[u])
        assert (int(units.of[0][token]), int(units.of[1][token])) == (u, i)
        wanted = np.asarray(mask(asked[token], at[row])) & (slot < int(lengths[0, row]))
        seen = (slot >= int(lo[0, u, i])) & (slot < int(hi[0, u, i]))
        if mask.window is not None:
            seen |= (slot < int(sunk[0, u])) & (slot >= int(hidden[0, u])) & (slot < int(hi[0, u, i]))
        np.testing.assert_array_equal(seen, wanted)
        ahead, first, steps = (int(facts[u, x]) for x in (kernel.AHEAD, kernel.FIRST, kernel.STEPS))
        blocks = [j if j < ahead else first + j - ahead for j in range(steps)]
        assert set(np.flatnonzero(wanted) // 128) <= set(blocks) and len(set(blocks)) == len(blocks)
        assert wanted[: facts[u, kernel.WHOLE] * 128].all(), "steps whose mask is not asked"


@pytest.mark.parametrize(
    "stored", [Int(width=8), Int(width=8, symmetric=False), Int(width=4), Int(width=4, symmetric=False), Float8()]
)
def test_widened_pages_are_what_is_stored(stored):
    pages = quantize(
        jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 64, 128)), jnp.bfloat16), stored, axis=-1
    )
    plan = types.SimpleNamespace(k=pages_of(stored), lists=1, code=pages_of(stored).code)
    plan.zeros = kernel.Plan.zeros.fget(plan)
    factors = kernel.factors_of(plan, pages, jnp.arange(3)[None, None])
    codes = pages.data.reshape(192, -1)
    scale, zero = (*(x[0, 0, :192] for x in factors), None)[:2]
    wide = jnp.concatenate(kernel.widened(codes, scale, zero, plan.k.bits), axis=1)
    wanted = dense(pages).reshape(192, 128)
    wanted = jnp.concatenate([wanted[:, ::2], wanted[:, 1::2]], axis=1) if plan.k.bits == 4 else wanted
    np.testing.assert_allclose(wide.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2**-8)


LOWERED = ["page16", "fp16_dim256", "all_int4", "int8_zero_page64_dim64", "fp8_page64_dim128", "page64", "head_dim_256"]


@pytest.mark.parametrize(
    "case", [c for c in decodes.CASES + chunks.CASES if c.name in LOWERED], ids=lambda c: f"{c.op}-{c.name}"
)
def test_lowers(case):
    args, kwargs = case.make(np.random.default_rng(0))
    dynamic, static = registry.split(kwargs)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda args, dynamic: getattr(kernel, case.op)(*args, **dynamic, **static)[:2])
    lowered = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(args, dynamic)
    assert lowered.out_avals[0].shape == args[0].shape


def test_registers_are_there():
    """What warpgroups ask for beside each other is what they begin with together: else the last waits for ever."""
    for copying, softmax, widening in kernel.REGISTERS.values():
        groups = 4 if widening else 3
        assert copying + 2 * softmax + widening <= groups * (65536 // (groups * 128) // 8 * 8)
    assert 2 * flash.REGISTERS[0] + flash.REGISTERS[1] <= 3 * 168


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("code", ["dense", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_fit(head_dim, code, few):
    stored = Pages(code=code)
    if kernel._shape_reason(8, 1, head_dim, 64, stored, stored):
        pytest.skip("declined")
    for blocks, steps in ((1, 1), (8, 64), (256, 64), (4000, 800)):
        tiles = kernel.tiles_for(head_dim, stored, blocks, steps, few)
        inner = inner_sm100.Inner(
            tiles=tiles.tiles,
            stages=tiles.stages,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=1.0,
            shared=tiles.shared,
        )
        assert inner_sm100.columns(inner) <= 512 and 1 <= tiles.parts <= max(1, steps)
        raw = tiles.raw * 128 * (head_dim * stored.bits // 4 + 16)
        assert inner_sm100.shared_bytes(inner) + raw <= inner_sm100.SHARED and (tiles.raw > 0) == (code != "dense")
        assert code != "dense" or tiles.stages % tiles.tiles == 0, "one tile cleans a slot"


SHAPE = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 64}


def test_supports_says_why():
    def ask(**more):
        return kernel.supports(decodes.site(**SHAPE | more), B200)

    assert ask() is None and ask(format=Int(width=4)) is None and ask(format=Float8()) is None
    assert "head_dim 80" in ask(head_dim=80) and "page size 256" in ask(page_size=256)
    assert "int2" in ask(format=Int(width=2)) and "scales not a token's alone" in ask(format=Affine(width=4))
    assert "int8 of 256 numbers" in ask(head_dim=256, format=Int(width=8))
    assert ask(logit_scale=True, format=Int(width=8)) is None and "no factor" in ask(logit_scale=True)
    site = decodes.site(**SHAPE, format=Int(width=8)) | {"logit_scales": 6}
    assert "6 scales of logits a token over 2" in kernel.supports(site, B200)
    args, kwargs = INTERPRETED[0][0].make(np.random.default_rng(0))
    with pytest.raises(LoweringError, match="no scores"):
        kernel.paged_decode(*args, **kwargs, want_scores=True)
    with pytest.raises(LoweringError, match="over dense pages"):
        kernel.paged_decode(*args, **kwargs, logit_scale=jnp.ones(args[1].shape[:3]))
    with pytest.raises(LoweringError, match="all bfloat16"):
        kernel.paged_decode(args[0].astype(jnp.float32), *args[1:], **kwargs)
