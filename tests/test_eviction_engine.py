"""Eviction in the engine: rows keep their budget of pages, answers are those of the tokens kept, whatever else runs."""

import dataclasses

import families
import jax
import numpy as np
import pytest

import optx
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.engine.speculation import Speculation
from optx.errors import RequestError
from optx.passes.evict_kv import EvictKV
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

PAGE = 4
OPTIONS = EngineOptions(rows=3, context=48, page_size=PAGE, chunks=(4, 8))
PROMPTS = [families.prompt(length, seed=length) for length in (3, 21, 9, 1, 14)]
LONG = Sampling(max_tokens=20)
SMALL = {
    "streaming_llm": EvictKV(policy="streaming_llm", budget=8, sinks=2, slack=4),
    "h2o": EvictKV(policy="h2o", budget=8, slack=4),
    "tova": EvictKV(policy="tova", budget=8, slack=4),
    "snapkv": EvictKV(policy="snapkv", ratio=0.5, recent=2),
    "kvzip": EvictKV(policy="kvzip", ratio=0.5, sinks=1, recent=1, part=6, instruction=""),
    "snapkv over layers": EvictKV(policy="snapkv", ratio=0.5, recent=2, over="layer"),
    "kvzip over the model": EvictKV(policy="kvzip", ratio=0.5, sinks=1, recent=1, part=6, instruction="", over="model"),
}
ROOMY = {
    name: dataclasses.replace(small, **({"budget": 48} if small.budget else {"ratio": 1.0}))
    for name, small in SMALL.items()
}


@pytest.fixture(scope="module")
def model():
    return families.concrete("qwen3", num_hidden_layers=1)


@pytest.fixture(scope="module")
def program(model):
    """The lowered model with a rule of eviction, made once each."""
    made = {}

    def get(rule, *cache):
        if (rule, cache) not in made:
            made[rule, cache] = optx.compile(model, Recipe(cache=(rule, *cache))).program
        return made[rule, cache]

    return get


def run(engine, prompts, sampling=LONG):
    requests = [engine.add_request(prompt, sampling) for prompt in prompts]
    engine.run()
    engine.check()
    return [request.output for request in requests]


@pytest.fixture(scope="module")
def whole(model):
    """Answers of the engine that keeps every token."""
    return run(Engine(optx.compile(model).program, OPTIONS), PROMPTS)


@pytest.mark.parametrize("name", ROOMY)
def test_a_budget_that_holds_everything_changes_no_answer(name, program, whole):
    engine = Engine(program(ROOMY[name]), OPTIONS)
    assert run(engine, PROMPTS) == whole


@pytest.mark.parametrize("name", SMALL)
def test_answers_do_not_depend_on_chunks_ticks_company_or_preemption(name, program, whole):
    """One engine serves all at once, one with other chunks, several decode ticks a dispatch and programs compiled before, one
    plans ahead, mixes prompts with decodes and runs out of pages."""
    engine = Engine(program(SMALL[name]), OPTIONS)
    answers = run(engine, PROMPTS)
    assert answers != whole, "the budget binds"
    assert run(engine, [PROMPTS[1]]) == answers[1:2]
    warm = Engine(program(SMALL[name]), dataclasses.replace(OPTIONS, chunks=(8, 16), ticks=4))
    warm.warm_up()
    compiled = warm.compiles
    assert run(warm, PROMPTS) == answers and warm.compiles == compiled, "after warm-up nothing compiles"
    least = max(min(-(-t.most(21, 41) // PAGE), t.width) for t in engine._tables)
    scarce = Engine(
        program(SMALL[name]), dataclasses.replace(OPTIONS, pages=least + 1, ticks=4, overlap=True, mixed=True)
    )
    short_first = [0, 3, 1, 2, 4]  # those get rows together, and grow
    assert run(scarce, [PROMPTS[i] for i in short_first]) == [answers[i] for i in short_first]
    assert scarce.stats().preemptions > 0


@pytest.mark.parametrize("name, most", [("streaming_llm", 3), ("h2o", 3), ("tova", 3)])
def test_pages_of_a_rolling_row_stay_at_the_budget(name, most, program):
    """8 tokens and 4 of slack are 3 pages; whole, 40 tokens are 10."""
    engine = Engine(program(SMALL[name]), dataclasses.replace(OPTIONS, rows=1))
    request, held = engine.add_request(PROMPTS[1], LONG), []
    while request.finish is None:
        engine.step()
        held.append(engine.stats().pages_used)
    assert max(held) == most and held[-2] >= 2 and engine.stats().pages == most, "the pool is no larger either"
    engine.check()


@pytest.mark.parametrize("name", ["snapkv", "kvzip"])
def test_pages_of_a_prompt_fall_to_the_budget(name, program):
    """21 tokens are 6 pages, kvzip's repetition of 6 tokens 1 more; 11 tokens are 3."""
    engine = Engine(program(SMALL[name]), OPTIONS)
    request, held = engine.add_request(PROMPTS[1], Sampling(max_tokens=2)), []
    while len(request.output) < 2:
        engine.step()
        held.append(engine.stats().pages_used)
    assert max(held[:-1]) == {"snapkv": 6, "kvzip": 7}[name]
    assert engine.scheduler.tables[0].policy.kept(21) == 11
    request = engine.add_request(PROMPTS[1], Sampling(max_tokens=8))
    for _ in range(40):
        if len(request.output) >= 3:
            break
        engine.step()
    assert engine.stats().pages_used == -(-(11 + len(request.output)) // PAGE) == 4
    engine.abort(request)
    engine.check()


def test_memory_of_an_endless_text_is_flat(program):
    """Ten times the model's context: positions are counted in the cache, so that it goes on."""
    engine = Engine(program(SMALL["streaming_llm"]), dataclasses.replace(OPTIONS, rows=1, context=1300))
    request, held = engine.add_request(families.prompt(500, seed=1), Sampling(max_tokens=780, ignore_eos=True)), set()
    while request.finish is None:
        engine.step()
        held.add(engine.stats().pages_used)
    assert len(request.output) == 780 > 6 * 128 and max(held) == 3


def test_other_policies_stay_within_the_models_context(program):
    engine = Engine(program(SMALL["h2o"]), dataclasses.replace(OPTIONS, rows=1, context=1300))
    assert engine.context == 128


# What stays, on the device.


def test_streaming_llm_equals_the_model_on_the_window_counted_from_zero(model, program):
    """One layer: what a token sees of others is their keys and values, which depend on the tokens alone. So the next token after
    any number of them is that of the forward over the tokens kept, at positions 0, 1, ..."""
    prompt = PROMPTS[1]
    answer = run(Engine(program(SMALL["streaming_llm"]), OPTIONS), [prompt])[0]
    seen = prompt + answer
    kept, want = [], []
    for at, token in enumerate(seen[:-1]):
        if len(kept) == 12:  # full: 2 sinks and the 6 newest stay
            kept = kept[:2] + kept[-6:]
        kept.append(token)
        if at >= len(prompt) - 1:
            want.append(int(families.forward(model, kept)[-1].argmax()))
    assert answer == want


def kept_keys(engine, group=0, row=0):
    """Keys of a row, by kv head float[slots, H]."""
    table = engine._tables[group]
    pool = np.asarray(engine._stepper.caches.layers[0]["k"])
    listed = np.broadcast_to(table.tables[:, row], (pool.shape[1], table.width))
    lengths = np.broadcast_to(table.lengths_by_head[:, row], pool.shape[1])
    return [
        pool[pages, head].reshape(-1, pool.shape[-1])[:length]
        for head, (pages, length) in enumerate(zip(listed, lengths))
    ]


def votes_of_the_end(model, prompt, window):
    """Of SnapKV in plain numpy: (pooled votes float64[K, S - window], the model's keys float64[S, K, H])."""
    attn = model.layers[0].mixer
    x = model.layers[0].norm(model.embed(np.asarray(prompt)))
    q, k, _ = attn.project(x)
    at = np.arange(len(prompt), dtype=np.int32)
    q, k = attn.rope(attn.q_norm(q), at), attn.rope(attn.k_norm(k), at)
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    found = []
    for head in range(2):
        votes = np.zeros(len(prompt) - window)
        for n in (2 * head, 2 * head + 1):
            logits = q[-window:, n] @ k[:, head].T * attn.scale
            logits = np.where(at <= at[-window:, None], logits, -np.inf)
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            votes += weights[:, : len(prompt) - window].sum(0)
        found.append(np.convolve(votes, np.ones(5) / 5, mode="same"))
    return np.stack(found), k


@pytest.mark.parametrize("name", ["snapkv", "snapkv over layers"])
def test_snapkv_keeps_what_the_paper_keeps(name, model, program):
    """Keys in the pool after a prompt, against plain numpy on the model's own queries and keys: of each of 2 heads the 9 tokens
    with most votes and the window, or of both together the 18."""
    prompt, window = families.prompt(21, seed=4), 2
    engine = Engine(program(SMALL[name]), OPTIONS)
    request = engine.add_request(prompt, LONG)
    while len(request.output) < 2:
        engine.step()
    votes, keys = votes_of_the_end(model, prompt, window)
    by_head = [np.argsort(-mine)[:9] for mine in votes]
    if name != "snapkv":
        best = np.argsort(-votes.reshape(-1))[:18]
        by_head = [best[best // votes.shape[1] == head] % votes.shape[1] for head in range(2)]
        assert len(by_head[0]) != len(by_head[1]), "the test tells nothing where heads happen to keep equally many"
        table = engine._tables[0]
        assert [pool.used for pool in table.pool.heads] == [-(-len(keys) // PAGE) for keys in kept_keys(engine)]
    for head, (got, best) in enumerate(zip(kept_keys(engine), by_head)):
        keep = sorted([*best, *range(len(prompt) - window, len(prompt))])
        np.testing.assert_allclose(got[: len(keep)], keys[keep, head], atol=1e-4)
        assert len(got) - len(keep) == len(kept_keys(engine)[0]) - len(by_head[0]) - window, (
            "and the answer's, in all heads"
        )
    engine.abort(request)
    engine.check()


def test_heads_of_the_model_share_its_budget():
    """Two layers of two heads keep 4 x 11 tokens together, though none as many as the next."""
    program = optx.compile(families.concrete("qwen3"), Recipe(cache=(SMALL["kvzip over the model"],))).program
    engine = Engine(program, OPTIONS)
    request = engine.add_request(PROMPTS[1], LONG)
    while len(request.output) < 1:
        engine.step()
    kept = np.stack([table.lengths_by_head[:, request.row] for table in engine._tables])
    assert kept.shape == (2, 2) and len(set(kept.reshape(-1).tolist())) > 1
    assert int(kept.sum()) - 4 * (int(engine._tables[0]._seen[request.row]) - 20) == 4 * 11
    engine.run()
    engine.check()


def test_packed_pages_are_compacted_as_they_are(program):
    """Codes and scales move with their token: int8 keys give the answers of float keys but for their rounding."""
    packed = program(SMALL["snapkv"], QuantizeKV(format="int8"))
    engine = Engine(packed, OPTIONS)
    assert [run(engine, [prompt])[0] for prompt in PROMPTS] == run(engine, PROMPTS)
    plain = run(Engine(program(SMALL["snapkv"]), OPTIONS), PROMPTS)
    same = np.mean([a == b for x, y in zip(run(engine, PROMPTS), plain) for a, b in zip(x, y)])
    assert same > 0.5


# What does not go together.


def test_the_prefix_cache_is_off_and_says_why(program):
    engine = Engine(program(SMALL["h2o"]), OPTIONS)
    assert engine.prefix is None and "throw cached tokens away" in engine.prefix_refusal


def test_speculation_is_refused(program):
    with pytest.raises(RequestError, match=r"engine.speculate: the cache throws tokens away \(h2o 8\)"):
        Engine(program(SMALL["h2o"]), dataclasses.replace(OPTIONS, speculate=Speculation(method="ngram")))


def test_chunks_of_one_token_are_refused_where_prompts_are_recorded(program):
    with pytest.raises(RequestError, match="a chunk of one token passes for a decode"):
        Engine(program(SMALL["snapkv"]), dataclasses.replace(OPTIONS, chunks=(1, 8)))


def test_penalties_are_refused_where_a_prompt_is_fed_again(program):
    engine = Engine(program(SMALL["kvzip"]), OPTIONS)
    with pytest.raises(RequestError, match="this cache feeds a prompt again"):
        engine.add_request(PROMPTS[0], Sampling(repetition_penalty=1.1))


def test_answers_of_a_group_are_computed_apart(program):
    """Rows that write to all their pages share none."""
    engine = Engine(program(SMALL["h2o"]), OPTIONS)
    requests = engine.add_group(PROMPTS[1], [LONG] * 2)
    engine.run()
    engine.check()
    assert requests[0].output == requests[1].output == run(engine, [PROMPTS[1]])[0]


def test_an_abort_between_two_steps_leaves_no_page(program):
    engine = Engine(program(SMALL["snapkv"]), dataclasses.replace(OPTIONS, overlap=True))
    first = engine.add_request(PROMPTS[1], LONG)
    while not first.output:
        engine.step()
    engine.abort(first)
    answers = run(engine, [PROMPTS[2]])
    assert answers == run(Engine(program(SMALL["snapkv"]), OPTIONS), [PROMPTS[2]])


def test_layers_of_other_budgets_have_tables_of_their_own():
    model = families.concrete("llama")
    rules = (
        EvictKV(policy="streaming_llm", budget=8, sinks=2, slack=4, match="layers/0/.*"),
        EvictKV(policy="h2o", budget=16, slack=4),
    )
    engine = Engine(optx.compile(model, Recipe(cache=rules)).program, OPTIONS)
    answers = run(engine, PROMPTS)
    assert [table.width for table in engine._tables] == [3, 5]
    assert [run(engine, [prompt])[0] for prompt in PROMPTS[:2]] == answers[:2]
    assert jax.tree.leaves(engine._stepper.caches.layers[0])[0].shape[0] < OPTIONS.rows * 10
