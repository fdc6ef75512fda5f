"""quantize_activations: 8 bits really meet 8 bits in what is traced, with the numbers of rounding by hand."""

import dataclasses

import calibrated
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import optx
from optx import ir, pipeline, tensor
from optx.checkpoint.source import from_module
from optx.cost import step_ops
from optx.errors import PassError
from optx.formats import Float8, Int
from optx.nn import Linear
from optx.pallas.quant_matmul.reference import quant_matmul
from optx.passes.fuse_projections import FuseProjections, join
from optx.passes.quantize_activations import QuantizeActivations
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.smoothquant import SmoothQuant
from optx.recipe import Recipe
from optx.registry import Skipped


def recipe(weights="int8", activations="int8", match="layers/.*", **more) -> Recipe:
    rounded = QuantizeWeights(format=weights, match="layers/.*")
    return Recipe(weights=(rounded, QuantizeActivations(format=activations, match=match)), **more)


def products(jaxpr) -> list[tuple[str, str]]:
    """Types of the operands of every product, those of inner programs too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(str(x.aval.dtype) for x in eqn.invars))
        for inner in jaxprs_in_params(eqn.params):
            found += products(inner)
    return found


@pytest.mark.parametrize("format, code", [("int8", "int8"), ("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_codes_meet_codes_in_the_traced_program(format, code):
    tree = families.concrete("llama", num_hidden_layers=1)
    compiled = optx.compile(from_module(tree), recipe(format, format))
    tokens = jnp.asarray([families.prompt(12)], jnp.int32)
    traced = products(jax.make_jaxpr(lambda t: compiled.tree(t))(tokens).jaxpr)
    assert traced.count((code, code)) == 7  # q, k, v, o, gate, up, down
    weights_only = optx.compile(from_module(tree), Recipe(weights=(QuantizeWeights(format=format, match="layers/.*"),)))
    assert (code, code) not in products(jax.make_jaxpr(lambda t: weights_only.tree(t))(tokens).jaxpr)
    half, both = (families.relative(c.logits(tokens), tree(tokens)) for c in (weights_only, compiled))
    assert half < both < 2 * half  # two errors of about one size, sqrt(2) together


@pytest.mark.parametrize("format", [Int(width=8, scale_dtype="float32"), Float8(), Float8(kind="e5m2")])
def test_the_product_of_codes_is_that_of_rounded_values(format):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 64)) * np.exp(rng.normal(size=(5, 1))), jnp.float32)
    w = tensor.quantize(jnp.asarray(rng.standard_normal((64, 24)), jnp.float32), format)
    rounded = tensor.quantize(x, format, axis=-1).dequantize()
    want = np.asarray(rounded, np.float64) @ np.asarray(w.dequantize(), np.float64)
    assert families.relative(quant_matmul(x, w, format), want) < 1e-6
    assert families.relative(quant_matmul(x, w), want) > 1e-3


@pytest.mark.parametrize(
    "weights, activations",
    [(Int(width=4, group=16), Int(width=8)), (Int(width=8, symmetric=False), Int(width=8)), (Int(width=8), Float8())],
    ids=str,
)
def test_other_pairs_multiply_the_rounded_values(weights, activations):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    w = tensor.quantize(jnp.asarray(rng.standard_normal((32, 8)), jnp.float32), weights)
    want = tensor.quantize(x, activations, axis=-1).dequantize() @ w.dequantize()
    assert families.relative(quant_matmul(x, w, activations), want) < 1e-5


def test_smoothing_first_makes_int8_better_where_channels_stand_out():
    tree = families.concrete("llama", num_hidden_layers=1)
    block = tree.layers[0]
    for name in ("norm", "mlp_norm"):
        norm = getattr(block, name)
        ir.put(block, name, ir.replace(norm, weight=norm.weight.get_value().at[jnp.array([3, 17])].mul(60)))
    tokens = jnp.asarray([families.prompt(24)], jnp.int32)
    plain, _ = calibrated.through(tree, recipe())
    smooth, _ = calibrated.through(tree, recipe(fold=(SmoothQuant(match="layers/.*"),)))
    errors = [families.relative(out(tokens), tree(tokens)) for out in (plain, smooth)]
    assert errors[1] < 0.6 * errors[0]


def test_sites_that_keep_their_activations_say_why():
    moe = optx.load_config(families.Path(__file__).parent.parent / "goldens" / "qwen3_moe" / "config.json").tree
    _, (_, record) = pipeline.run(moe, recipe())
    assert record.skipped["layers/0/mlp/experts/down"] == "experts: grouped_matmul takes activations as they are"
    latent = optx.load_config(families.Path(__file__).parent.parent / "goldens" / "deepseek_v3" / "config.json").tree
    trees, (_, record) = pipeline.run(latent, recipe())
    assert record.skipped["layers/0/mixer/kv_b"] == "the part around it contracts the weight itself"
    assert str(trees[-1].layers[0].mixer.o.activations) == "int8" and trees[-1].layers[0].mixer.kv_b.activations is None


def test_dense_weights_are_refused():
    with pytest.raises(PassError, match="quantize_activations changed nothing: the weight is dense"):
        pipeline.run(families.abstract("llama"), Recipe(weights=(QuantizeActivations(format="int8"),)))


def test_bad_input():
    with pytest.raises(PassError, match=r"layers/\S+, weight \[\d+, \d+\]: int8_g24: axis of \d+ is not a multiple"):
        options = QuantizeActivations(format="int8", group=24, match="layers/.*")
        pipeline.run(families.abstract("llama"), dataclasses.replace(recipe(), weights=(recipe().weights[0], options)))
    rounded = pipeline.run(families.abstract("llama"), recipe())[0][-1]
    with pytest.raises(PassError, match="its inputs are rounded to int8 already"):
        pipeline.run(rounded, Recipe(weights=(QuantizeActivations(format="fp8_e4m3"),)))


def test_fused_projections_round_their_input_once_and_split_again():
    tree = families.concrete("llama", num_hidden_layers=1)
    tokens = jnp.asarray([families.prompt(12)], jnp.int32)
    compiled = optx.compile(from_module(tree), recipe(lower=(FuseProjections(),)))
    plain = optx.compile(from_module(tree), recipe())
    assert families.relative(compiled.logits(tokens), plain.logits(tokens)) < 1e-6
    fused = compiled.tree.layers[0].mixer
    assert str(fused.qkv.activations) == "int8" and str(fused.unfused().k.activations) == "int8"
    one, two = Linear(16, 8), Linear(16, 8)
    assert isinstance(join(one, ir.replace(two, activations=Int(width=8))), Skipped)


def test_it_shows_in_the_tree_in_the_kernels_and_in_the_cost():
    compiled = optx.compile(
        from_module(families.concrete("llama", num_hidden_layers=1)), recipe("fp8_e4m3", "fp8_e4m3")
    )
    assert "Linear fp8_e4m3[32, 64] activations=fp8_e4m3" in ir.describe(compiled.tree)
    assert "activations in fp8_e4m3; allowed: as they are" in compiled.explain()
    units = {op.path: op.dtype for op in step_ops(compiled.tree)}
    assert units["layers/0/mlp/up"] == "fp8" and units["output"] == "fp32"
    mixed = optx.plan(from_module(families.abstract("llama")), recipe("int8", "fp8_e4m3"))
    assert {op.path: op.dtype for op in step_ops(mixed.tree)}["layers/0/mlp/up"] == "fp32"


def test_a_model_with_rounded_activations_comes_back_from_an_export(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "hf", "llama", num_hidden_layers=1)
    compiled = optx.compile(optx.load(str(folder)), recipe())
    tokens = np.asarray([families.prompt(12)])
    again = optx.compile(optx.load(compiled.export(tmp_path / "out")))
    np.testing.assert_array_equal(again.logits(tokens), compiled.logits(tokens))
