"""nsa: its equations written out, attention itself where all blocks are chosen, bytes as published, and steps that agree."""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selecting
from flax import nnx

import optx
from optx import ir
from optx.cache import Ragged
from optx.cost import Selection, step_bytes
from optx.engine.engine import Engine
from optx.errors import LegalityError, PassError
from optx.passes.nsa import Nsa
from optx.passes.rotate import Rotate
from optx.passes.turboquant import TurboQuant
from optx.recipe import Recipe

P = selecting.P
SMALL = Nsa(block=8, top_k=3, size=4, stride=2, window=6, local=1, mix=0.6)
EVERY = Nsa(block=P, top_k=6, size=4, stride=2, window=6, local=1, mix=0)


@functools.cache
def compiled(family="llama", rule=SMALL, **stages):
    return optx.compile(families.concrete(family), Recipe(attention=(rule,), **stages))


@functools.cache
def trained(family="llama", hidden=8):
    """The tree with gates and MLPs as training might leave them."""
    tree = compiled(family, Nsa(block=8, top_k=3, size=4, stride=2, window=6, local=1, hidden=hidden)).tree
    copy, rng = ir.shallow(tree), np.random.default_rng(2)
    for path, variable in ir.params(tree).items():
        if "/select/" in path:
            parent, name = path.rsplit("/", 1)
            value = variable.get_value()
            drawn = jnp.asarray(rng.normal(size=value.shape) * 0.5, value.dtype)
            ir.put(copy, parent, ir.replace(ir.get(copy, parent), **{name: drawn}))
    return copy


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def literal(attn, x) -> np.ndarray:
    """The layer on x [T, D] by the paper's equations, query by query in float64, with means."""
    s = attn.select
    length, group = len(x), attn.heads // attn.kv_heads
    q, k, v = (np.asarray(y, np.float64) for y in attn.turned(jnp.asarray(x), jnp.arange(length)))
    gate = x @ np.asarray(s.gate.weight.get_value(), np.float64) + np.asarray(s.gate.bias.get_value(), np.float64)
    gate = (1 / (1 + np.exp(-gate))).reshape(length, attn.heads, 3)
    out = np.zeros((length, attn.heads, attn.head_dim))
    for at in range(length):
        spans = [range(i, i + s.size) for i in range(0, at + 2 - s.size, s.every)]
        own = at // s.block
        for head in range(attn.kv_heads):
            asked = q[at, head * group : (head + 1) * group] * attn.scale
            score = np.zeros(own + 1)
            for n, one in enumerate(asked, head * group):
                if spans:
                    pooled = [np.stack([y[list(span), head].mean(0) for span in spans]) for y in (k, v)]
                    weights = softmax(pooled[0] @ one)
                    out[at, n] += gate[at, n, 0] * (weights @ pooled[1])
                    for weight, span in zip(weights, spans, strict=True):
                        for first in span[:: s.every]:  # once for each stride of the block that it overlaps
                            score[first // s.block] += weight
                near = list(range(max(0, at + 1 - s.window), at + 1))
                out[at, n] += gate[at, n, 2] * (softmax(k[near, head] @ one) @ v[near, head])
            always = {b for b in range(own + 1) if b < s.first or b > own - s.local}
            rest = sorted((b for b in range(own) if b not in always), key=lambda b: score[b], reverse=True)
            blocks = always | set(rest[: s.blocks - len(always)])
            seen = [t for t in range(at + 1) if t // s.block in blocks]
            for n, one in enumerate(asked, head * group):
                out[at, n] += gate[at, n, 1] * (softmax(k[seen, head] @ one) @ v[seen, head])
    return out.reshape(length, -1) @ np.asarray(attn.o.weight.get_value(), np.float64)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_attention_itself_where_all_blocks_are_chosen(family):
    model, tokens = families.concrete(family), families.prompt(23)
    want, tree = families.forward(model, tokens), compiled(family, EVERY).tree
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.incremental(tree, tokens, page_size=P), want) < 1e-4
    assert families.relative(families.forward(compiled(family).tree, tokens), want) > 0.01


def test_a_layer_equals_the_equations():
    attn = trained(hidden=None).layers[0].mixer
    x = np.random.default_rng(0).normal(size=(45, families.D)).astype(np.float32)
    found, _ = attn(jnp.asarray(x), Ragged.dense(1, 45), None)
    assert families.relative(found, literal(attn, x)) < 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("sizes, page", [((1,), 4), ((13, 1, 2, 9), 8)])
def test_chunks_and_decodes_are_the_forward(family, sizes, page):
    """MLPs compress, blocks of one page and of two."""
    tree, tokens = trained(family), families.prompt(45)
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes, page_size=page), want) < 1e-5


@pytest.mark.parametrize("way", selecting.WAYS)
def test_the_engine_answers_as_the_forward(way):
    engine = Engine(compiled().program, selecting.WAYS[way])
    assert [selecting.answers(engine) for _ in range(2)] == [greedy()] * 2
    assert engine.stats().prefix_hit_tokens > 0


@functools.cache
def greedy():
    return selecting.greedy(compiled().tree)


def test_a_decode_reads_chosen_pages_and_those_of_the_window():
    """By kv head three blocks of two pages, and for all heads what six tokens can lie in; twelve pages hold the row."""
    assert selecting.lists_read(compiled().tree, 48) == [(2, 1, 6), (1, 1, 3)] * 2


def test_bytes_of_a_step_are_those_published():
    """L / 16 + 16 * 64 + 512 tokens: 4.0, 6.4, 9.1, 11.6 times fewer at 8 to 64 thousand."""
    model, tree = (optx.plan(families.abstract("llama"), Recipe(attention=rule)).tree for rule in ((), (Nsa(),)))
    published = Selection(stride=16, blocks=16, block=64, window=512)
    for context, ratio in ((8, 4.0), (16, 6.4), (32, 9.1), (64, 11.6)):
        read = [step_bytes(each, 1, 1024 * context).kv for each in (model, tree)]
        assert read[1] == 256 * published.tokens(1024 * context)
        assert read[0] / read[1] == pytest.approx(ratio, abs=0.05)
    assert tree.cache_plan().unit_bytes == 256 * (1 + 1 / 16)


def test_the_start_can_be_trained():
    """Gates and the last layer of MLPs get gradients at the start."""
    tree = compiled(rule=Nsa(block=8, top_k=3, size=4, stride=2, window=6, local=1, hidden=8)).tree
    tokens = jnp.asarray([families.prompt(40)])
    graph, state = nnx.split(tree)
    grads = nnx.merge(graph, jax.grad(lambda state: jnp.var(nnx.merge(graph, state)(tokens)))(state))
    for path in ("gate/weight", "gate/bias", "pool_k/up/weight", "pool_v/up/weight"):
        for layer in range(2):
            found = ir.get(grads, f"layers/{layer}/mixer/select/{path}").get_value()
            assert float(jnp.abs(found).max()) > 1e-6, path


def test_an_export_reloads(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "hf", "llama", add_bos=False)
    made = optx.compile(optx.load(folder), Recipe(attention=[SMALL]))
    again = optx.compile(optx.load(optx.export(made, tmp_path / "out")))
    tokens = families.prompt(40)
    np.testing.assert_array_equal(again.logits([tokens])[0], made.logits([tokens])[0])
    assert again.plan.tree.cache_plan() == made.tree.cache_plan()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"top_k": 0}, "nsa: top_k 0; allowed: 1 to 2147483647"),
        ({"window": 0}, "nsa: window 0; allowed: 1 to"),
        ({"stride": 12}, "nsa: stride 12; allowed: what divides size 32 and block 64"),
        ({"block": 24}, "nsa: stride 16; allowed: what divides size 32 and block 24"),
        ({"top_k": 2}, "nsa: first 1 and local 2 of top_k 2 blocks; allowed: no more than all"),
        ({"mix": 1.0}, "nsa: mix 1; allowed: at least 0 and below 1"),
        ({"hidden": 0}, "nsa: hidden 0; allowed: at least 1, or null"),
    ],
    ids=str,
)
def test_wrong_options(options, told):
    with pytest.raises(PassError, match=told):
        optx.plan(families.abstract("llama"), Recipe(attention=[Nsa(**options)]))


def test_trained_gates_rotate_along():
    tree, tokens = trained(hidden=None), families.prompt(37)
    turned = optx.compile(tree, Recipe(fold=[Rotate()])).tree
    assert families.relative(families.forward(turned, tokens), families.forward(tree, tokens)) < 1e-4


@pytest.mark.parametrize("rule", [Rotate(), TurboQuant()], ids=["rotate", "turboquant"])
def test_mlps_do_not_rotate_along(rule):
    """Means do: then nothing is refused, and rotated values give what they gave."""
    wide = {"head_dim": 16}
    mlp, means = (Nsa(block=8, top_k=3, size=4, stride=2, window=6, local=1, hidden=h) for h in (4, None))
    with pytest.raises(LegalityError, match="rotated_under_index"):
        optx.plan(families.abstract("llama", **wide), Recipe(attention=[mlp], fold=[rule]))
    optx.plan(families.abstract("llama", **wide), Recipe(attention=[means], fold=[rule]))
