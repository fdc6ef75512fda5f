"""quantize_weights: chosen matrices in fewer bits, the others as they were, and an error that falls as bits rise."""

import dataclasses
from pathlib import Path

import families
import numpy as np
import pytest

import optx
from optx import formats, ir, pipeline, tensor
from optx.checkpoint.source import from_module
from optx.errors import PassError
from optx.formats import NAMES, Int
from optx.nn import Linear
from optx.passes.quantize_weights import QuantizeWeights
from optx.pipeline import flat_errors
from optx.recipe import Recipe

BEFORE = """\
# 26,208 params, 104.8 kB, KV 128 B/token
CausalLM context=128
  embed: Embed f32[264, 32] scale=1  # 33.8 kB
  layers/0: Block
    norm: RMSNorm f32[32] eps=1e-06 offset=0
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
      q: Linear f32[32, 32]  # 4.1 kB
      k: Linear f32[32, 16]  # 2.0 kB
      v: Linear f32[32, 16]  # 2.0 kB
      o: Linear f32[32, 32]  # 4.1 kB
    mlp_norm: RMSNorm f32[32] eps=1e-06 offset=0
    mlp: GatedMLP activation=silu
      gate: Linear f32[32, 64]  # 8.2 kB
      up: Linear f32[32, 64]  # 8.2 kB
      down: Linear f32[64, 32]  # 8.2 kB
  norm: RMSNorm f32[32] eps=1e-06 offset=0
  output: Linear f32[32, 264]  # 33.8 kB
"""

EXPECTED = """\
# 26,208 params, 50.2 kB, KV 128 B/token
CausalLM context=128
  embed: Embed f32[264, 32] scale=1  # 33.8 kB
  layers/0: Block
    norm: RMSNorm f32[32] eps=1e-06 offset=0
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
      q: Linear int4_g16_asym[32, 32]
      k: Linear int4_g16_asym[32, 16]
      v: Linear int4_g16_asym[32, 16]
      o: Linear int4_g16_asym[32, 32]
    mlp_norm: RMSNorm f32[32] eps=1e-06 offset=0
    mlp: GatedMLP activation=silu
      gate: Linear int4_g16_asym[32, 64]  # 1.4 kB
      up: Linear int4_g16_asym[32, 64]  # 1.4 kB
      down: Linear int8[64, 32]  # 2.1 kB
  norm: RMSNorm f32[32] eps=1e-06 offset=0
  output: Linear int8[32, 264]  # 9.0 kB
"""


def recipe(*rules, **fields):
    return Recipe(weights=rules or [QuantizeWeights(match="layers/.*", **fields)])


def test_before_expected():
    planned = optx.plan(
        families.abstract("llama", num_hidden_layers=1),
        recipe(
            QuantizeWeights(match="output|.*/down", format="int8"),
            QuantizeWeights(format="int4", group=16, symmetric=False),
        ),
    )
    assert ir.describe(planned.trees[0]) == BEFORE
    assert ir.describe(planned.tree) == EXPECTED


LADDER = [  # formats of falling error
    {"format": "int2", "group": 8, "symmetric": False},
    {"format": "int3", "group": 8, "symmetric": False},
    {"format": "int4", "group": 8, "symmetric": False},
    {"format": "fp8_e4m3"},
    {"format": "int8"},
]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_logits_error_is_small_and_falls_with_bits(family):
    model = families.concrete(family, num_hidden_layers=1)
    tokens = families.prompt(12)
    dense = families.oracle(model, tokens)
    compiled = [optx.compile(model, recipe(**step)) for step in LADDER]
    errors = [families.relative(families.oracle(c.tree, tokens), dense) for c in compiled]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[0] < 1 and errors[-1] < 0.02 and errors[0] > 10 * errors[-1], errors
    sites = [flat_errors(c.plan.records[0])[0] for c in compiled]
    assert sites == sorted(sites, reverse=True) and sites[-1] < 0.01
    # What runs is what the stored numbers stand for, which is what the oracle read.
    assert families.relative(compiled[2].logits([tokens])[0], families.oracle(compiled[2].tree, tokens)) < 1e-5


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_rounded_to_the_nearest_level_of_their_group(group, symmetric):
    model = families.concrete("llama", num_hidden_layers=1)
    tree = optx.compile(model, recipe(format="int4", group=group, symmetric=symmetric)).tree
    dense = np.asarray(model.layers[0].mlp.down.weight.get_value(), np.float64)
    size = group or dense.shape[0]
    groups = dense.reshape(-1, size, dense.shape[1])
    if symmetric:
        step = 2 * np.abs(groups).max(1, keepdims=True) / 15
    else:
        step = (np.maximum(groups.max(1, keepdims=True), 0) - np.minimum(groups.min(1, keepdims=True), 0)) / 15
    got = np.asarray(tree.layers[0].mlp.down.weight.get_value().dequantize(), np.float64).reshape(groups.shape)
    excess = np.abs(got - groups) / step
    at_edge = np.abs(groups) > 6.9 * step  # a symmetric code has no level for +absmax: it clips by half a step
    assert excess[~at_edge].max() < 0.51 and excess.max() < 1.02


def test_only_matched_linears_change():
    model = families.concrete("qwen3")
    tree = optx.compile(model, recipe(format="int8")).tree
    for path, variable in ir.params(tree).items():
        owner = ir.get(tree, path.rpartition("/")[0])
        packed = tensor.is_qtensor(variable.get_value())
        assert packed == (isinstance(owner, Linear) and path.endswith("/weight") and path.startswith("layers/"))
        if not packed:
            np.testing.assert_array_equal(variable.get_value(), ir.get(model, path).get_value())
        else:
            assert variable.get_metadata()["axes"] == ir.get(model, path).get_metadata()["axes"]


MOE = Path(__file__).parent.parent / "goldens" / "qwen3_moe"


@pytest.mark.parametrize("rule, most", [({"format": "int8"}, 0.02), ({"format": "int4", "group": 8}, 0.15)])
def test_experts_are_rounded_each_by_itself_and_come_back_from_an_export(rule, most, tmp_path):
    source, answers = optx.load(str(MOE), dtype="float32"), np.load(MOE / "answers.npz")
    compiled = optx.compile(source, recipe(QuantizeWeights(match=".*/experts/.*", **rule)))
    packed = {path: error for path, error in compiled.plan.records[0].errors.items() if error}
    assert sorted(packed) == [f"layers/{i}/mlp/experts/{part}/weight" for i in (0, 2) for part in ("down", "gate_up")]
    dense, whole = (t.layers[0].mlp.experts.down.weight.get_value() for t in (source.load(), compiled.tree))
    assert whole.shape == dense.shape
    alone = tensor.quantize(dense[3], whole.format)
    np.testing.assert_array_equal(whole.dequantize()[3], alone.dequantize())
    logits = compiled.logits(answers["tokens"])
    assert 1e-4 < families.relative(logits, answers["logits"]) < most
    again = optx.compile(optx.load(compiled.export(tmp_path / "optx")))
    np.testing.assert_array_equal(again.logits(answers["tokens"]), logits)
    again = optx.compile(optx.load(compiled.export(tmp_path / "hf", format="hf")))
    assert families.relative(again.logits(answers["tokens"]), logits) < 1e-5


GROUPED = [name for name in NAMES if not name.endswith("fp4")]  # the block of a 4-bit float is part of its format


@pytest.mark.parametrize("name, group", [*((name, None) for name in NAMES), *((name, 8) for name in GROUPED)])
def test_every_format_names_itself(name, group):
    options = QuantizeWeights(format=name, group=group)
    text = name + (f"_g{group}" if group else "")
    assert str(options.storage()) == text and formats.parse(text) == options.storage()


def packed_source():
    """A model whose gate is packed already, as a file would give it."""
    model = families.concrete("llama", num_hidden_layers=1)
    gate = model.layers[0].mlp.gate
    packed = tensor.quantize(gate.weight.get_value(), Int(width=4, group=8))
    ir.put(model, "layers/0/mlp/gate", ir.replace(gate, weight=packed))
    return from_module(model), packed


def test_a_packed_weight_is_not_rounded_again_unasked():
    source, packed = packed_source()
    with pytest.raises(PassError) as error:
        pipeline.run(source.tree, recipe(format="int8"))
    assert str(error.value) == (
        "quantize_weights at layers/0/mlp/gate: the weight is packed already, int4_g8[32, 64]; "
        "load with weights='dense', narrow 'match', or set requantize: true"
    )
    compiled = optx.compile(source, recipe(format="int8", requantize=True))
    got = compiled.tree.layers[0].mlp.gate.weight.get_value()
    assert str(got.format) == "int8" and families.relative(got.dequantize(), packed.dequantize()) < 0.01
    narrow = optx.compile(source, recipe(QuantizeWeights(match=".*/down", format="int8")))
    np.testing.assert_array_equal(narrow.tree.layers[0].mlp.gate.weight.get_value().data, packed.data)


def test_a_packed_gguf_is_not_rounded_again_unasked(tmp_path):
    model = families.concrete("llama", num_hidden_layers=1)
    path = families.write_llama_gguf(
        tmp_path / "model.gguf", model, lambda rows: ("Q8_0", families.q8_0(rows)), num_hidden_layers=1
    )
    with pytest.raises(PassError, match=r"at layers/0/m.*: the weight is packed already, q8_0\["):
        pipeline.run(optx.load(path, weights="packed").tree, recipe(format="int4", group=8))
    assert optx.plan(optx.load(path), recipe(format="int4", group=8)).records
    assert optx.plan(optx.load(path, weights="packed"), recipe(format="int4", group=8, requantize=True)).records


@pytest.mark.parametrize(
    "options, told",
    [
        ({"format": "int4", "group": 24}, "int4_g24: axis of [0-9]+ is not a multiple of the group 24"),
        ({"format": "int4", "group": 0}, "int format: group 0; a positive number"),
        ({"format": "int4", "group": -8}, "int format: group -8; a positive number"),
        ({"format": "fp8_e4m3", "symmetric": False}, "fp8_e4m3 has no zero point; set symmetric: true"),
        ({"format": "int5"}, "format 'int5' is not one that optx writes; did you mean 'int8'"),
        ({"format": "q4_0"}, "format 'q4_0' is not one that optx writes; allowed: .*int4"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:16],
)
def test_options_that_fit_no_weight(options, told):
    with pytest.raises(PassError, match=rf"quantize_weights at layers/\S+, weight \[\d+, \d+\]: {told}"):
        pipeline.run(families.abstract("llama"), recipe(**options))


def test_options_are_frozen_and_comparable():
    options = QuantizeWeights(format="int4", group=8)
    assert hash(options) == hash(dataclasses.replace(options)) and options != dataclasses.replace(options, group=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.group = 4
