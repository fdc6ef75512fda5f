"""gqa: pooled heads that are equal up to turns cost nothing, like goes to like, and calibrated pooling loses less than means."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest
from test_turboquant import NAMES, shapes

import optx
from optx import ir
from optx.errors import LegalityError, OptxError, PassError
from optx.nn import Attention
from optx.nn.core import Linear
from optx.passes.gqa import Gqa, alike
from optx.recipe import Recipe

POOLS = ("mean", "aligned")


def through(model, text=None, **options):
    return calibrated.through(model, Recipe(structure=[Gqa(**options)]), text)[0]


def heads_of(linear: Linear, heads: int) -> np.ndarray:
    return np.array(linear.weight.get_value()).reshape(linear.weight.get_value().shape[0], heads, -1)


def with_weight(linear: Linear, heads: np.ndarray) -> Linear:
    return ir.replace(linear, weight=jnp.asarray(heads.reshape(len(heads), -1), jnp.float32))


def copied(family: str, pairs, *, turned: bool):
    """A model whose kv heads of a pair are equal; turned: the second is the first one in other coordinates, keys by a turn and
    a scale in each frequency's plane, values by any rotation."""
    model = families.concrete(family, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    rng, tree = np.random.default_rng(3), ir.shallow(model)
    for layer in tree.layers:
        attn = layer.mixer
        k, v = heads_of(attn.k, 4), heads_of(attn.v, 4)
        for one, two in pairs:
            k[:, two], v[:, two] = k[:, one], v[:, one]
            if turned:
                z = rng.normal(size=4) + 1j * rng.normal(size=4)
                plane = (k[:, one, :4] + 1j * k[:, one, 4:]) * z
                k[:, two] = np.concatenate([plane.real, plane.imag], axis=-1)
                v[:, two] = v[:, one] @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
        layer.mixer = ir.replace(attn, k=with_weight(attn.k, k), v=with_weight(attn.v, v))
    return tree


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_equal_neighbours_pool_exactly(family, pool):
    """Also with normed heads, in the order of their neighbours, so that means find them."""
    model, tokens = copied(family, [(0, 1), (2, 3)], turned=False), families.prompt(20)
    tree = through(model, kv_heads=2, pool=pool)
    assert tree.layers[0].mixer.kv_heads == 2
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) < 1e-4
    assert tree.cache_plan().unit_bytes == model.cache_plan().unit_bytes / 2


def test_like_heads_are_found_and_aligned():
    """Heads 0 and 3, 1 and 2, in other coordinates: means of neighbours lose them, alignment nothing."""
    model, tokens = copied("llama", [(0, 3), (2, 1)], turned=True), families.prompt(20)
    want = families.forward(model, tokens)
    tree = through(model, kv_heads=2)
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.forward(through(model, kv_heads=2, pool="mean"), tokens), want) > 0.1
    got = families.incremental(tree, tokens, sizes=(7, 1))
    assert families.relative(got, families.forward(tree, tokens)) < 1e-4


def test_groups_are_of_what_loses_least():
    losses = np.array([[0, 5, 1, 9], [5, 0, 8, 2], [1, 8, 0, 7], [9, 2, 7, 0]], float)
    assert alike(losses, 2) == [[0, 2], [1, 3]]
    assert alike(losses, 4) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("family", NAMES)
def test_every_family_runs_or_is_refused_on_shapes(family):
    """Sinks, gates, partial and no rotary embeddings, biases: what is planned is what weights become."""
    model = ir.init_weights(shapes(family), seed=1)
    recipe = Recipe(structure=[Gqa(kv_heads=1)])
    if all(x.mixer.kv_heads == 1 for x in model.layers if isinstance(x.mixer, Attention)):
        with pytest.raises(PassError, match="changed nothing: has 1 kv heads"):
            optx.plan(shapes(family), recipe)
        return
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    want = families.forward(model, tokens)
    lost = [families.relative(families.forward(through(model, kv_heads=1, pool=p), tokens), want) for p in POOLS]
    assert np.isfinite(lost).all() and lost[1] <= lost[0], lost
    normed = any(isinstance(x.mixer, Attention) and x.mixer.k_norm is not None for x in model.layers)
    assert normed or lost[1] < lost[0], lost


def test_before_expected():
    planned = optx.plan(families.abstract("llama"), Recipe(structure=[Gqa(kv_heads=1)]))
    assert planned.records[0].diff.splitlines() == [
        "-layers/0-1/mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)",
        "+layers/0-1/mixer: Attention heads=4 kv_heads=1 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)",
        "-layers/0-1/mixer/k: Linear f32[32, 16]",
        "-layers/0-1/mixer/v: Linear f32[32, 16]",
        "+layers/0-1/mixer/k: Linear f32[32, 8]",
        "+layers/0-1/mixer/v: Linear f32[32, 8]",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "gqa at layers/./mixer: kv_heads 3; allowed: a number that divides its 2 and is smaller"),
        ({"kv_heads": 0}, "kv_heads 0; allowed"),
        ({"kv_heads": 4}, "kv_heads 4; allowed"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PassError, match=message):
        optx.plan(families.abstract("llama"), Recipe(structure=[Gqa(**options)]))


def test_a_cache_that_another_layer_reads_keeps_its_heads():
    with pytest.raises(LegalityError, match="reads_other_heads"):
        optx.plan(ir.abstract(families.hybrid()), Recipe(structure=[Gqa(kv_heads=1, match="layers/0/.*")]))


def test_calibration_text_is_asked_for():
    with pytest.raises(OptxError, match="inputs"):
        optx.compile(families.concrete("llama"), Recipe(structure=[Gqa(kv_heads=1)]), target="cpu")
