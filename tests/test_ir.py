"""The module tree as IR: rewriting, structure, printing; and the flax hazards that its helpers guard against.

The golden text is written anew by `python tests/test_ir.py`; look at what changed before committing it.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optx import ir, tensor
from optx.errors import PassError
from optx.formats import Int
from optx.nn import MLA, Attention, Block, CausalLM, Embed, GatedMLP, Linear, Mamba2, RMSNorm, Rope
from optx.tensor import QTensor, is_qtensor

GOLDEN = Path(__file__).parent / "golden" / "describe_tiny.txt"
D, VOCAB = 16, 48
INT4 = Int(width=4, group=8)


def tiny(layers: str = "AAWASLMA") -> CausalLM:
    """An abstract model, a letter a layer: A attention, W window with sinks, S shares layer 0, L latent, M Mamba2."""
    rope = Rope(theta=10000.0, dim=8)

    def mixer(letter):
        if letter == "L":
            return MLA(D, heads=2, rank=8, nope_dim=4, value_dim=4, rope=Rope(theta=10000.0, dim=4))
        if letter == "M":
            return Mamba2(D, heads=2, head_dim=8, state_dim=4)
        share = 0 if letter == "S" else None
        attention = Attention(D, heads=4, kv_heads=2, head_dim=8, rope=rope, norm=lambda: RMSNorm(8), share=share)
        if letter == "W":
            attention.cache = attention.cache.replace(window=6, sinks=2, format=Int(width=8))
        return attention

    def block(letter):
        return Block(norm=RMSNorm(D), mixer=mixer(letter), mlp_norm=RMSNorm(D), mlp=GatedMLP(D, 2 * D))

    return CausalLM(embed=Embed(VOCAB, D), layers=map(block, layers), norm=RMSNorm(D), head=None, context=64)


def golden_model() -> CausalLM:
    """The tiny model with one weight packed, so that the text shows every kind of line."""
    model = tiny()
    down = model.layers[3].mlp.down
    ir.put(model, "layers/3/mlp/down", ir.replace(down, weight=tensor.quantize(down.weight.get_value(), INT4)))
    return model


class Tied(nnx.Module):
    """Two projections over one weight."""

    def __init__(self):
        self.first = Linear(D, D, rngs=nnx.Rngs(0))
        self.second = Linear(D, D, rngs=nnx.Rngs(1))
        self.second.weight = self.first.weight


@pytest.fixture(scope="module")
def model():
    return ir.init_weights(tiny())


@pytest.fixture
def linear():
    return Linear(D, D, bias=True, rngs=nnx.Rngs(0))


def packed(linear: Linear) -> Linear:
    return ir.replace(linear, weight=tensor.quantize(linear.weight.get_value(), INT4))


# The seven hazards.


def test_hazard_1_replace_never_writes_into_the_sources_variables(linear):
    """Copies share Variables with their source, so writing a value into the copy's would change the source."""
    kept = nnx.recursive_map(lambda path, node: node, linear)
    assert kept.weight is linear.weight, "flax copies Variables by reference; without this there is nothing to guard"
    before = linear.weight.get_value()
    for value in (jnp.zeros((D, D)), tensor.quantize(before, INT4), nnx.Param(jnp.zeros((D, D)))):
        copy = ir.replace(linear, weight=value)
        assert copy.weight is not linear.weight and linear.weight.get_value() is before
        assert copy.bias is linear.bias, "what did not change is shared"
        assert copy.weight.get_metadata().get("axes") == ("embed", "mlp") or isinstance(value, nnx.Param)
    without = ir.replace(linear, bias=None)
    assert without.bias is None and linear.bias is not None


def test_hazard_1_static_attributes_of_a_copy_are_its_own(model):
    block = model.layers[0]
    wide = ir.replace(block.mixer, cache=block.mixer.cache.replace(window=3))
    assert wide.cache.window == 3 and block.mixer.cache.window is None
    assert wide.q is not block.mixer.q and wide.q.weight is block.mixer.q.weight


def test_hazard_2_aliases_shows_a_weight_that_came_untied():
    tied = Tied()
    assert ir.aliases(tied) == {frozenset({"first/weight", "second/weight"})}
    for keep in (ir.shallow(tied), ir.abstract(tied), ir.init_weights(ir.abstract(tied)), ir.replace(tied)):
        assert ir.aliases(keep) == ir.aliases(tied)
    rebuilt = ir.replace(tied, first=ir.replace(tied.first, weight=tied.first.weight.get_value() + 1))
    assert ir.aliases(rebuilt) == frozenset()
    assert ir.aliases(tied), "the source stays tied"


def test_hazard_3_signature_tells_a_packed_weight_where_graphdef_does_not(linear):
    other = packed(linear)
    assert nnx.graphdef(linear) == nnx.graphdef(other), "the tensor's type lives in the state"
    assert ir.signature(linear) != ir.signature(other)
    coarse = ir.replace(linear, weight=tensor.quantize(linear.weight.get_value(), dataclasses.replace(INT4, group=16)))
    assert ir.signature(other) != ir.signature(coarse)


def test_hazard_4_contraction_goes_through_matmul(linear, rng):
    x = jnp.asarray(rng.normal(size=(3, D)), jnp.float32)
    other = packed(linear)
    with pytest.raises((AttributeError, TypeError)):
        other.weight @ x.T
    with pytest.raises((AttributeError, TypeError)):
        other.weight[...]
    assert other.weight.shape == (D, D) and other.weight.dtype == jnp.float32
    want = np.asarray(x) @ np.asarray(other.weight.get_value().dequantize()) + np.asarray(other.bias.get_value())
    np.testing.assert_allclose(other(x), want, atol=1e-5)


def test_hazard_5_arrays_and_modules_need_their_containers(linear, model):
    with pytest.raises(ValueError, match="static attribute"):
        linear.extra = tensor.quantize(jnp.ones((D, D)), INT4)
    with pytest.raises(ValueError, match="static attribute"):
        linear.extra = [Linear(D, D)]
    assert isinstance(model.layers, nnx.List)
    paths = [path for path, _ in ir.walk(model)]
    assert "layers/7/mixer/o" in paths, "modules in an nnx.List are walked"


def test_hazard_6_an_empty_nnx_list_looks_like_a_dataclass(model):
    """So whatever detects specs must leave out nnx.Pytree; the printed tree shows specs and no containers."""
    assert dataclasses.is_dataclass(nnx.List())
    text = ir.describe(model)
    assert "cache=(paged float32)" in text and "List" not in text
    assert [name for name, _ in ir.children(model)] == ["embed", *(f"layers/{i}" for i in range(8)), "norm"]


def test_hazard_7_tied_weights_need_graph_mode():
    tied = Tied()
    with pytest.raises(ValueError, match="Duplicate"):
        nnx.split(tied, graph=False)
    ir.signature(tied), ir.abstract(tied), ir.shallow(tied), ir.describe(tied)
    assert ir.weight_count(tied) == D * D and ir.weight_bytes(tied) == 4 * D * D, "a shared weight counts once"


# Rewriting.


def test_replace_refuses_unknown_attributes_and_names_the_nearest(model):
    with pytest.raises(PassError, match=r"Attention has no attribute 'cahce'; did you mean 'cache'\?"):
        ir.replace(model.layers[0].mixer, cahce=None)
    with pytest.raises(PassError, match="allowed: .*weight"):
        ir.replace(Linear(D, D), zzz=1)


def test_replace_leaves_a_module_as_if_it_had_been_built_so():
    """flax marks an attribute as data or static when it is first set; None is static, a part or parameter is data."""
    plain, biased = Linear(D, D), Linear(D, D, bias=True)
    added, removed = ir.replace(plain, bias=biased.bias), ir.replace(biased, bias=None)
    assert ir.signature(added) == ir.signature(biased) and hash(ir.signature(added)) == hash(ir.signature(biased))
    assert ir.signature(removed) == ir.signature(plain)
    bare, normed = (
        Attention(D, heads=2, kv_heads=1, head_dim=8, rope=None, norm=norm) for norm in (None, lambda: RMSNorm(8))
    )
    other = ir.replace(bare, q_norm=RMSNorm(8), k_norm=RMSNorm(8))
    assert ir.signature(other) == ir.signature(normed) and ir.describe(other) == ir.describe(normed)
    untied = ir.shallow(tiny("A"))
    ir.put(untied, "output", Linear(D, VOCAB))
    assert [name for name, _ in ir.children(untied)] == ["embed", "layers/0", "norm", "output"]


def test_get_and_put(model):
    copy = ir.shallow(model)
    other = packed(ir.get(copy, "layers/3/mlp/down"))
    ir.put(copy, "layers/3/mlp/down", other)
    assert ir.get(copy, "layers/3/mlp/down") is other and copy.layers[3].mlp.down is other
    assert is_qtensor(copy.layers[3].mlp.down.weight.get_value())
    assert not is_qtensor(model.layers[3].mlp.down.weight.get_value()), "the source keeps its own"
    block = ir.replace(copy.layers[5], mlp=None)
    ir.put(copy, "layers/5", block)
    assert copy.layers[5] is block and model.layers[5] is not block
    assert ir.get(model, "") is model
    assert ir.get(model, "layers/2/mixer/cache").window == 6


@pytest.mark.parametrize(
    "path, told",
    [
        ("layers/0/mixr", r"nothing at 'mixr'; did you mean 'mixer'\?"),
        ("layers/0/mixer/q/wieght", "did you mean 'weight'"),
        ("layers/99", "nothing at '99'; allowed: 0, 1, 2"),
        ("layers/x", "nothing at 'x'; allowed: 0, 1, 2"),
        ("embed/3", "nothing at '3'; allowed: "),
        ("norm/eps/deeper", "nothing at 'deeper'"),
        ("zzz/q", "nothing at 'zzz'; allowed: context, draft, embed"),
    ],
)
def test_paths_that_lead_nowhere(model, path, told):
    with pytest.raises(PassError, match=told):
        ir.get(model, path)
    with pytest.raises(PassError, match=told):
        ir.put(ir.shallow(model), path, model.norm)


def test_walk_and_params_name_the_same_tree(model):
    modules = dict(ir.walk(model))
    params = ir.params(model)
    assert modules[""] is model and next(iter(modules)) == ""
    for path, variable in params.items():
        parent, _, name = path.rpartition("/")
        assert getattr(modules[parent], name) is variable
        assert ir.get(model, path) is variable
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert len(leaves) == len(params) and ir.weight_bytes(model) == sum(leaf.nbytes for leaf in leaves)


def test_abstract_and_back(model):
    shapes = ir.abstract(model)
    assert ir.is_abstract(shapes) and not ir.is_abstract(model)
    assert ir.signature(shapes) == ir.signature(model) == ir.signature(tiny())
    assert ir.signature(ir.abstract(shapes)) == ir.signature(shapes)
    assert ir.diff(shapes, model) == "" and ir.describe(shapes) == ir.describe(model)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    graph, state = nnx.split(shapes)
    logits = jax.eval_shape(lambda state, t: nnx.merge(graph, state)(t), state, tokens)
    assert (logits.shape, logits.dtype) == ((2, 5, VOCAB), jnp.float32)


def test_init_weights_is_seeded_and_scaled():
    first, same, other = (ir.init_weights(tiny("AM"), seed=seed) for seed in (0, 0, 1))
    for (path, a), b, c in zip(ir.params(first).items(), ir.params(same).values(), ir.params(other).values()):
        a, b, c = (np.asarray(v.get_value()) for v in (a, b, c))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c), path
    wide = np.asarray(ir.init_weights(Linear(256, 64)).weight.get_value())
    assert abs(wide.std() * 16 - 1) < 0.05
    assert ir.init_weights(Linear(8, 8, dtype="bfloat16")).weight.dtype == jnp.bfloat16


def test_packing_keeps_one_signature_in_both_forms(linear):
    concrete, shapes = packed(linear), packed(ir.abstract(linear))
    assert isinstance(shapes.weight.get_value(), QTensor) and ir.is_abstract(shapes)
    assert ir.signature(concrete) == ir.signature(shapes) == ir.signature(ir.abstract(concrete))
    hash(ir.signature(concrete))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: ir.replace(m, cache=m.cache.replace(window=5)),
        lambda m: ir.replace(m, scale=0.1),
        lambda m: ir.replace(m, rope=None),
        lambda m: ir.replace(m, q_norm=None),
        lambda m: ir.replace(m, q=packed(m.q)),
        lambda m: ir.replace(m, q=ir.replace(m.q, weight=m.q.weight.get_value().astype(jnp.bfloat16))),
    ],
    ids=["spec", "float", "none", "child", "format", "dtype"],
)
def test_signature_and_diff_see_every_change(model, change):
    before = model.layers[0].mixer
    after = change(before)
    assert ir.signature(after) != ir.signature(before)
    assert ir.diff(before, after) != ""
    same = ir.replace(before, q=ir.replace(before.q, weight=before.q.weight.get_value() + 1))
    assert ir.signature(same) == ir.signature(before) and ir.diff(before, same) == "", "values are not structure"


# Printing.


def test_describe_golden():
    text = ir.describe(golden_model())
    assert text == GOLDEN.read_text(encoding="utf-8"), "run `python tests/test_ir.py` when the change is meant"


def test_describe_folds_equal_layers_that_are_not_adjacent():
    text = ir.describe(tiny("AWAWA"))
    assert "layers/0,2,4: Block" in text and "layers/1,3: Block" in text
    assert text.count("Block") == 2
    lone = ir.describe(tiny("A"))
    folded = [entry.bytes for entry in ir.entries(tiny("AWAWA")) if entry.path.startswith("layers/0,2,4")]
    assert sum(folded) == 3 * sum(e.bytes for e in ir.entries(tiny("A")) if e.path.startswith("layers/0"))
    assert "layers/0: Block" in lone


@pytest.mark.parametrize("layers", ["A", "AAWASLMA", "AWAWA"])
def test_entries_bytes_add_up(layers):
    tree = tiny(layers)
    assert sum(entry.bytes for entry in ir.entries(tree)) == ir.weight_bytes(tree)


def test_diff_names_full_paths(model):
    copy = ir.shallow(model)
    ir.put(copy, "layers/6/mlp/up", packed(copy.layers[6].mlp.up))
    assert ir.diff(model, copy) == (
        f"-layers/6/mlp/up: Linear f32[{D}, {2 * D}]\n+layers/6/mlp/up: Linear int4_g8[{D}, {2 * D}]\n"
    )
    assert ir.diff(model, model) == "" == ir.diff(model, ir.shallow(model))


def test_diff_shows_a_layer_that_left_its_fold(model):
    copy = ir.shallow(model)
    ir.put(copy, "layers/1/mixer", ir.replace(copy.layers[1].mixer, softcap=20.0))
    text = ir.diff(model, copy)
    assert "-layers/0-1,3,7/mixer: Attention" in text
    assert "+layers/0,3,7/mixer: Attention" in text
    assert "+layers/1/mixer: Attention" in text and "softcap=20" in text


def test_summary_counts_cache_by_kind(model):
    k, v = 2 * 8, 2 * 8
    dense, int8 = 4 * (k + v), (k + v) + 2 * (2 + 2)
    latent = 4 * (8 + 4)
    state = 4 * (3 * (16 + 8) + 2 * 8 * 4)
    want = f"KV {4 * dense + int8 + latent:,} B/token, state {state:,} B/row"
    assert ir.summary(model).endswith(want)


def test_size_text():
    assert [ir.size_text(n) for n in (999, 1000, 538_100_000, 15.1e9, 2e12)] == [
        "999 B",
        "1.0 kB",
        "538.1 MB",
        "15.1 GB",
        "2.00 TB",
    ]


if __name__ == "__main__":
    GOLDEN.write_text(ir.describe(golden_model()), encoding="utf-8")
