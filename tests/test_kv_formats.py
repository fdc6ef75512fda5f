"""Streams of one cache in formats of their own."""

import dataclasses

import families
import pytest

import optx
from optx import ir
from optx.cache import Layout
from optx.errors import FormatError
from optx.formats import Float8, Int
from optx.pallas.attention.page_formats import cache_reason


def apart(model, **formats):
    """The model with K and V of every layer in formats of their own, by the name of the stream."""
    for i, layer in enumerate(model.layers):
        cache = layer.mixer.cache
        streams = tuple(dataclasses.replace(s, format=formats.get(s.name)) for s in cache.streams)
        ir.put(model, f"layers/{i}/mixer", ir.replace(layer.mixer, cache=cache.replace(streams=streams)))
    return model


@pytest.mark.parametrize(
    "formats, text, unit",
    [
        ({"k": Int(width=8), "v": Int(width=4)}, "paged k int8, v int4", 2 * (8 + 2) + 2 * (4 + 2)),
        ({"k": Float8(scale_dtype="float16")}, "paged k fp8_e4m3, v float32", 2 * (8 + 2) + 2 * 32),
    ],
)
def test_keys_and_values_differ(formats, text, unit):
    """Over pages and in one piece, K and V are what their own formats give back; the pool has their bytes."""
    model = apart(families.concrete("llama"), **formats)
    spec = model.layers[0].mixer.cache
    assert (str(spec), spec.unit_bytes) == (text, unit)
    assert "formats of their own" in cache_reason(spec)
    pool = spec.init(Layout(pages=3, page_size=4, slots=1))
    assert sum(x.nbytes for x in pool.values()) == (3 + 1) * 4 * unit
    tokens = families.prompt(12)
    whole = optx.compile(model).logits([tokens])[0]
    assert families.relative(families.incremental(model, tokens), whole) < 1e-4
    assert families.relative(whole, families.oracle(model, tokens)) > 1e-3


def test_a_stream_that_its_format_cannot_hold():
    with pytest.raises(FormatError, match=r"cache stream v\[2, 12\]: int3: axis of 12 is not a multiple of 8"):
        apart(families.abstract("llama", head_dim=12), v=Int(width=3))
