"""kivi: keys by channel over groups of tokens, values by token, the newest tokens exact."""

import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import pipeline, tensor
from optx.errors import FormatError, LegalityError, PassError
from optx.formats import Affine, PerChannel
from optx.passes.kivi import Kivi
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

EXPECTED = "cache=(paged k int4_g4_channel, v int4_g4_affine recent 8 first 1)"


def test_before_expected():
    model = families.abstract("llama")
    planned = optx.plan(model, Recipe(cache=[Kivi(group=4, recent=8, first=1)]))
    before, after = (optx.ir.describe(tree).count("cache=(paged float32)") for tree in (model, planned.tree))
    assert (before, after) == (1, 0) and optx.ir.describe(planned.tree).count(EXPECTED) == 1
    assert planned.records[0].sites == 2


@pytest.mark.parametrize("bits, limit", [(8, 0.01), (4, 0.15), (2, 0.7)])
def test_fewer_bits_cost_more(bits, limit):
    model, tokens = families.concrete("llama"), families.prompt(24)
    made = optx.compile(model, Recipe(cache=[Kivi(bits=bits, group=4, recent=0)], allow=["gqa_kivi2"]))
    error = families.relative(made.logits([tokens])[0], families.oracle(model, tokens))
    assert limit / 30 < error < limit


@pytest.mark.parametrize("format_, axis", [(PerChannel(width=4, group=4), -2), (Affine(width=4, group=4), -1)])
def test_a_group_is_spread_between_its_least_and_its_largest(format_, axis):
    """Against the equation in numpy; an outlier channel far from 0 costs its neighbours nothing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 8)).astype(np.float32)
    x[..., 5] += 40
    stored = tensor.quantize(jnp.asarray(x), format_, axis=-1)
    groups = np.moveaxis(x.reshape(3, 2, 4, 8), 2, -1) if axis == -2 else x.reshape(3, 8, 2, 4)
    low = groups.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / 15).astype(np.float16).astype(np.float32)
    want = np.clip(np.round((groups - low) / step), 0, 15) * step + low
    want = np.moveaxis(want, -1, 2).reshape(x.shape) if axis == -2 else want.reshape(x.shape)
    close = np.abs(np.asarray(stored.dequantize()) - want) < 1e-3
    assert close.mean() > 0.99  # a number between two codes may go either way
    error = np.abs(np.asarray(stored.dequantize()) - x)
    others = error[..., [0, 1, 2, 3]].max()
    assert others < 0.25 and (axis == -1 or error.max() < 0.25)
    assert stored.bits_per_weight == 4 + 32 / 4


def test_keys_with_an_outlier_channel_want_scales_a_channel():
    x = np.random.default_rng(0).standard_normal((1, 64, 64)).astype(np.float32)
    x[..., 7] = 50 + x[..., 7]
    error = [
        families.relative(tensor.quantize(jnp.asarray(x), form, axis=-1).dequantize()[..., :7], x[..., :7])
        for form in (PerChannel(width=2, group=32), Affine(width=2))
    ]
    assert error[0] < 0.5 < error[1]


def test_two_bits_on_grouped_heads_need_allow():
    with pytest.raises(LegalityError, match="kivi at layers/0/mixer and 1 more: .*gqa_kivi2.*allow: .gqa_kivi2."):
        optx.plan(families.abstract("llama"), Recipe(cache=[Kivi(bits=2, group=4)]))
    assert optx.plan(families.abstract("llama"), Recipe(cache=[Kivi(bits=2, group=4)], allow=["gqa_kivi2"]))
    assert optx.plan(families.abstract("llama", num_key_value_heads=4), Recipe(cache=[Kivi(bits=2, group=4)]))


def test_pages_smaller_than_a_group():
    made = optx.compile(families.concrete("llama"), Recipe(cache=[Kivi(group=8)]))
    with pytest.raises(FormatError, match="pages of 4 tokens do not divide into groups of 8, .*; take a page size"):
        made.engine(rows=1, context=16, page_size=4)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"group": 3}, "cache stream v.2, 8.: int4_g3_affine: axis of 8 is not a multiple of the group 3"),
        ({"bits": 5, "group": 4}, "int format: width 5; allowed: 2, 3, 4, 8"),
        ({"group": 0}, "affine format: group 0; a positive number"),
        ({"group": 4, "recent": -1}, "cache recent -1; allowed: 0 to"),
    ],
)
def test_options_that_fit_no_cache(options, told):
    with pytest.raises(PassError, match=f"kivi at layers/./mixer: {told}"):
        pipeline.run(families.abstract("llama"), Recipe(cache=[Kivi(**options)]))


def test_a_packed_cache_is_not_packed_again():
    rules = [QuantizeKV(match="layers/0/mixer"), Kivi(group=4)]
    with pytest.raises((PassError, LegalityError), match="layers/0/mixer"):
        optx.plan(families.abstract("llama"), Recipe(cache=rules))
