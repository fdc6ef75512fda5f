"""Tokens kept exact beside packed ones: over pages as in one piece, whatever the chunks."""

import dataclasses

import families
import numpy as np
import pytest

import optx
from optx import ir
from optx.cache import Layout
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.errors import FormatError
from optx.formats import Affine, Int, Parted, PerChannel
from optx.passes.kivi import Kivi
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

RULES = {
    "int4": QuantizeKV(format="int4", symmetric=False),
    "recent": QuantizeKV(format="int4", recent=5),
    "first": QuantizeKV(format="int2", first=3, group=4),
    "both": QuantizeKV(format="fp8_e4m3", values="int4", recent=3, first=2),
    "kivi": Kivi(bits=4, group=4, recent=5, first=2),
    "kivi2": Kivi(bits=2, group=4, recent=0),
}


def compiled(rule, model=None):
    model = families.concrete("llama") if model is None else model
    return optx.compile(model, Recipe(cache=[rule], allow=("gqa_kivi2",)))


@pytest.mark.parametrize("name", RULES)
def test_chunks_over_pages_give_the_whole_forward(name):
    made = compiled(RULES[name])
    tokens = families.prompt(27)
    whole = made.logits([tokens])[0]
    for sizes in ((1,), (8, 1), (5, 3, 7)):
        assert families.relative(families.incremental(made.tree, tokens, sizes), whole) < 1e-5, sizes
    assert families.relative(whole, families.oracle(families.concrete("llama"), tokens)) > 1e-3
