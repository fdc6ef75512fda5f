"""mosa: a router that keeps a share of the tokens, those that are attended to from afar, and one mask in every form of a step."""

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

import optx
from optx import ir
from optx.cache import Ragged
from optx.checkpoint.source import fill, from_module
from optx.cost import step_bytes, step_ops
from optx.engine.engine import Engine
from optx.errors import LegalityError, PassError, RecipeError
from optx.heal_loss import losses, values_of
from optx.pallas import dispatch
from optx.passes import head_moments
from optx.passes.evict_kv import EvictKV
from optx.passes.fuse_projections import FuseProjections
from optx.passes.mla import Mla
from optx.passes.moba import Moba
from optx.passes.mosa import NOTE, Mosa
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.rotate import Rotate
from optx.passes.sliding_window import SlidingWindow
from optx.passes.split_key_bias import SplitKeyBias
from optx.recipe import Calibration, Recipe
from optx.target import TARGETS

SMALL = Mosa(sparsity=4, window=4, sinks=1)
BLOCKS = Mosa(sparsity=2, window=4, sinks=1, block=4)
RULES = pytest.mark.parametrize("rule", [SMALL, BLOCKS], ids=["tokens", "blocks"])
TEXT = Calibration(windows=6, context=40)


@functools.cache
def compiled(family="llama", rule=SMALL, changes=(), **stages):
    source = from_module(families.concrete(family, **dict(changes)), "tiny", families.tokenizer())
    recipe = Recipe(attention=(rule,), calibration=TEXT, **stages)
    return optx.compile(source, recipe, calibration=healing.TEXT, measured=False)


def inputs(length, seed=0):
    return np.random.default_rng(seed).normal(size=(length, families.D)).astype(np.float32)


def kept(attn, x, block=1):
    """bool[T, K] by the threshold, in float64; of the last block, which is not whole, anything."""
    router = attn.select.router
    weight, bias = (np.asarray(part.get_value(), np.float64) for part in (router.weight, router.bias))
    scores = x @ weight + bias
    means = np.stack([scores[i : i + block].mean(0) for i in range(0, len(x), block)])
    return np.repeat(means > 0, block, axis=0)[: len(x)]


@RULES
@pytest.mark.parametrize("family", families.FAMILIES)
def test_exact_where_window_and_sinks_hold_all(family, rule):
    model, tokens = families.concrete(family), families.prompt(23)
    want, tree = families.forward(model, tokens), compiled(family, dataclasses.replace(rule, window=22)).tree
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.incremental(tree, tokens, (9, 1)), want) < 1e-4
    assert families.relative(families.forward(compiled(family, rule).tree, tokens), want) > 0.01


@RULES
def test_a_layer_equals_the_rule_written_out(rule):
    attn, x, out = compiled("qwen3", rule).tree.layers[0].mixer, inputs(31), np.zeros((31, 4, 16))
    q, k, v = (np.asarray(y, np.float64) for y in attn.turned(jnp.asarray(x), jnp.arange(31)))
    mine, block = kept(attn, x, rule.block), np.arange(31) // rule.block
    assert 0 < mine.mean() < 1
    for at in range(31):
        for n in range(attn.heads):
            head, near = n // (attn.heads // attn.kv_heads), block[max(0, at - rule.window + 1)]
            seen = [s for s in range(at + 1) if block[s] >= near or block[s] * rule.block < rule.sinks or mine[s, head]]
            weights = np.exp(k[seen, head] @ q[at, n] * attn.scale)
            out[at, n] = weights / weights.sum() @ v[seen, head]
    found, _ = attn(jnp.asarray(x), Ragged.dense(1, 31), None)
    assert families.relative(found, out.reshape(31, -1) @ np.asarray(attn.o.weight.get_value(), np.float64)) < 1e-5


@RULES
@pytest.mark.parametrize("family", families.FAMILIES)
def test_chunks_and_decodes_are_the_forward(family, rule):
    tree, tokens = compiled(family, rule).tree, families.prompt(37)
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, (13, 1, 2, 9)), want) < 1e-5


@functools.cache
def greedy(rule):
    return selecting.greedy(compiled(rule=rule).tree)


@RULES
@pytest.mark.parametrize("way", selecting.WAYS)
def test_the_engine_answers_as_the_forward(way, rule):
    """Also what is drafted, taken back and written again, and prompts whose pages come from the prefix cache."""
    engine = Engine(compiled(rule=rule).program, selecting.WAYS[way])
    assert [selecting.answers(engine) for _ in range(2)] == [greedy(rule)] * 2
    assert engine.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize("sparsity", [2, 8])
def test_routers_keep_their_share_of_what_is_attended_to(sparsity):
    """By kv head, of calibration text that each layer sees behind its converted predecessors."""
    model, rule = families.concrete("llama"), dataclasses.replace(SMALL, sparsity=sparsity)
    windows = calibrated.windows(model, count=8, length=40)
    tree, (record,) = calibrated.through(model, Recipe(attention=[rule]), windows)
    assert set(record.notes.values()) == {NOTE} and record.needs_healing
    x = [jnp.asarray(tokens[0]) for tokens in windows]
    for i, layer in enumerate(tree.layers):
        far, mine = [], []
        for row in x:
            hidden = tree.embed(row) if i == 0 else tree.backbone(row, Ragged.dense(1, 40), taps=(1,))[2][0]
            entering = layer.norm(hidden)
            q, k, _ = (y[None] for y in layer.mixer.turned(entering, jnp.arange(40)))
            weights, at = np.asarray(head_moments.weights_of(layer.mixer, q, k))[0].sum(1), np.arange(40)
            beyond = at[:, None] - at >= SMALL.window
            far.append((weights * beyond * (at[:, None] + 1)).sum(1).T[1:36] / beyond.sum(0)[1:36, None])
            mine.append(kept(layer.mixer, np.asarray(entering, np.float64)[1:36]))
        far, mine = np.concatenate(far), np.concatenate(mine)
        np.testing.assert_allclose(mine.mean(0), 1 / sparsity, atol=1.5 / len(mine))
        for head in range(2):
            assert np.log(far[mine[:, head], head]).mean() > np.log(far[~mine[:, head], head]).mean() + 0.1


def test_blocks_keep_their_share():
    """Of the whole blocks of calibration text between sinks and window: of 40 tokens those from the 4th to the 36th."""
    windows = calibrated.windows(families.concrete("llama"), count=8, length=40)
    tree, (record,) = calibrated.through(families.concrete("llama"), Recipe(attention=[BLOCKS]), windows)
    assert not record.notes and record.needs_healing
    first = tree.layers[0]
    x = [np.asarray(first.norm(tree.embed(jnp.asarray(tokens[0]))), np.float64) for tokens in windows]
    mine = np.concatenate([kept(first.mixer, row, 4)[4:36:4] for row in x])
    assert mine.shape == (64, 2)
    np.testing.assert_allclose(mine.mean(0), 1 / 2, atol=1.5 / 64)


def test_a_decode_reads_lists_of_blocks():
    """And as much as they say: of a token 256 B of keys and values in two layers, and a float32 for each of two kv heads in both,
    of which all are read."""
    tree = compiled(rule=BLOCKS).tree
    assert {shape[0] for shape in selecting.lists_read(tree, 37)} == {2}, "a list a kv head"
    seen = []

    def note(run, *args, **kwargs):
        if run.__name__ == "paged_decode" and "table" in kwargs:
            seen.append(kwargs["lengths"])
        return run(*args, **kwargs)

    with dispatch.through(note), jax.disable_jit():
        families.incremental(tree, families.prompt(37), (36, 1), page_size=4)
    assert len(seen) == 2 and all(1 <= int(n) < 37 for lengths in seen for n in np.asarray(lengths).reshape(-1))
    for context in (4, 1000):
        chosen = min(context, context // 2 + 2 * 4)
        assert step_bytes(tree, 1, context).kv == 256 * chosen + (16 * context if context > chosen else 0)
    plain = optx.plan(families.abstract("llama", "bfloat16", head_dim=64), Recipe(attention=[Mosa(block=64)])).tree
    sites = {site.op: site for site in plain.layers[0].mixer.op_sites()}
    assert str(dispatch.select(sites["paged_decode"], TARGETS["h100"])) == "mosaic_gpu/sm90"


def test_no_gradient_moves_a_router():
    """What a threshold keeps stays its share while a model is healed."""
    model, tree = families.concrete("llama"), compiled().tree
    form, values = ir.abstract(tree), values_of(tree)
    tokens = jnp.asarray([families.prompt(24)], jnp.int32)
    slopes = jax.grad(
        lambda moved: losses(ir.shallow(model), fill(form, moved.__getitem__), tokens, hidden=True)[0]["kl"]
    )(values)
    still = {name for name, slope in slopes.items() if not np.any(np.asarray(slope))}
    assert still == {f"layers/{i}/mixer/select/router/{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_no_bytes_are_saved():
    """Of a token 256 B of keys and values in two layers, and a bool for each of two kv heads in both; all are read."""
    model, tree = families.concrete("llama"), compiled().tree
    for context in (4, 1000):
        assert step_bytes(model, 1, context).kv == 256 * context
        assert step_bytes(tree, 1, context).kv == 260 * context
    assert tree.cache_plan().unit_bytes == 260
    both = [[op.flops for op in step_ops(x, context=1000) if op.op == "attention"] for x in (model, tree)]
    assert both[0] == both[1]
    pools = tree.cache_plan().init(optx.cache.Layout(pages=7, page_size=4, slots=1)).layers[0]
    assert pools["kept"].shape == (8, 2, 4, 1) and pools["kept"].dtype == bool


@pytest.mark.parametrize(
    "stages",
    [
        {"cache": (QuantizeKV(format="int8"),)},
        {"fold": (SplitKeyBias(),), "cache": (QuantizeKV(format="int8"),)},
        {"fold": (Rotate(),)},
        {"lower": (FuseProjections(),)},
    ],
    ids=["int8", "split bias", "rotated", "fused"],
)
def test_with_passes_that_come_after_it(stages):
    """A forward is what chunks and decodes are, near what it was without them."""
    tokens, plain = families.prompt(37), compiled(changes=(("attention_bias", True),)).tree
    tree = optx.compile(plain, Recipe(**stages)).tree
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, (11, 1)), want) < 1e-4
    assert families.relative(want, families.forward(plain, tokens)) < (0.05 if "cache" in stages else 1e-4)


@RULES
def test_reloaded(tmp_path, rule):
    folder, _ = families.hf_dir(tmp_path / "hf", "llama", add_bos=False)
    recipe = Recipe(attention=[rule], calibration=TEXT)
    made, tokens = (
        optx.compile(optx.load(folder), recipe, calibration=healing.TEXT, measured=False),
        families.prompt(30),
    )
    again = optx.compile(optx.load(optx.export(made, tmp_path / "out")))
    np.testing.assert_array_equal(again.logits([tokens])[0], made.logits([tokens])[0])
    said = (
        "TokenRouter window=4 sinks=1 share=0.25" if rule is SMALL else "BlockRouter window=4 sinks=1 share=0.5 block=4"
    )
    assert f"select: {said}" in ir.describe(again.tree)


def test_rows_decline_a_mask_by_head():
    """Decodes too, which read all pages."""
    tree = optx.plan(families.abstract("llama", "bfloat16", head_dim=64), Recipe(attention=[Mosa()])).tree
    for site in tree.layers[0].mixer.op_sites():
        if site.op != "rotate_append":
            assert str(dispatch.select(site, TARGETS["h100"])) == "xla", site.op


@pytest.mark.parametrize(
    "options, told",
    [
        ({"window": 0}, "mosa: window 0; allowed: 1 to 2147483647"),
        ({"sparsity": 1.0}, "mosa: sparsity 1; allowed: above 1"),
        ({"sinks": -1}, "mosa: sinks -1; allowed: 0 to"),
        ({"block": 0}, "mosa: block 0; allowed: 1 to 2147483647"),
    ],
    ids=str,
)
def test_wrong_options(options, told):
    with pytest.raises(PassError, match=told):
        optx.plan(families.abstract("llama"), Recipe(attention=[Mosa(**options)]))


def test_text_is_needed_and_long_enough():
    model = families.concrete("llama")
    with pytest.raises(RecipeError, match="mosa.*calibration"):
        optx.compile(from_module(model, "tiny", families.tokenizer()), Recipe(attention=[SMALL]))
    with pytest.raises(PassError, match="texts of 32 tokens, of which a window of 31 and 1 sinks hide none or one"):
        calibrated.through(model, Recipe(attention=[Mosa(window=31, sinks=1)]))
    with pytest.raises(PassError, match="texts of 32 tokens hold no block of 16 beside a window of 8 and 1 sinks"):
        calibrated.through(model, Recipe(attention=[Mosa(window=8, sinks=1, block=16)]))


@pytest.mark.parametrize(
    "recipe, error, told",
    [
        ({"attention": (SlidingWindow(window=6), SMALL)}, PassError, "mosa changed nothing: has a window of 6"),
        ({"attention": (Mla(), SMALL)}, PassError, "mosa changed nothing: GroupedMLA keeps one latent"),
        ({"attention": (Moba(block=4, top_k=3), SMALL)}, LegalityError, "selected_twice"),
        (
            {"cache": (EvictKV(policy="h2o", budget=8),), "allow_overlap": True},
            LegalityError,
            "exact_tokens_beside_selection",
        ),
    ],
    ids=["window", "latents", "blocks", "eviction"],
)
def test_what_does_not_go_together(recipe, error, told):
    with pytest.raises(error, match=told):
        optx.plan(families.abstract("llama", head_dim=16), Recipe(**{"attention": (SMALL,), **recipe}))
