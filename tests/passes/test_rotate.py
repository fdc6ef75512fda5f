"""rotate: the stream and the values of heads turned, folded into weights; the same logits from weights without outliers."""

from pathlib import Path

import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir
from optx.errors import LegalityError, PassError
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, LayerNorm, RMSNorm, Rope
from optx.nn.rotated import RotatedBlock
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate import Rotate
from optx.recipe import Recipe
from optx.registry import Site

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
REFUSED = {  # family -> why its stream cannot run rotated
    "gemma3": "a norm stands between what a part writes and the stream",
    "gemma3_softcap": "a norm stands between what a part writes and the stream",
    "minimax": "the stream goes on from the norm",
}


def tree(family: str) -> CausalLM:
    return optx.load_config(GOLDENS / family / "config.json", dtype="float32").tree


def logits(model, tokens, *options) -> np.ndarray:
    return np.asarray(optx.compile(model, Recipe(fold=options)).logits(np.asarray([tokens])))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [Rotate(), Rotate(seed=None), Rotate(stream=False)], ids=["R1R2", "plain", "R2"])
def test_exact_on_every_family_or_refused(family, options):
    shapes = tree(family)
    if options.stream and family in REFUSED:
        with pytest.raises(LegalityError, match=f"rotate at layers/.*{REFUSED[family]}"):
            optx.plan(shapes, Recipe(fold=[options]))
        return
    model = ir.init_weights(shapes, seed=1)
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    assert families.relative(logits(model, tokens, options), logits(model, tokens)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_exact_against_the_equations_over_caches(family):
    """The oracle knows nothing of rotations; tied (qwen3) and untied (llama) heads, chunks and single tokens."""
    model, tokens = families.concrete(family), families.prompt(12)
    compiled = optx.compile(model, Recipe(fold=[Rotate()]))
    got = families.incremental(compiled.tree, tokens, sizes=(5, 1))
    assert families.relative(got, families.oracle(model, tokens)) < 1e-5


def test_every_kind_of_cache_in_one_model():
    """Values that another layer reads are rotated at both; a windowed int8 cache rounds other numbers, so it is left dense."""
    model, tokens = families.hybrid(), families.prompt(12)
    model.layers[2].mixer.cache = model.layers[2].mixer.cache.replace(format=None)
    compiled = optx.compile(model, Recipe(fold=[Rotate()]))
    want = families.incremental(model, tokens, sizes=(5, 1))
    assert families.relative(families.incremental(compiled.tree, tokens, sizes=(5, 1)), want) < 1e-5


def test_only_the_ends_differ_in_form():
    planned = optx.plan(families.abstract("llama", num_hidden_layers=4), Recipe(fold=[Rotate()]))
    kinds = [type(layer) for layer in planned.tree.layers]
    assert kinds == [RotatedBlock, Block, Block, RotatedBlock]
    first, last = planned.tree.layers[0], planned.tree.layers[3]
    assert str(first.enters) == str(last.leaves) == "H 32 seed 0" and first.leaves is None and last.enters is None
    assert planned.records[0].weight_bytes[0] == planned.records[0].weight_bytes[1]
    assert planned.records[0].diff.splitlines()[0] == "-layers/0-3: Block"


def test_one_layer_turns_the_stream_there_and_back():
    model, tokens = families.concrete("llama", num_hidden_layers=1), families.prompt(9)
    compiled = optx.compile(model, Recipe(fold=[Rotate()]))
    assert compiled.tree.layers[0].enters == compiled.tree.layers[0].leaves
    assert families.relative(logits(model, tokens, Rotate()), logits(model, tokens)) < 1e-5


def test_the_weights_are_the_written_out_products():
    """W_in -> Q^T diag(g) W_in, W_out -> W_out Q, v -> v R by head, in float64."""
    model = families.concrete("llama")
    opt = Rotate(seed=4)
    new = optx.compile(model, Recipe(fold=[opt])).tree.layers[1]
    old = model.layers[1]
    q, r = (opt.rotation(d).fold(np.eye(d), -1) for d in (32, 8))
    gain, mlp_gain = (np.asarray(norm.weight.get_value(), np.float64) for norm in (old.norm, old.mlp_norm))

    def weight(linear):
        return np.asarray(linear.weight.get_value(), np.float64)

    np.testing.assert_allclose(weight(new.mixer.q), q.T @ (gain[:, None] * weight(old.mixer.q)), atol=1e-6)
    np.testing.assert_allclose(weight(new.mlp.up), q.T @ (mlp_gain[:, None] * weight(old.mlp.up)), atol=1e-6)
    np.testing.assert_allclose(weight(new.mlp.down), weight(old.mlp.down) @ q, atol=1e-6)
    values = q.T @ (gain[:, None] * weight(old.mixer.v)) @ np.kron(np.eye(2), r)
    np.testing.assert_allclose(weight(new.mixer.v), values, atol=1e-6)
    np.testing.assert_allclose(weight(new.mixer.o), np.kron(np.eye(4), r).T @ weight(old.mixer.o) @ q, atol=1e-6)
    np.testing.assert_array_equal(new.norm.weight.get_value(), np.ones(32))


def test_an_outlier_channel_no_longer_spoils_four_bits():
    """Of its row's group of 32 only the outlier would keep its digits."""
    model = families.concrete("llama")
    for layer in model.layers:
        layer.norm.weight.set_value(layer.norm.weight.get_value().at[3].set(40.0))
        layer.mixer.q.weight.set_value(layer.mixer.q.weight.get_value().at[5].mul(40.0))
    quantize = QuantizeWeights(match="layers/.*", format="int4", group=32)
    tokens = families.prompt(24)
    want = logits(model, tokens)

    def error(*fold):
        got = optx.compile(model, Recipe(fold=fold, weights=[quantize])).logits(np.asarray([tokens]))[0]
        return families.relative(got, want)

    assert error(Rotate()) < 0.8 * error()


def test_gates_keep_their_values():
    """A gate multiplies single numbers of a head, so only the stream is rotated, and the report says so."""
    mixer = Attention(16, heads=4, kv_heads=2, head_dim=6, rope=Rope(theta=1e4, dim=4), gated=True, bias=True)
    layer = Block(norm=RMSNorm(16), mixer=mixer, mlp_norm=RMSNorm(16), mlp=GatedMLP(16, 24))
    model = ir.init_weights(CausalLM(embed=Embed(264, 16), layers=[layer], norm=RMSNorm(16), head=None, context=64))
    compiled = optx.compile(model, Recipe(fold=[Rotate()]))
    note = "values are not rotated: a gate multiplies each number of a head"
    assert compiled.plan.records[0].notes == {"layers/0": note}
    tokens = families.prompt(12)
    assert families.relative(logits(model, tokens, Rotate()), logits(model, tokens)) < 1e-5


def test_an_offset_norm_is_folded_with_its_offset():
    """The gain is offset + weight, and what is left has a gain of one."""
    rope = Rope(theta=1e4, dim=8)
    norm = RMSNorm(16, offset=1.0)
    mixer = Attention(16, heads=2, kv_heads=1, head_dim=8, rope=rope)
    layer = Block(norm=norm, mixer=mixer, mlp_norm=RMSNorm(16, offset=1.0), mlp=GatedMLP(16, 32))
    model = ir.init_weights(CausalLM(embed=Embed(264, 16), layers=[layer], norm=RMSNorm(16), head=None, context=64))
    compiled = optx.compile(model, Recipe(fold=[Rotate()]))
    np.testing.assert_array_equal(compiled.tree.layers[0].norm.weight.get_value(), np.zeros(16))
    tokens = families.prompt(12)
    assert families.relative(logits(model, tokens, Rotate()), logits(model, tokens)) < 1e-5


def test_some_layers_alone_are_refused():
    with pytest.raises(LegalityError, match="rotated_in_part") as error:
        optx.plan(families.abstract("llama"), Recipe(fold=[Rotate(match="layers/0")]))
    assert "layers/1" in str(error.value) and "left as it is" in str(error.value)
    two = [Rotate(match="layers/0"), Rotate(match="layers/1", seed=1)]
    with pytest.raises(LegalityError, match="one matrix or none"):
        optx.plan(families.abstract("llama"), Recipe(fold=two))


def test_two_rules_of_one_way_are_one():
    two = [Rotate(match="layers/0"), Rotate(match="layers/1")]
    model, tokens = families.concrete("llama"), families.prompt(9)
    assert families.relative(logits(model, tokens, *two), logits(model, tokens)) < 1e-5


def test_layer_norms_are_refused():
    rope = Rope(theta=1e4, dim=8)
    mixer = Attention(16, heads=2, kv_heads=1, head_dim=8, rope=rope)
    block = Block(norm=LayerNorm(16), mixer=mixer, mlp_norm=RMSNorm(16), mlp=GatedMLP(16, 32))
    with pytest.raises(PassError, match="layers/0: norm is LayerNorm; an RMSNorm alone"):
        optx.passes.rotate.rotate(Site(path="layers/0", layers=1), block, Rotate())


def test_rotating_twice_is_refused():
    once = optx.plan(families.abstract("llama"), Recipe(fold=[Rotate()])).tree
    with pytest.raises(LegalityError, match="the stream is rotated already"):
        optx.plan(once, Recipe(fold=[Rotate()]))


def test_weights_that_are_no_numbers_are_refused():
    model = families.concrete("llama")
    weight = model.layers[1].mlp.down.weight
    weight.set_value(weight.get_value().at[3, 4].set(jnp.nan))
    with pytest.raises(PassError, match="rotation at layers/1/mlp/down: the weight holds NaN"):
        optx.compile(model, Recipe(fold=[Rotate()]))


def test_an_export_gives_the_same_logits(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "model", "llama")
    compiled = optx.compile(optx.load(str(folder)), Recipe(fold=[Rotate()]))
    again = optx.load(str(compiled.export(tmp_path / "export")))
    tokens = np.asarray([families.prompt(9)])
    np.testing.assert_array_equal(optx.compile(again).logits(tokens), compiled.logits(tokens))
