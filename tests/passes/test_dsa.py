"""dsa: an index of principal components that tells what attention is, tokens chosen by it alone, and steps that agree."""

import dataclasses
import functools

import calibrated
import families
import healing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selecting
from flax import nnx

import optx
from optx import ir
from optx.cache import Ragged
from optx.checkpoint.source import fill, from_module
from optx.cost import step_bytes, step_ops
from optx.engine.engine import Engine
from optx.errors import LegalityError, PassError, RecipeError
from optx.heal import heal
from optx.heal_loss import losses, values_of
from optx.heal_state import LOG, rows
from optx.passes.dsa import Dsa
from optx.passes.mla import Mla
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.turboquant import TurboQuant
from optx.recipe import Recipe

SMALL = Dsa(top_k=9, dim=8, by="weights")


@functools.cache
def compiled(family="llama", rule=SMALL, **stages):
    return optx.compile(families.concrete(family), Recipe(attention=(rule,), **stages))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_exact_where_all_tokens_are_chosen(family):
    model, tokens = families.concrete(family), families.prompt(23)
    want, tree = families.forward(model, tokens), compiled(family, dataclasses.replace(SMALL, top_k=24)).tree
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.incremental(tree, tokens), want) < 1e-4
    assert families.relative(families.forward(compiled(family).tree, tokens), want) > 0.01


def index_of(attn, x):
    """Logits of the index [Q, N, S], and attention's own."""
    q, k, _ = attn.turned(jnp.asarray(x), jnp.arange(len(x)))
    asked = jnp.einsum("tnh,nhi->tni", q, attn.select.asked.get_value())
    kept = attn.select.entries(k[:, None], None)["index"][:, 0]
    own = jnp.einsum("tnh,snh->tns", q, jnp.repeat(k, attn.heads // attn.kv_heads, axis=1))
    return np.asarray(jnp.einsum("tni,si->tns", asked, kept)), np.asarray(own)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_index_of_all_components_has_the_logits_of_attention(family):
    """Whatever the positions: components are turned as the keys are. Fewer give part of them, the more the better."""
    x = np.random.default_rng(0).normal(size=(40, families.D)).astype(np.float32)
    errors = []
    for dim in (2, 8, None):
        model = families.concrete(family)
        attn = model.layers[-1].mixer
        dim = attn.kv_heads * attn.head_dim if dim is None else dim
        found, want = index_of(compiled(family, Dsa(top_k=9, dim=dim, by="weights")).tree.layers[-1].mixer, x)
        errors.append(families.relative(found, want))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4, errors


@pytest.mark.parametrize("rule", ["softmax", "relu"])
def test_a_layer_equals_the_equations(rule):
    attn = compiled("qwen3", dataclasses.replace(SMALL, rule=rule)).tree.layers[0].mixer
    x = np.random.default_rng(1).normal(size=(31, families.D)).astype(np.float32)
    q, k, v = (np.asarray(y, np.float64) for y in attn.turned(jnp.asarray(x), jnp.arange(31)))
    index, out = index_of(attn, x)[0].astype(np.float64) * attn.scale, np.zeros((31, attn.heads, attn.head_dim))
    for at in range(31):
        shown = index[at, :, : at + 1]
        each = np.maximum(shown, 0) if rule == "relu" else np.exp(shown) / np.exp(shown).sum(-1, keepdims=True)
        best = np.argsort(-each.sum(0), kind="stable")[: SMALL.top_k]
        for n in range(attn.heads):
            head = n // (attn.heads // attn.kv_heads)
            weights = np.exp(k[best, head] @ q[at, n] * attn.scale)
            out[at, n] = weights / weights.sum() @ v[best, head]
    found, _ = attn(jnp.asarray(x), Ragged.dense(1, 31), None)
    assert families.relative(found, out.reshape(31, -1) @ np.asarray(attn.o.weight.get_value(), np.float64)) < 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_chunks_and_decodes_are_the_forward(family):
    tree, tokens = compiled(family).tree, families.prompt(37)
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, (13, 1, 2, 9)), want) < 1e-5


@pytest.mark.parametrize("way", selecting.WAYS)
def test_the_engine_answers_as_the_forward(way):
    engine = Engine(compiled().program, selecting.WAYS[way])
    assert [selecting.answers(engine) for _ in range(2)] == [greedy()] * 2
    assert engine.stats().prefix_hit_tokens > 0


@functools.cache
def greedy():
    return selecting.greedy(compiled().tree)


def test_calibration_text_chooses_what_an_index_keeps():
    """Keys that vary in a plane that weights do not tell of: an index of two numbers finds it in text alone."""
    model, windows = families.concrete("llama"), calibrated.windows(families.concrete("llama"), length=40)
    errors = []
    for by in ("weights", "text"):
        tree, _ = calibrated.through(model, Recipe(attention=[Dsa(top_k=9, dim=4, by=by)]), windows)
        layer = tree.layers[0]
        x = np.asarray(layer.norm(model.embed(jnp.asarray(windows[0][0]))))
        errors.append(families.relative(*index_of(layer.mixer, x)))
    assert errors[1] < errors[0], errors
    with pytest.raises(RecipeError, match="dsa.*calibration"):
        optx.compile(from_module(model, "tiny", families.tokenizer()), Recipe(attention=[Dsa(top_k=9)]))


@pytest.mark.parametrize("rule", ["softmax", "relu"])
def test_the_loss_of_an_index_against_numpy(rule):
    """KL(attention of all heads || index) a token; sinks take part in attention, and carry nothing."""
    attn = compiled("qwen3", dataclasses.replace(SMALL, rule=rule)).tree.layers[-1].mixer
    logits = np.linspace(-2, 2, attn.heads, dtype=np.float32)
    attn = ir.replace(attn, sinks=nnx.Param(jnp.asarray(logits)))
    x = np.random.default_rng(2).normal(size=(2 * 13, families.D)).astype(np.float32)
    ragged, found = Ragged.dense(2, 13), []
    q, k, _ = attn.turned(jnp.asarray(x), ragged.positions)
    for row in (0, 1):
        index, own = (np.float64(y) * attn.scale for y in index_of(attn, x[13 * row : 13 * row + 13]))
        for t in range(13):
            p = np.exp(own[t, :, : t + 1])
            p = (p / (p.sum(-1, keepdims=True) + np.exp(logits)[:, None])).sum(0)
            i = np.exp(index[t, :, : t + 1])
            i = (i / i.sum(-1, keepdims=True)).sum(0) if rule == "softmax" else np.exp(np.log(np.maximum(i, 1)).sum(0))
            p, i = p / p.sum(), i / i.sum()
            found.append((p * np.log(p / i)).sum())
    assert attn.select.loss(attn, q, k, ragged) == pytest.approx(np.mean(found), rel=1e-4)


@pytest.mark.parametrize("rule", ["softmax", "relu"])
def test_an_index_learns_by_a_loss_that_moves_nothing_else(rule):
    model, tree = families.concrete("llama"), compiled(rule=dataclasses.replace(SMALL, rule=rule)).tree
    forms, values = (ir.abstract(model), ir.abstract(tree)), (values_of(model), values_of(tree))
    tokens = jnp.asarray([families.prompt(24, seed) for seed in (1, 2)], jnp.int32)

    def of(name):
        def loss(moved):
            pair = (fill(form, x.__getitem__) for form, x in zip(forms, (values[0], moved), strict=True))
            return losses(*pair, tokens, hidden=False)[0][name]

        slopes = jax.jit(jax.grad(loss))(values[1])
        return {name for name, slope in slopes.items() if np.any(np.asarray(slope))}

    index = {name for name in values[1] if "/select/" in name}
    assert len(index) == 6 and of("auxiliary") == index and not of("kl") & index


def test_healing_trains_the_index(tmp_path):
    source = healing.source()
    student = optx.compile(source, Recipe(attention=[SMALL])).tree
    options = healing.options(tmp_path, steps=40, every=40, train="converted", lr=1e-2)
    heal(source, source.load(), student, options, folder=tmp_path / "state")
    found = [row["auxiliary"] for row in rows(tmp_path / "state" / LOG) if row["kind"] == "train"]
    assert len(found) == 40 and np.mean(found[-5:]) < 0.7 * np.mean(found[:5]), found


def test_bytes_and_operations_of_a_step():
    """Of a token 256 B of keys and values in two layers and 64 B of an index of 8 numbers."""
    model, tree = families.concrete("llama"), compiled().tree
    assert step_bytes(tree, 1, 9).kv == step_bytes(model, 1, 9).kv == 9 * 256
    assert step_bytes(tree, 2, 1000).kv == 2 * (9 * 256 + 64 * 1000)
    assert tree.cache_plan().unit_bytes == 256 + 64
    (first, _) = (op for op in step_ops(tree, context=1000) if op.op == "attention")
    assert first.flops == 2 * 4 * 16 * 9 + 2 * 4 * 8 * 1000
    assert [site.op for site in tree.layers[0].mixer.op_sites()].count("indexed_attention") == 1


def test_over_packed_pages_and_reloaded(tmp_path):
    """The index is of keys as they are stored, and dense."""
    folder, _ = families.hf_dir(tmp_path / "hf", "llama", add_bos=False)
    made = optx.compile(optx.load(folder), Recipe(attention=[SMALL], cache=[QuantizeKV(format="int8")]))
    tokens = families.prompt(37)
    want = families.forward(made.tree, tokens)
    assert families.relative(families.incremental(made.tree, tokens, (11, 1)), want) < 1e-4
    again = optx.compile(optx.load(optx.export(made, tmp_path / "out")))
    np.testing.assert_array_equal(again.logits([tokens])[0], made.logits([tokens])[0])
    assert "select: KeyIndexer" in ir.describe(again.tree)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"top_k": 0}, "dsa: top_k 0; allowed: 1 to 2147483647"),
        ({"dim": 3}, "dsa at layers/./mixer: dim 3; allowed: an even number, 2 to 16, all numbers of its keys"),
        ({"dim": 18}, "dim 18; allowed: an even number, 2 to 16"),
    ],
    ids=str,
)
def test_wrong_options(options, told):
    with pytest.raises(PassError, match=told):
        optx.plan(families.abstract("llama"), Recipe(attention=[Dsa(**options)]))


@pytest.mark.parametrize(
    "recipe, error, told",
    [
        ({"attention": (Mla(), SMALL)}, PassError, "dsa changed nothing: GroupedMLA keeps one latent of 64 numbers"),
        ({"fold": (TurboQuant(),)}, LegalityError, "rotated_under_index"),
        ({"cache": (QuantizeKV(format="fp8_e4m3", scale="head"),)}, LegalityError, "index_of_scaled_heads"),
    ],
    ids=["latents", "rotated", "scales"],
)
def test_what_does_not_go_together(recipe, error, told):
    with pytest.raises(error, match=told):
        optx.plan(families.abstract("llama", head_dim=16), Recipe(**{"attention": (SMALL,), **recipe}))
