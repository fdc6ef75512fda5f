"""Streams of one cache in formats of their own."""

import dataclasses
import re

import families
import jax
import jax.numpy as jnp
import pytest

import optx
from optx import ir, tensor
from optx.cache import Layout
from optx.errors import FormatError
from optx.formats import Affine, Codebook, CodebookQJL, Float8, Float8Block, Float8Static, Int, PerChannel
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


NARROW = [Float8(), Float8(kind="e5m2"), Float8Static(), Float8Block(), Int(width=4, symmetric=False), Affine(width=4)]
NARROW += [PerChannel(width=2, group=32), Codebook(width=4), CodebookQJL(width=3)]


@pytest.mark.parametrize("format_", NARROW, ids=str)
def test_rounding_to_a_float_is_kept_by_compilers(format_):
    """Each conversion to a float of fewer bits goes through a barrier: XLA drops one that is turned back at once."""
    x = jnp.ones((32, 64))
    text = jax.jit(lambda x: tensor.quantize(x, format_, axis=-1).dequantize()).lower(x).as_text()
    names = re.findall(r"(%\w+) = stablehlo.convert .*-> tensor<[\dx]*f(?:8E4M3FN|8E5M2|16)>", text)
    assert names
    for name in names:
        assert re.search(rf"optimization_barrier .*{name}\b", text), name
