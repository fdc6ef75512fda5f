"""Tokens kept exact beside packed ones: over pages as in one piece, whatever the chunks, in an engine that shares, drops, forks
and steps back over them."""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir, lower, target
from optx.cache import Layout
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.engine.speculation import Speculation
from optx.errors import FormatError
from optx.formats import Int
from optx.nn.attention import mask_of, paged_spec
from optx.pallas.attention.reference import Mask, flash_attention, merge
from optx.passes.kivi import Kivi
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

RULES = {
    "int4": QuantizeKV(format="int4", symmetric=False),
    "recent": QuantizeKV(format="int4", recent=5),
    "first": QuantizeKV(format="int2", first=3, group=4),
    "both": QuantizeKV(format="fp8_e4m3", values="int4", recent=3, first=2),
    "kivi": Kivi(bits=4, group=4, recent=5, first=2),
    "kivi2": Kivi(bits=2, group=4, recent=0),
}
LENGTH = 40  # of sequences that are scored, padded: one program
OPTIONS = EngineOptions(rows=3, context=LENGTH, page_size=4, chunks=(8,))
REPEATING = [7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8]
PROMPTS = [families.prompt(length, seed=length) for length in (21, 3, 9, 21, 18)]  # two are the same; more than rows
GREEDY = Sampling(max_tokens=16)


@functools.cache
def compiled(name: str) -> optx.Compiled:
    return optx.compile(families.concrete("llama"), Recipe(cache=[RULES[name]], allow=("gqa_kivi2",)))


def whole(made, tokens) -> np.ndarray:
    """Logits of a sequence in one piece."""
    return np.asarray(made.logits([[*tokens, *[0] * (LENGTH - len(tokens))]])[0])[: len(tokens)]


def is_greedy(made, prompt, output):
    logits = whole(made, [*prompt, *output])
    assert output == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize("name", RULES)
def test_chunks_over_pages_give_the_whole_forward(name):
    made, tokens = compiled(name), families.prompt(27)
    want = whole(made, tokens)
    assert (
        families.relative(families.incremental(made.tree, tokens, (7, 1)), want) < 1e-4
    )  # a code may round the other way
    assert families.relative(want, families.oracle(families.concrete("llama"), tokens)) > 1e-3


@pytest.mark.parametrize("name", ["both", "kivi"])
def test_an_engine_that_shares_prefixes_preempts_and_forks(name):
    made = compiled(name)
    engine = Engine(made.program, EngineOptions(**vars(OPTIONS) | {"pages": 14}))
    for _ in range(2):
        requests = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        requests += engine.add_group(PROMPTS[2], [GREEDY, GREEDY])
        engine.run()
        engine.check()
        for request in requests:
            is_greedy(made, request.prompt, request.output)
    stats = engine.stats()
    assert stats.preemptions and stats.prefix_hit_tokens


@pytest.mark.parametrize("name", ["both", "kivi"])
def test_drafts_that_were_wrong_leave_nothing_behind(name):
    """A step back over a block of keys that was packed: it is packed again when it is complete again."""
    made = compiled(name)
    how = Speculation(tokens=3, least=1, always=True)
    engine = Engine(made.program, EngineOptions(**vars(OPTIONS) | {"speculate": how}))
    requests = [engine.add_request(prompt, GREEDY) for prompt in (REPEATING, PROMPTS[1])]
    engine.run()
    for request in requests:
        is_greedy(made, request.prompt, request.output)
    assert engine.drafted > engine.accepted


@pytest.mark.parametrize("window, sinks", [(None, 0), (20, 0), (20, 3)])
@pytest.mark.parametrize("recent, first, block", [(5, 0, 1), (0, 3, 1), (5, 2, 4), (0, 0, 4)])
def test_a_key_is_seen_once(window, sinks, recent, first, block):
    """Packed or exact, and both together are what the model sees; softmaxes merged are one, a sink's logit counted once."""
    spec = paged_spec(1, 8, dtype="float32", window=window).replace(
        sinks=sinks, recent=recent, first=first, format=Int(width=8)
    )
    if block > 1:
        spec = spec.replace(format=Kivi(group=block).formats(None)["k"])
    length = 37
    key, query = jnp.arange(length)[None], jnp.arange(length)[:, None]
    if spec.near is None:  # the window passes the first tokens, and there are no sinks
        assert first and not recent and window and not sinks
        return
    near = Mask(window=spec.recent, sinks=spec.near.sinks, block=spec.block)
    body, all_ = mask_of(spec), Mask(window=window, sinks=sinks)
    np.testing.assert_array_equal(body(query, key) ^ near(query, key), all_(query, key))
    distance = np.asarray(query - key)
    assert np.all(np.asarray(near(query, key))[(distance >= 0) & (distance < recent)])
    held = Mask(window=spec.near.window, sinks=spec.near.sinks)  # what the pages of exact tokens keep
    assert not np.any(np.asarray(near(query, key)) & ~np.asarray(held(query, key)))
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 2 - (i > 0), 8)) for i in range(3))
    sink = jnp.array([0.5, -1.0])
    parts = [flash_attention(q, k, v, mask=body, sink_logits=sink)[:2], flash_attention(q, k, v, mask=near)[:2]]
    for got, want in zip(merge(parts), flash_attention(q, k, v, mask=all_, sink_logits=sink), strict=False):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "name, body, exact",
    [
        ("int4", 2 * 2 * (4 + 4), 0),
        ("both", 2 * (8 + 2) + 2 * (4 + 2), 2 * 2 * 8 * 4),
        ("kivi", 2 * (4 + 8 * 4 / 4) + 2 * (4 + 2 * 4), 2 * 2 * 8 * 4),
    ],
)
def test_bytes_are_those_of_the_pools(name, body, exact):
    """A token's: [K, H] = [2, 8] each of K and V; kivi has 4 bytes a channel and 4 tokens, and a token and 4 channels."""
    spec = compiled(name).program.plan.specs[0]
    assert spec.unit_bytes == body
    for part, want in zip(spec.parts, (body, exact), strict=False):
        pool = part.init(Layout(pages=5, page_size=8, slots=1))
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(pool)) == (5 + 1) * 8 * want
    kept = {"both": 3 + 2, "kivi": 5 + 3 + 2}.get(name, 0)
    assert spec.bytes(2, 100) == 2 * (100 * body + kept * exact)
    leaves = jax.tree.leaves(compiled(name).program.plan.init(Layout(pages=5, page_size=8, slots=1)).layers)
    assert sum(leaf.nbytes for leaf in leaves) == 2 * (5 + 1) * 8 * (body + exact)


def test_latents_have_windows_too():
    """A latent and its rotated key have a scale each."""
    recipe = Recipe(cache=[QuantizeKV(match="layers/3/mixer", format="int4", recent=3, first=2)])
    made, tokens = optx.compile(families.hybrid(), recipe), families.prompt(20)
    spec = made.program.plan.specs[3]
    assert (str(spec), spec.unit_bytes) == ("latent int4_cut8 recent 3 first 2", 4 + 2 + 2 * 2)
    want = whole(made, tokens)
    assert (
        families.relative(families.incremental(made.tree, tokens, (7, 1)), want) < 1e-4
    )  # a code may round the other way
    assert families.relative(want, whole(optx.compile(families.hybrid()), tokens)) > 1e-4


def test_a_reader_of_another_layers_cache_knows_what_is_exact():
    model = families.concrete("llama")
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, k=None, v=None, cache=mixer.cache.replace(share=0)))
    made, tokens = optx.compile(model, Recipe(cache=[RULES["kivi"]])), families.prompt(20)
    assert made.program.plan.specs[1].bytes(1, 100) == 0
    assert families.relative(families.incremental(made.tree, tokens, (7, 1)), whole(made, tokens)) < 1e-4
    with pytest.raises(FormatError, match="layers/1: cache shared with layer 0; .* the same tokens kept exact"):
        optx.plan(model, Recipe(cache=[Kivi(match="layers/0/mixer", group=4)]))


def test_layers_whose_window_is_exact_anyway_stay_as_they_are():
    """And the first tokens are kept where the window lets them be seen."""
    planned = optx.plan(families.abstract("gemma3"), Recipe(cache=[QuantizeKV(recent=6)]))
    assert planned.records[0].skipped == {
        f"layers/{i}/mixer": "its window of 6 lies within the 6 newest tokens, which stay exact" for i in range(2)
    }
    planned = optx.plan(families.abstract("gemma3"), Recipe(cache=[QuantizeKV(first=2)]))
    specs = [layer.mixer.cache for layer in planned.tree.layers]
    assert [spec.near and spec.near.sinks for spec in specs] == [None, None, 2]


def test_first_and_last_layers_are_exempt_by_rule():
    model = families.abstract("llama", num_hidden_layers=4)
    planned = optx.plan(model, Recipe(cache=[Kivi(match="layers/[12]/mixer", group=4)]))
    assert [layer.mixer.cache.packed for layer in planned.tree.layers] == [False, True, True, False]


@pytest.mark.parametrize("device, backend", [("h100", "mosaic_gpu"), ("tpu-v6e", "xla")])
def test_kernels_read_both_or_decline_by_name(device, backend):
    model = families.abstract("llama", "bfloat16", head_dim=128)
    tree = optx.plan(model, Recipe(cache=[Kivi()])).tree
    choices = lower.choose(tree, target.get(device)).layers[0].mixer.choices
    over_pages = [choice for choice in choices if choice.op in ("paged_decode", "ragged_paged_attention")]
    assert {choice.backend for choice in over_pages} == {backend}
    if backend == "xla":
        reasons = [reason for choice in over_pages for _, reason in choice.declined]
        assert any("pages in int4_g32_channel" in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"recent": 4}, "cache recent 4; allowed: 0 to .* 0 where nothing is packed"),
        ({"first": -1, "format": Int(width=8)}, "cache first -1; allowed: 0 to"),
        (
            {"recent": 9, "window": 9, "format": Int(width=8)},
            "cache window 9: all that it sees are the 9 newest tokens",
        ),
    ],
)
def test_windows_that_a_spec_cannot_have(changes, told):
    with pytest.raises(FormatError, match=told):
        paged_spec(2, 8, dtype="float32").replace(**changes)
