"""moba: exact where all blocks are chosen, one rule in every form of a step, and no page read that was not chosen."""

import dataclasses
import functools

import families
import jax.numpy as jnp
import numpy as np
import pytest
import selecting

import optx
from optx import ir
from optx.cost import step_bytes
from optx.engine.engine import Engine
from optx.engine.request import Sampling
from optx.errors import FormatError, LegalityError, PassError
from optx.nn.selecting import BlockMeans
from optx.pallas import dispatch
from optx.passes.evict_kv import EvictKV
from optx.passes.kivi import Kivi
from optx.passes.moba import Moba
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.sliding_window import SlidingWindow
from optx.passes.split_key_bias import SplitKeyBias
from optx.recipe import Recipe
from optx.target import TARGETS

P = selecting.P
SMALL = Moba(block=P, top_k=3, first=1)


@functools.cache
def compiled(family="llama", rule=SMALL, **stages):
    return optx.compile(families.concrete(family), Recipe(attention=(rule,), **stages))


def chosen_blocks(attn, q, k, at: int, rule) -> list[set[int]]:
    """By kv head the blocks that the query q [N, H] at position `at` reads of keys k [T, K, H]: the rule, written out."""
    own, group = at // rule.block, attn.heads // attn.kv_heads
    found = []
    for head in range(attn.kv_heads):
        means = np.stack([k[b * rule.block : (b + 1) * rule.block, head].mean(0) for b in range(own)] or [k[0, head]])
        weights = np.exp(q[head * group : (head + 1) * group] @ means.T * attn.scale)
        share = (weights / weights.sum(-1, keepdims=True)).sum(0)
        score = {b: share[b] for b in range(rule.first, own)}
        always = {own, *range(min(rule.first, own))}
        best = sorted(score, key=score.get, reverse=True)[: rule.top_k - len(always)]
        found.append(always | set(best))
    return found


def selected(attn, x, rule) -> np.ndarray:
    """The layer on x [T, D], query by query in float64."""
    length = len(x)
    q, k, v = (np.asarray(y, np.float64) for y in attn.turned(jnp.asarray(x), jnp.arange(length)))
    out = np.zeros((length, attn.heads, attn.head_dim))
    for at in range(length):
        for head, blocks in enumerate(chosen_blocks(attn, q[at], k, at, rule)):
            seen = [t for t in range(at + 1) if t // rule.block in blocks]
            for n in range(head * attn.heads // attn.kv_heads, (head + 1) * attn.heads // attn.kv_heads):
                logits = k[seen, head] @ q[at, n] * attn.scale
                weights = np.exp(logits - logits.max())
                out[at, n] = weights / weights.sum() @ v[seen, head]
    return out.reshape(length, -1) @ np.asarray(attn.o.weight.get_value(), np.float64)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_exact_where_all_blocks_are_chosen(family):
    model, tokens = families.concrete(family), families.prompt(23)
    every = compiled(family, Moba(block=P, top_k=6, first=0))
    want = families.forward(model, tokens)
    assert families.relative(every.logits([tokens])[0], want) < 1e-4
    assert families.relative(families.incremental(every.tree, tokens, page_size=P), want) < 1e-4
    assert families.relative(compiled(family).logits([tokens])[0], want) > 0.01, "the selection matters here"


@pytest.mark.parametrize("rule", [SMALL, Moba(block=8, top_k=2, first=0)], ids=str)
def test_a_layer_equals_the_rule_written_out(rule):
    attn = compiled("qwen3", rule).tree.layers[0].mixer
    x = np.random.default_rng(0).normal(size=(29, families.D)).astype(np.float32)
    found, _ = attn(jnp.asarray(x), optx.cache.Ragged.dense(1, 29), None)
    assert families.relative(found, selected(attn, x, rule)) < 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("sizes, page", [((1,), 4), ((13, 1, 2, 9), 2)])
def test_chunks_and_decodes_are_the_forward(family, sizes, page):
    """Pages as large as a block, and half as large with an index of halves."""
    tree, tokens = compiled(family).tree, families.prompt(37)
    if page == 2:
        layers = [part for part in tree.layers if part.mixer.select is not None]
        tree = with_entries(tree, layers, 2)
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes, page_size=page), want) < 1e-5


def with_entries(tree, layers, every):
    """The model with an entry of the index for so many tokens."""
    copy = ir.shallow(tree)
    for layer, own in zip(copy.layers, tree.layers, strict=True):
        if own in layers:
            select = BlockMeans(block=SMALL.block, blocks=SMALL.top_k, first=SMALL.first, every=every)
            streams = (*own.mixer.cache.streams[:2], *select.streams(own.mixer.kv_heads, own.mixer.head_dim))
            cache = own.mixer.cache.replace(streams=streams)
            layer.mixer = ir.replace(own.mixer, select=select, cache=cache)
    return copy


@functools.cache
def greedy():
    return selecting.greedy(compiled().tree)


@pytest.mark.parametrize("way", selecting.WAYS)
def test_the_engine_answers_as_the_forward(way):
    """Also what is drafted, taken back and written again, and prompts whose pages come from the prefix cache."""
    engine = Engine(compiled().program, selecting.WAYS[way])
    assert [selecting.answers(engine) for _ in range(2)] == [greedy()] * 2
    assert engine.stats().prefix_hit_tokens > 0


def test_a_fork_copies_entries():
    engine = Engine(compiled().program, selecting.OPTIONS)
    requests = engine.add_group(selecting.PROMPTS[1], [Sampling(max_tokens=selecting.TOKENS)] * 2)
    engine.run()
    assert [request.output for request in requests] == [greedy()[1]] * 2


def test_a_decode_reads_pages_that_were_chosen_and_no_others():
    """By kv head, three blocks of one page, of two kv heads, in both layers; a chunk reads all of its ten."""
    assert selecting.lists_read(compiled().tree, 40) == [(2, 1, 3)] * 2
    assert selecting.lists_read(families.concrete("llama"), 40) == [(1, 1, 10)] * 2


def test_pages_that_were_not_chosen_may_hold_anything():
    """The step's answer with NaN in all pages that the rule leaves out."""
    attn = compiled().tree.layers[0].mixer
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(24, families.D)), jnp.float32)
    q, k, v = attn.turned(x, jnp.arange(24))
    chosen = chosen_blocks(attn, np.asarray(q[-1]), np.asarray(k), 23, SMALL)
    means = jnp.moveaxis(k.reshape(6, P, *k.shape[1:]).mean(1, keepdims=True), 1, 2)
    pool = {"mean": means}
    for name, part in (("k", k), ("v", v)):
        pages = jnp.moveaxis(part.reshape(6, P, *part.shape[1:]), 1, 2)
        for head in range(attn.kv_heads):
            gone = sorted(set(range(6)) - chosen[head])
            pages = pages.at[np.asarray(gone), head].set(jnp.nan)
        pool[name] = pages
    positions = jnp.arange(24).reshape(6, P)
    view = optx.cache.View(
        pool=pool, slots=jnp.zeros(1, int), positions=positions, table=jnp.arange(6)[None, None],
        lengths=jnp.asarray([[24]]), writes=jnp.asarray([23]),
    )  # fmt: skip
    ragged = dataclasses.replace(optx.cache.Ragged.dense(1, 1), positions=jnp.asarray([23]))
    found, _ = attn(x[-1:], ragged, view)
    assert families.relative(found[0], selected(attn, np.asarray(x), SMALL)[-1]) < 1e-5


def test_bytes_of_a_step_stop_at_the_budget():
    """Of a token K and V of 16 numbers in each of two layers: 256 B; a mean is half of that for four tokens."""
    model, tree = families.concrete("llama"), compiled().tree
    assert step_bytes(tree, 1, 12).kv == step_bytes(model, 1, 12).kv == 12 * 256
    for context in (13, 100, 1000):
        assert step_bytes(model, 1, context).kv == 256 * context
        assert step_bytes(tree, 1, context).kv == 256 * 12 + 128 / P * context
    assert step_bytes(tree, 3, 100).kv == 3 * step_bytes(tree, 1, 100).kv
    assert tree.cache_plan().unit_bytes == model.cache_plan().unit_bytes + 128 / P
    pools = tree.cache_plan().init(optx.cache.Layout(pages=7, page_size=P, slots=1)).layers[0]
    assert {name: x.shape for name, x in pools.items()} == {"k": (8, 2, 4, 8), "v": (8, 2, 4, 8), "mean": (8, 2, 1, 8)}


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_over_packed_pages(format):
    """Means are of keys as they are stored."""
    tree = compiled(cache=(QuantizeKV(format=format),)).tree
    tokens = families.prompt(37)
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, (11, 1), page_size=P), want) < 1e-4
    assert families.relative(want, families.forward(compiled().tree, tokens)) > 1e-3
    assert [stream.format is None for stream in tree.layers[0].mixer.cache.streams] == [False, False, True]


def test_fused_and_reloaded(tmp_path):
    """One projection for q, k and v selects as three do, and so does what was written to disk."""
    folder, model = families.hf_dir(tmp_path / "hf", "llama", add_bos=False)
    recipe = Recipe(attention=[SMALL], lower=[optx.passes.fuse_projections.FuseProjections()])
    tokens = families.prompt(30)
    made = optx.compile(optx.load(folder), recipe)
    want = optx.compile(model, Recipe(attention=[SMALL])).logits([tokens])[0]
    assert families.relative(made.logits([tokens])[0], want) < 1e-5
    assert families.relative(families.incremental(made.tree, tokens, (9, 1), page_size=P), want) < 1e-5
    again = optx.load(optx.export(made, tmp_path / "out"))
    assert "select: BlockMeans block=4 blocks=3 first=1" in ir.describe(again.tree)
    np.testing.assert_array_equal(optx.compile(again).logits([tokens])[0], made.logits([tokens])[0])


def test_windows_stay_and_the_others_select():
    tree = compiled("gemma3").tree
    assert [layer.mixer.cache.window for layer in tree.layers] == [6, 6, None]
    assert [layer.mixer.select is not None for layer in tree.layers] == [False, False, True]
    record = optx.plan(families.abstract("gemma3"), Recipe(attention=[SMALL])).records[0]
    assert record.skipped == {f"layers/{i}/mixer": "has a window of 6" for i in range(2)}
    assert record.needs_healing


@pytest.mark.parametrize(
    "options, told",
    [
        ({"top_k": 0}, "moba: top_k 0; allowed: 1 to 2147483647"),
        ({"block": 0}, "moba: block 0; allowed: 1 to"),
        ({"first": -1}, "moba: first -1 of top_k 16 blocks; allowed: 0 to 15"),
        ({"top_k": 2, "first": 2}, "moba: first 2 of top_k 2 blocks; allowed: 0 to 1"),
    ],
    ids=str,
)
def test_wrong_options(options, told):
    with pytest.raises(PassError, match=told):
        optx.plan(families.abstract("llama"), Recipe(attention=[Moba(**options)]))


@pytest.mark.parametrize(
    "recipe, error, told",
    [
        ({"attention": (SlidingWindow(window=6), SMALL)}, PassError, "moba changed nothing: has a window of 6"),
        ({"cache": (EvictKV(policy="h2o", budget=8),)}, LegalityError, "overlap.*allow_overlap"),
        ({"cache": (EvictKV(policy="h2o", budget=8),), "allow_overlap": True}, LegalityError, "exact_tokens_beside_selection"),
        ({"cache": (QuantizeKV(recent=4),)}, LegalityError, "exact_tokens_beside_selection"),
        ({"cache": (Kivi(bits=4, group=4),)}, LegalityError, "exact_tokens_beside_selection"),
        ({"fold": (SplitKeyBias(),)}, LegalityError, "select_without_key_bias"),
    ],
    ids=["window", "eviction", "eviction allowed", "recent", "kivi", "bias"],
)  # fmt: skip
def test_what_does_not_go_together(recipe, error, told):
    with pytest.raises(error, match=told):
        optx.plan(families.abstract("llama", attention_bias=True), Recipe(**{"attention": (SMALL,), **recipe}))


@pytest.mark.parametrize("page, block", [(8, 4), (6, 4), (3, 4)])
def test_pages_that_do_not_fit_blocks(page, block):
    plan = compiled(rule=Moba(block=block, top_k=3)).tree.cache_plan()
    with pytest.raises(FormatError, match=f"pages of {page} tokens; allowed: a multiple of 4, .* that divides 4"):
        plan.init(optx.cache.Layout(pages=2, page_size=page, slots=1))


def test_rows_that_choose_blocks_say_so():
    """On Hopper decodes keep their kernel, which reads lists by kv head; prompts are masked, which XLA does."""
    model = families.abstract("llama", "bfloat16", head_dim=64)
    tree = optx.plan(model, Recipe(attention=[Moba(block=64, top_k=2)])).tree
    chosen = {site.op: dispatch.select(site, TARGETS["h100"]) for site in tree.layers[0].mixer.op_sites()}
    assert str(chosen["paged_decode"]).startswith("mosaic_gpu")
    for op in ("flash_attention", "ragged_paged_attention"):
        assert str(chosen[op]) == "xla"
        assert any("here each kv head chooses its own" in reason for _, reason in chosen[op].declined)
