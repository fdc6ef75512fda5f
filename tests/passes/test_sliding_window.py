"""sliding_window: chosen layers see the newest tokens and the sinks, and keep no others."""

import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir
from optx.cache import Ragged
from optx.checkpoint.source import from_module
from optx.engine.pages import PagePool, PageTable
from optx.errors import PassError, RecipeError
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.sliding_window import SlidingWindow, far_mass
from optx.recipe import Recipe

BEFORE = """\
CausalLM context=128
  layers/0-3: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
"""

EXPECTED = """\
CausalLM context=128
  layers/0,2-3: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32 window 6 sinks 2)
  layers/1: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
"""  # noqa: E501


def mixers(tree) -> str:
    """The lines of the printed tree that name the model, its blocks and their mixers."""
    wanted = ("CausalLM", "layers/", "mixer:")
    return "".join(f"{line}\n" for line in ir.describe(tree).splitlines() if line.strip().startswith(wanted))


def windows(tree) -> list[tuple[int | None, int]]:
    return [(layer.mixer.cache.window, layer.mixer.cache.sinks) for layer in tree.layers]


def plan(*rules, family="llama", layers=4):
    return optx.plan(families.abstract(family, num_hidden_layers=layers), Recipe(attention=rules))


def test_before_expected():
    planned = plan(SlidingWindow(window=6, sinks=2, layers=(0, -1, 2)))
    assert mixers(planned.trees[0]) == BEFORE
    assert mixers(planned.tree) == EXPECTED


def dense_mask(model, length, window, sinks):
    """bool[T, T] a layer: the last layer's window and sinks written out, the other layers' own."""
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    own = [(layer.mixer.cache.window or length) for layer in model.layers]
    masks = [(k <= q) & (k > q - size) for size in own]
    masks[-1] = (k <= q) & ((k > q - window) | (k < sinks))
    return masks


@pytest.mark.parametrize("family", families.FAMILIES)
def test_equals_a_dense_mask(family):
    """Against plain numpy: whole sequences, and over caches whose passed pages are freed."""
    model = families.concrete(family)
    tokens = families.prompt(25)
    compiled = optx.compile(model, Recipe(attention=[SlidingWindow(window=5, sinks=2, layers=(-1,))]))
    want = families.oracle(model, tokens, dense_mask(model, 25, 5, 2))
    assert families.relative(compiled.logits([tokens])[0], want) < 1e-5
    assert families.relative(families.incremental(compiled.tree, tokens, page_size=2), want) < 1e-5
    assert families.relative(families.oracle(model, tokens), want) > 0.01, "the mask matters here"


@pytest.mark.parametrize("window, sinks, sizes", [(3, 0, (7, 4)), (1, 1, (1,)), (40, 4, (5,))])
def test_over_caches_in_chunks(window, sinks, sizes):
    model = families.concrete("llama", num_hidden_layers=1)
    tokens = families.prompt(23)
    recipe = Recipe(attention=[SlidingWindow(window=window, sinks=sinks)], allow=["window_without_sinks"])
    tree = optx.compile(model, recipe).tree
    want = families.oracle(model, tokens, dense_mask(model, 23, window, sinks))
    assert families.relative(families.incremental(tree, tokens, sizes, page_size=4), want) < 1e-5


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, [1, 1, 1, 1]),
        ({"layers": (0, 3)}, [1, 0, 0, 1]),
        ({"layers": (-1, 0)}, [1, 0, 0, 1]),
        ({"keep_every": 2}, [1, 0, 1, 0]),
        ({"keep_every": 3}, [1, 1, 0, 1]),
        ({"match": "layers/[12]/.*"}, [0, 1, 1, 0]),
        ({"match": "layers/[12]/.*", "keep_every": 2}, [0, 0, 1, 0]),
    ],
    ids=str,
)
def test_which_layers(options, want):
    planned = plan(SlidingWindow(window=6, **options))
    assert windows(planned.tree) == [(6, 4) if chosen else (None, 0) for chosen in want]


def test_gemmas_pattern_comes_back():
    planned = plan(SlidingWindow(window=6, sinks=0, keep_every=3), layers=6)
    gemma = families.abstract("gemma3", num_hidden_layers=6)
    assert windows(planned.tree) == windows(gemma)
    assert planned.records[0].skipped == {f"layers/{i}/mixer": "one layer in 3 stays global" for i in (2, 5)}


def test_a_narrower_window_stays():
    planned = plan(SlidingWindow(window=8), family="gemma3", layers=3)
    assert windows(planned.tree) == [(6, 0)] * 2 + [(8, 4)]
    assert planned.records[0].skipped == {f"layers/{i}/mixer": "has a window of 6" for i in range(2)}
    assert windows(plan(SlidingWindow(window=4), family="gemma3", layers=3).tree) == [(4, 4)] * 3


@pytest.mark.parametrize(
    "options, told",
    [
        ({"window": 10**20}, "sliding_window: window 100000000000000000000; allowed: 1 to 2147483647"),
        ({"window": 0}, "sliding_window: window 0; allowed: 1 to 2147483647"),
        ({"window": 4, "sinks": -1}, "sliding_window: sinks -1; allowed: 0 to 2147483647"),
        ({"window": 4, "layers": (4,)}, r"sliding_window: layers \[4\]; allowed: -4..3, each once"),
        ({"window": 4, "layers": (-5,)}, r"layers \[-5\]; allowed: -4..3"),
        ({"window": 4, "layers": (0, -4)}, r"layers \[0, -4\]; allowed: -4..3, each once"),
        ({"window": 4, "keep_every": 1}, "sliding_window changed nothing: one layer in 1 stays global"),
        ({"window": 4, "keep_every": 0}, "sliding_window: keep_every 0; allowed: 1 to"),
        ({"window": 4, "keep_every": -2}, "sliding_window: keep_every -2; allowed: 1 to"),
        ({"window": 4, "layers": ()}, "changed nothing: layer not listed"),
    ],
    ids=str,
)
def test_wrong_options(options, told):
    with pytest.raises(PassError, match=told):
        plan(SlidingWindow(**options))


def test_bytes_held_stop_growing():
    planned = plan(SlidingWindow(window=6, sinks=2))
    before, after = (tree.cache_plan() for tree in (planned.trees[0], planned.tree))
    assert before.bytes(3, 100) == 100 / 8 * after.bytes(3, 100)
    assert before.bytes(1, 5) == after.bytes(1, 5)
    assert after.bytes(1, 8) == after.bytes(1, 10**6)


def test_passed_pages_are_freed():
    spec = plan(SlidingWindow(window=6, sinks=2)).tree.layers[0].mixer.cache
    width = PageTable.width_for(spec, 1000, 1, 4)
    pool = PagePool(width)
    table = PageTable(spec, pool, rows=1, width=width, page_size=4)
    for _ in range(1000):
        table.append(0, 1)
    assert width <= 4 and pool.available + table.pages_of(0) == pool.pages


def test_stacks_with_a_packed_cache():
    model = families.concrete("llama", num_hidden_layers=1)
    recipe = Recipe(attention=[SlidingWindow(window=5, sinks=1)], cache=[QuantizeKV()])
    tree = optx.compile(model, recipe).tree
    assert str(tree.layers[0].mixer.cache) == "paged int8 window 5 sinks 1"
    tokens = families.prompt(20)
    want = families.oracle(model, tokens, dense_mask(model, 20, 5, 1))
    assert 1e-4 < families.relative(families.incremental(tree, tokens, page_size=2), want) < 0.02


# Chosen by what is measured


def attention_of(model, tokens):
    """float64[N, T, T] a layer, by plain numpy."""
    found = []
    x = np.asarray(model.embed.table.get_value(), np.float64)[tokens]
    ragged = Ragged.dense(1, len(tokens))
    for layer in model.layers:
        attn = layer.mixer
        q, k, _ = attn.turned(layer.norm(jnp.asarray(x, jnp.float32)), ragged.positions)
        q, k = (np.asarray(part, np.float64) for part in (q, k))
        logits = np.einsum("qnh,snh->nqs", q, np.repeat(k, attn.heads // attn.kv_heads, 1)) * attn.scale
        logits = np.where(np.tril(np.ones((len(tokens),) * 2, bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        found.append(weights / weights.sum(-1, keepdims=True))
        x = np.asarray(layer(jnp.asarray(x, jnp.float32), ragged, None)[0])
    return found


def test_mass_beyond_a_window():
    """Against plain numpy: queries that a window cuts, keys that it hides."""
    model, tokens, window, sinks = families.concrete("llama"), families.prompt(24), 5, 2
    found = far_mass(model, [np.asarray([tokens])], window, sinks)
    at = np.arange(24)
    hidden = (at[:, None] - at >= window) & (at >= sinks)
    want = [(weights * hidden).sum(-1)[:, window + sinks :].mean() for weights in attention_of(model, tokens)]
    assert list(found) == [0, 1]
    assert list(found.values()) == pytest.approx(want, rel=1e-4) and 0.05 < min(want) < max(want) < 1


def test_layers_that_attend_far_stay_global():
    """Two of four layers: not those that stay by place, and bytes as planned."""
    model = families.concrete("llama", num_hidden_layers=4)
    source = from_module(model, "tiny", families.tokenizer())
    text = "A text that is long enough for a window of some tokens to hide some of it. " * 3
    rule = SlidingWindow(window=6, sinks=1, keep_every=2, by="mass")
    mass = far_mass(model, optx.quality.windows(text, source), 6, 1)
    compiled = optx.compile(source, Recipe(attention=(rule,)), calibration=text, measured=False)
    stays = sorted(sorted(mass, key=mass.__getitem__)[2:])
    assert [i for i, (window, _) in enumerate(windows(compiled.tree)) if window is None] == stays != [1, 3]
    resolved = compiled.plan.recipe.attention[0]
    assert resolved.layers == tuple(sorted(set(range(4)) - set(stays))) and not resolved.unresolved
    planned = optx.plan(source, Recipe(attention=(rule,)))
    assert planned.tree.cache_plan().bytes(1, 100) == compiled.tree.cache_plan().bytes(1, 100)
    assert "which ones, calibration text says" in str(planned.records[0].skipped)


def test_mass_that_cannot_be_measured():
    source = from_module(families.concrete("llama"), "tiny", families.tokenizer())
    mass = Recipe(attention=(SlidingWindow(window=6, keep_every=2, by="mass"),))
    with pytest.raises(RecipeError, match="sliding_window: what it leaves to be measured needs a text"):
        optx.compile(source, mass)
    with pytest.raises(PassError, match="texts of 8 tokens, of which a window of 6 and 4 sinks hides none"):
        optx.compile(source, mass, calibration="8 tokens")
    with pytest.raises(PassError, match="give it, and no layers"):
        optx.compile(source, Recipe(attention=(SlidingWindow(window=6, by="mass"),)), calibration="8 tokens")
    with pytest.raises(RecipeError, match=r"attention\[0\]: sliding_window leaves something to be measured"):
        list(optx.quality.blocks(optx.plan(source, mass)))
