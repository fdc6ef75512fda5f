"""quantize_kv: what layers remember in fewer bits, close to what it was."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir, pipeline, tensor
from optx.errors import FormatError, PassError, RecipeError
from optx.formats import Affine, Float8, Float8Static, Int
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

BEFORE = """\
CausalLM context=128
  layers/0-1: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 10000/8) cache=(paged float32 window 6)
  layers/2: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 1e+06/8) cache=(paged float32)
"""

EXPECTED = """\
CausalLM context=128
  layers/0-1: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 10000/8) cache=(paged int8 window 6)
  layers/2: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 1e+06/8) cache=(paged int4_affine)
"""


def mixers(tree) -> str:
    """The lines of the printed tree that name the model, its blocks and their mixers."""
    wanted = ("CausalLM", "layers/", "mixer:")
    return "".join(f"{line}\n" for line in ir.describe(tree).splitlines() if line.strip().startswith(wanted))


def test_before_expected():
    rules = [QuantizeKV(match="layers/2/mixer", format="int4", symmetric=False), QuantizeKV()]
    planned = optx.plan(families.abstract("gemma3"), Recipe(cache=rules))
    assert mixers(planned.trees[0]) == BEFORE
    assert mixers(planned.tree) == EXPECTED
    assert planned.records[0].sites == 3


LIMITS = {"int8": 0.04, "fp8_e4m3": 0.1, "fp8_e5m2": 0.2, "int4": 0.5}


@pytest.mark.parametrize(
    "family, formats", [("llama", tuple(LIMITS)), ("qwen3", ("int8",)), ("gemma3", ("int8", "int4"))]
)
def test_decoding_stays_close_to_the_dense_cache(family, formats):
    model = families.concrete(family)
    tokens = families.prompt(24)
    dense = families.oracle(model, tokens)
    errors = []
    for format in formats:
        tree = optx.compile(model, Recipe(cache=[QuantizeKV(format=format)])).tree
        errors.append(families.relative(families.incremental(tree, tokens), dense))
        assert 1e-4 < errors[-1] < LIMITS[format], errors
    assert errors == sorted(errors), errors


@pytest.mark.parametrize("format", ["int4", "fp8_e4m3"])
def test_the_whole_forward_sees_what_the_cache_would_give_back(format):
    """Perplexity and KL are scored in one piece; they must show what the rounded cache costs."""
    model = families.concrete("llama")
    tokens = families.prompt(12)
    packed = optx.compile(model, Recipe(cache=[QuantizeKV(format=format)]))
    whole = packed.logits([tokens])[0]
    assert families.relative(families.incremental(packed.tree, tokens), whole) < 1e-4
    assert families.relative(whole, families.oracle(model, tokens)) > 1e-3


@pytest.mark.parametrize(
    "options, format, unit",
    [
        (QuantizeKV(), Int(width=8), 2 * (16 + 2 * 2)),
        (QuantizeKV(symmetric=False), Affine(width=8), 2 * (16 + 2 * 4)),
        (QuantizeKV(format="int4"), Int(width=4), 2 * (8 + 2 * 2)),
        (QuantizeKV(format="fp8_e4m3"), Float8(kind="e4m3", scale_dtype="float16"), 2 * (16 + 2 * 2)),
        (QuantizeKV(format="fp8_e5m2"), Float8(kind="e5m2", scale_dtype="float16"), 2 * (16 + 2 * 2)),
    ],
    ids=str,
)
def test_bytes_a_token(options, format, unit):
    """[K, H] = [2, 8] numbers each of K and V, and a scale a head (a zero point with it where asymmetric)."""
    planned = optx.plan(families.abstract("llama"), Recipe(cache=[options]))
    spec = planned.tree.layers[0].mixer.cache
    assert spec.format == format and spec.unit_bytes == unit
    assert planned.records[0].cache_bytes == (2 * 2 * 16 * 4, 2 * unit)


def test_a_shared_cache_is_its_owners():
    """The layer that reads another's cache has no say in its format, and reads what is there."""
    model = families.concrete("llama")
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, k=None, v=None, cache=mixer.cache.replace(share=0)))
    compiled = optx.compile(model, Recipe(cache=[QuantizeKV()]))
    record = compiled.plan.records[0]
    assert record.sites == 1 and record.skipped == {"layers/1/mixer": "reads the cache of layer 0"}
    assert record.cache_bytes == (128, 40)
    tokens = families.prompt(16)
    whole = compiled.logits([tokens])[0]
    assert families.relative(families.incremental(compiled.tree, tokens), whole) < 1e-4


def test_a_packed_cache_is_not_packed_again():
    with pytest.raises(PassError, match="quantize_kv at layers/2/mixer: the cache is stored as int8 already"):
        pipeline.run(families.hybrid(), Recipe(cache=[QuantizeKV(match="layers/2/mixer")]))


@pytest.mark.parametrize(
    "options, changes, told",
    [
        ({"format": "int3"}, {"head_dim": 12}, "cache stream k.2, 12.: int3: axis of 12 is not a multiple of 8"),
        ({"format": "fp8_e4m3", "symmetric": False}, {}, "fp8_e4m3 has no zero point; set symmetric: true"),
        ({"format": "int5"}, {}, "format 'int5' is not one that optx writes; did you mean 'int8'"),
    ],
    ids=["head size", "fp8 with zero point", "unknown"],
)
def test_options_that_fit_no_cache(options, changes, told):
    with pytest.raises(PassError, match=f"quantize_kv at layers/./mixer: {told}"):
        pipeline.run(families.abstract("llama", **changes), Recipe(cache=[QuantizeKV(**options)]))


def test_fused_attention_is_a_site_too():
    fused = optx.plan(families.abstract("llama"), Recipe(lower=[FuseProjections()])).tree
    planned = optx.plan(fused, Recipe(cache=[QuantizeKV()]))
    assert planned.records[0].sites == 2 and planned.tree.layers[0].mixer.cache.format == Int(width=8)


@pytest.mark.parametrize("scale", ["head", "tensor"])
def test_calibrated_scales_are_stored_once(scale):
    """fp8 of k / s_k and v / s_v, with s the largest number on calibration text over 448, and no scale in the pool."""
    model, tokens = families.concrete("qwen3"), families.prompt(24)
    recipe = Recipe(cache=[QuantizeKV(format="fp8_e4m3", scale=scale)], lower=[FuseProjections()])
    text = calibrated.windows(model)
    tree, _ = calibrated.through(model, recipe, text)
    mixer = tree.layers[0].mixer
    assert str(mixer.cache) == "paged fp8_e4m3_static" and mixer.cache.unit_bytes == 2 * 2 * 16
    largest = 0
    for window in text:
        x = model.layers[0].norm(model.embed(window[0]))
        _, k, v = model.layers[0].mixer.project(x)
        k = model.layers[0].mixer.rope(model.layers[0].mixer.k_norm(k), jnp.arange(len(x)))
        largest = np.maximum(largest, [np.abs(y).max((0, 2)) for y in (k, v)])
    largest = np.max(largest, axis=1, keepdims=True) * np.ones((1, 2)) if scale == "tensor" else largest
    for held, want in zip((mixer.k_scale, mixer.v_scale), largest, strict=True):
        np.testing.assert_allclose(held.get_value(), want / 448, rtol=1e-5)
    whole = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, (7, 1)), whole) < 1e-4
    assert 1e-3 < families.relative(whole, families.oracle(model, tokens)) < 0.1


def test_numbers_beyond_what_calibration_saw_are_clipped():
    stored = tensor.quantize(jnp.array([[1.0, 500.0, -1e6, 448.0]]), Float8Static(), axis=-1)
    assert stored.scale is None
    np.testing.assert_array_equal(stored.dequantize(), [[1, 448, -448, 448]])


def test_calibrated_scales_need_text_and_a_cache_of_their_own():
    rule = QuantizeKV(format="fp8_e4m3", scale="head")
    with pytest.raises(RecipeError, match=r"cache.0.: quantize_kv reads its inputs .* on calibration text"):
        optx.compile(families.concrete("llama"), Recipe(cache=[rule]))
    model = families.concrete("llama")
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, k=None, v=None, cache=mixer.cache.replace(share=0)))
    with pytest.raises(FormatError, match="layers/1: cache shared with layer 0, which is stored in fp8_e4m3_static"):
        optx.plan(model, Recipe(cache=[rule]))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"format": "int8", "scale": "head"}, "scale: head is for fp8_e4m3 and fp8_e5m2"),
        ({"format": "fp8_e4m3", "scale": "tensor", "group": 8}, "scale: tensor is for fp8_e4m3 and fp8_e5m2"),
        ({"format": "int8", "recent": -1}, "cache recent -1; allowed: 0 to"),
    ],
)
def test_options_that_contradict(options, told):
    with pytest.raises(PassError, match=f"quantize_kv at layers/./mixer: {told}"):
        pipeline.run(families.abstract("llama"), Recipe(cache=[QuantizeKV(**options)]))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"values": "int4"}, "a latent is key and value"),
        ({"format": "fp8_e4m3", "scale": "head"}, "a latent is key and value"),
    ],
)
def test_what_latents_cannot_have(options, told):
    with pytest.raises(PassError, match=f"quantize_kv at layers/3/mixer: {told}"):
        pipeline.run(families.hybrid(), Recipe(cache=[QuantizeKV(match="layers/3/mixer", **options)]))


def test_groups_and_widths_along_a_head():
    """int3 and int2 in groups of a head's numbers; K and V apart."""
    rule = QuantizeKV(format="int3", values="int2", group=8, symmetric=False)
    spec = optx.plan(families.abstract("qwen3"), Recipe(cache=[rule], allow=["gqa_kivi2"])).tree.layers[0].mixer.cache
    assert str(spec) == "paged k int3_g8_affine, v int2_g8_affine"
    assert spec.unit_bytes == 2 * (6 + 2 * 4) + 2 * (4 + 2 * 4)
