"""moba behind mla: one choice of blocks for all heads, by means of latents, in every form of a step."""

import functools

import families
import jax.numpy as jnp
import numpy as np
import pytest
import selecting

import optx
from optx.cost import step_bytes
from optx.engine.engine import Engine
from optx.nn.grouped_mla import GroupedMLA
from optx.passes.mla import Mla
from optx.passes.moba import Moba
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

P = selecting.P
SMALL = Moba(block=P, top_k=3, first=1)


@functools.cache
def compiled(family="llama", rule=SMALL, **stages):
    return optx.compile(families.concrete(family), Recipe(attention=(Mla(), rule), **stages))


@pytest.mark.parametrize(
    "family, changes",
    [("llama", {}), ("llama", {"attention_bias": True}), ("qwen3", {})],
    ids=["llama", "biases", "qwen3"],
)
def test_exact_where_all_blocks_are_chosen(family, changes):
    """Also with biases, and under norms of heads, whose scales lie beside the latents."""
    model, tokens = families.concrete(family, **changes), families.prompt(23)
    every = optx.compile(model, Recipe(attention=(Mla(), Moba(block=P, top_k=6, first=0))))
    want = families.forward(model, tokens)
    assert any(isinstance(layer.mixer, GroupedMLA) and layer.mixer.select is not None for layer in every.tree.layers)
    assert families.relative(every.logits([tokens])[0], want) < 1e-4
    assert families.relative(families.incremental(every.tree, tokens, page_size=P), want) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_equal_the_forward_and_leave_blocks_out(family):
    tree, tokens = compiled(family).tree, families.prompt(33)
    whole = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, page_size=P), whole) < 1e-4
    assert families.relative(whole, families.forward(families.concrete(family), tokens)) > 1e-3


def test_a_layer_equals_the_rule_written_out():
    """Blocks by the sum over all heads of softmax(scale q' . mean of latents), queries absorbed; float64."""
    attn = compiled().tree.layers[0].mixer
    x = jnp.asarray(np.random.default_rng(2).normal(size=(30, families.D)), jnp.float32)
    ragged = optx.ragged.Ragged.dense(1, 30)
    up = np.asarray(attn.kv_b.weight.get_value(), np.float32).reshape(attn.rank, attn.kv_heads, -1)
    *asked, _ = attn._asked(x, ragged)
    q = np.asarray(attn._absorbed(*asked, jnp.asarray(up[..., : attn.nope_dim])), np.float64)
    latents = np.asarray(attn._left(x, ragged)["latent"][:, 0], np.float64)
    low = np.zeros((30, attn.heads, attn.rank))
    for at in range(30):
        own = at // P
        means = np.stack([latents[b * P : (b + 1) * P].mean(0) for b in range(max(own, 1))])
        weights = np.exp(q[at] @ means.T * attn.scale)
        share = (weights / weights.sum(-1, keepdims=True)).sum(0)
        best = sorted(range(1, own), key=lambda b: share[b], reverse=True)[: 3 - len({0, own})]
        seen = [t for t in range(at + 1) if t // P in {0, own, *best}]
        logits = q[at] @ latents[seen].T * attn.scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        low[at] = weights / weights.sum(-1, keepdims=True) @ latents[seen][:, : attn.rank]
    group = attn.heads // attn.kv_heads
    out = np.einsum("tkgr,rkh->tkgh", low.reshape(30, attn.kv_heads, group, -1), up[..., attn.nope_dim :])
    want = out.reshape(30, -1) @ np.asarray(attn.o.weight.get_value(), np.float64)
    np.testing.assert_allclose(attn(x, ragged, None)[0], want, atol=1e-4)


@pytest.mark.parametrize("way", selecting.WAYS)
def test_the_engine_answers_as_the_forward(way):
    engine = Engine(compiled().program, selecting.WAYS[way])
    assert selecting.answers(engine) == selecting.greedy(compiled().tree)


def test_a_decode_reads_three_pages_for_all_heads():
    assert selecting.lists_read(compiled().tree, 40) == [(1, 1, 3)] * 2


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_latents_are_chosen_among_by_plain_means(format):
    tree, tokens = compiled(cache=(QuantizeKV(format=format),)).tree, families.prompt(33)
    whole, plain = families.forward(tree, tokens), families.forward(compiled().tree, tokens)
    assert families.relative(families.incremental(tree, tokens, page_size=P), whole) < 0.2
    assert 1e-5 < families.relative(whole, plain) < {"int8": 0.05, "int4": 0.6}[format]
    assert [s.name for s in tree.layers[0].mixer.cache.index] == ["mean"]


def test_bytes_of_a_million_tokens():
    """Qwen3-8B: a latent of 192 and 64 rotated numbers is 147,456 B of keys and values in 18,432, and in int4 in 4,608, beside
    scales of latents and of normed heads and a mean for 64 tokens."""
    stages = {"attention": (Mla(rank=192, rope="pca", rope_dim=64), Moba(block=64, top_k=128))}
    plain = optx.plan(optx.load_config(optx.configs.model_path("qwen3-8b")), Recipe(**stages), "h100")
    packed = optx.plan(
        optx.load_config(optx.configs.model_path("qwen3-8b")),
        Recipe(**stages, cache=(QuantizeKV(format="int4"),)),
        "h100",
    )
    norms, means = 36 * 8 * 2, 36 * 256 * 2 / 64
    assert plain.tree.cache_plan().unit_bytes == 36 * 256 * 2 + norms + means == 19_296
    assert packed.tree.cache_plan().unit_bytes == 36 * (128 + 2 * 2) + norms + means == 5_616
    read = step_bytes(packed.tree, 1, 10**6).kv
    assert read == pytest.approx(36 * (128 + 4 + 16) * 128 * 64 + means * 10**6)
