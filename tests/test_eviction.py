"""Policies of eviction: what is recorded of attention and which slots stay, against the papers' rules in plain numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from optx.errors import FormatError
from optx.eviction import H2O, POLICIES, TOVA, KVzip, SnapKV, StreamingLLM

HEADS, LENGTH, PAD = 2, 23, 5  # kv heads; slots held, and listed behind them
BUDGET = 9


def attention(rng, queries=LENGTH, group=2):
    """float64[K, G, Q, S]: causal softmax of random logits, the queries being the newest."""
    logits = rng.standard_normal((HEADS, group, queries, LENGTH)) * 2
    at = np.arange(LENGTH - queries, LENGTH)
    logits = np.where(np.arange(LENGTH) <= at[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def fed(policy, weights, sizes, prompt):
    """What the policy has recorded, float32[K, S, C], after the queries of `weights` in steps of `sizes`, as attention and the
    pools do it: reduced over queries and heads of a group, 0 for slots that are new."""
    recorded = np.zeros((HEADS, LENGTH + PAD, policy.channels), np.float32)
    first, slots = LENGTH - weights.shape[2], np.arange(LENGTH + PAD)
    for size in sizes:
        asked = jnp.arange(first, first + size)[None]
        counted = np.asarray(policy.weigh(asked, jnp.asarray([prompt])))[0]
        part = weights[:, :, first - LENGTH + weights.shape[2] :][:, :, :size] * counted[:, None]
        mass = part.max((1, 2)) if policy.reduce == "max" else part.sum((1, 2))
        mass = np.pad(mass, ((0, 0), (0, PAD)))
        old = np.where((slots >= first)[None, :, None], 0, recorded)
        queries = np.clip(first + size - np.maximum(slots, first), 0, None)
        recorded = np.asarray(policy.record(jnp.asarray(old), jnp.asarray(mass), jnp.asarray(queries)))
        first += size
    assert first == LENGTH
    return recorded


def kept(policy, recorded, budget=BUDGET, length=LENGTH):
    """Slots that stay, a set a head."""
    recorded = None if recorded is None else jnp.asarray(recorded)
    chosen = np.asarray(policy.keep(recorded, jnp.arange(LENGTH + PAD), jnp.int32(length), jnp.int32(budget)))
    chosen = np.broadcast_to(chosen, (HEADS, LENGTH + PAD))
    assert (np.diff(chosen[:, :budget]) > 0).all(), "ascending"
    assert (np.sort(chosen) == np.arange(LENGTH + PAD)).all(), "each slot once"
    return [set(row.tolist()) for row in chosen[:, :budget]]


def best(worth, count, among):
    """The `count` slots of `among` of the greatest worth."""
    return set(sorted(among, key=lambda s: -worth[s])[:count])


def test_streaming_llm_keeps_the_first_and_the_newest():
    policy = StreamingLLM(budget=BUDGET, sinks=3)
    assert kept(policy, None) == [{0, 1, 2} | set(range(LENGTH - 6, LENGTH))] * HEADS


@pytest.mark.parametrize("sizes", [(LENGTH,), (10, 1, 5, 7)])
def test_h2o_keeps_heavy_hitters_and_the_newest_half(sizes, rng):
    """Algorithm 1, the sum divided by how many queries could see the token."""
    weights = attention(rng)
    got = kept(H2O(budget=BUDGET), fed(H2O(budget=BUDGET), weights, sizes, LENGTH))
    newest = set(range(LENGTH - BUDGET // 2, LENGTH))
    for head, slots in enumerate(got):
        sums = [weights[head, :, s:, s].sum() / (LENGTH - s) for s in range(LENGTH)]
        assert slots == newest | best(sums, BUDGET - BUDGET // 2, set(range(LENGTH)) - newest)
    assert got[0] != got[1], "each head keeps its own"


def test_h2o_goes_on_counting_after_a_compaction(rng):
    """What was recorded moves with its token: heavy before, heavy after."""
    recorded = fed(H2O(budget=BUDGET), attention(rng), (LENGTH,), LENGTH)
    more = H2O(budget=BUDGET).record(jnp.asarray(recorded), jnp.zeros(recorded.shape[:2]), jnp.int32(4))
    np.testing.assert_allclose(more[..., 1] - recorded[..., 1], 4)
    np.testing.assert_array_equal(more[..., 0], recorded[..., 0])


@pytest.mark.parametrize("sizes", [(LENGTH,), (10, 1, 12)])
def test_tova_keeps_what_the_newest_query_attends_to_over_all_heads(sizes, rng):
    weights = attention(rng)
    got = kept(TOVA(budget=BUDGET), fed(TOVA(budget=BUDGET), weights, sizes, LENGTH))
    mean = weights[:, :, -1].mean((0, 1))
    assert got == [best(mean, BUDGET - 1, range(LENGTH - 1)) | {LENGTH - 1}] * HEADS


@pytest.mark.parametrize("sizes", [(LENGTH,), (10, 11, 2), (20, 3)])
def test_snapkv_keeps_what_the_window_attends_to_averaged_over_neighbours(sizes, rng):
    """Listing 1: attention of the window's queries to the tokens before it, avg_pool1d(kernel 5, padding 2), top k; the window
    stays. The window lies across chunks."""
    policy = SnapKV(budget=BUDGET, recent=4)
    weights = attention(rng)
    got = kept(policy, fed(policy, weights, sizes, LENGTH))
    window = set(range(LENGTH - 4, LENGTH))
    for head, slots in enumerate(got):
        votes = weights[head, :, -4:, : LENGTH - 4].sum((0, 1))
        pooled = np.convolve(votes, np.ones(5) / 5, mode="same")
        assert slots == window | best(pooled, BUDGET - 4, range(LENGTH - 4))


def test_snapkv_lets_no_other_query_vote(rng):
    policy, prompt = SnapKV(budget=BUDGET, recent=4), LENGTH - 6  # the last 6 are of the answer
    asked = jnp.asarray([[*range(LENGTH), -1]])
    counted = np.asarray(policy.weigh(asked, jnp.asarray([prompt])))[0]
    assert np.flatnonzero(counted).tolist() == list(range(prompt - 4, prompt))


def test_kvzip_keeps_neighbours_but_first_what_was_attended_to():
    recorded = jnp.zeros((1, 12, 1)).at[0, 5, 0].set(1.0).at[0, 9, 0].set(0.5).at[0, 11, 0].set(2.0)
    slots, length = jnp.arange(12), jnp.int32(10)  # slot 11 holds nothing
    worth = np.asarray(KVzip(ratio=0.5, pool=3).worth(recorded, slots, length))[0]
    assert np.argmax(worth) == 5 and np.flatnonzero(worth).tolist() == [4, 5, 6, 8, 9, 10]
    assert worth[4] == worth[6] and 0.9 < worth[4] < 1 and worth[10] == worth[8] < 0.5
    with pytest.raises(FormatError, match="pool 4; allowed: odd"):
        KVzip(ratio=0.5, pool=4)


@pytest.mark.parametrize("sizes", [(10,), (4, 6)])
def test_kvzip_keeps_what_the_repetition_attends_to_most(sizes, rng):
    """The maximum over the queries that are fed again and the heads of a group; the prompt's own do not count."""
    prompt = LENGTH - 10 + 1  # of which all but the last token are compacted
    policy = KVzip(budget=BUDGET, sinks=1, recent=2)
    weights = attention(rng)
    recorded = fed(policy, weights, (LENGTH - 10, *sizes), prompt)
    got = kept(policy, recorded, length=prompt - 1)
    for head, slots in enumerate(got):
        most = weights[head, :, -10:, : prompt - 1].max((0, 1))
        safe = {0, prompt - 2, prompt - 3}
        assert slots == safe | best(most, BUDGET - 3, set(range(prompt - 1)) - safe)


def test_kvzip_feeds_the_prompt_again_in_parts():
    policy = KVzip(ratio=0.5, part=4)
    assert policy.replay([7, 8], [1, 2, 3, 4, 5, 6]) == [[7, 8, 1, 2, 3, 4], [7, 8, 5, 6]]


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_for_all_keeps_all(name, rng):
    kind = POLICIES[name]
    policy = kind(budget=LENGTH) if not kind.once else kind(ratio=1.0, recent=2)
    recorded = fed(policy, attention(rng), (LENGTH,), LENGTH) if kind.channels else None
    assert kept(policy, recorded, budget=LENGTH) == [set(range(LENGTH))] * HEADS


# What the host plans by.


def test_a_rolling_row_is_compacted_each_time_it_is_full():
    policy = StreamingLLM(budget=10, sinks=2, slack=3)
    slots, events = 0, []
    for tokens in range(1, 30):
        slots += 1
        if policy.room(slots, tokens, prompt=7) == 0:
            events.append(tokens)
            slots = policy.kept(7)
    assert events == [13, 16, 19, 22, 25, 28] and policy.most(7, 100) == policy.held(100) == 13
    assert policy.room(4, 4, prompt=7) == 9


def test_a_prompt_is_compacted_once():
    policy = SnapKV(ratio=0.25, recent=4)
    assert [policy.kept(n) for n in (3, 5, 16, 21, 40)] == [3, 5, 5, 6, 10]
    assert policy.room(10, 10, prompt=40) == 30 and policy.room(40, 40, prompt=40) == 0
    assert policy.room(10, 40, prompt=40) is None and policy.room(20, 50, prompt=40) is None
    assert policy.room(5, 5, prompt=5) is None, "it is within its budget"
    assert policy.most(40, 50) == 40 and policy.most(40, 90) == 10 + 50


def test_kvzip_is_done_before_the_last_token():
    policy = KVzip(ratio=0.25, sinks=1, recent=2, part=8, instruction="")
    assert policy.room(39, 39, prompt=40) == 0 and policy.room(38, 38, prompt=40) == 1
    assert policy.most(40, 41) == 39 + 8, "the prompt and a part of it again"
    assert policy.room(0, 0, prompt=1) is None


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: StreamingLLM(budget=5, sinks=4, recent=2),
            "budget of 5 tokens; allowed: above 6, the 4 sinks and 2 recent",
        ),
        (lambda: H2O(budget=8, recent=8), "budget of 8 tokens; allowed: above 8"),
        (lambda: SnapKV(budget=64), "budget of 64 tokens; allowed: above 64"),
        (lambda: SnapKV(), "budget None and ratio None; allowed: one of them"),
        (lambda: SnapKV(budget=100, ratio=0.5), "budget 100 and ratio 0.5; allowed: one of them"),
        (lambda: KVzip(ratio=1.5), "ratio 1.5; allowed: above 0, at most 1"),
        (lambda: SnapKV(ratio=0.5, pool=4), "pool 4; allowed: odd"),
        (lambda: TOVA(budget=8, slack=0), "slack 0; allowed: at least 1"),
        (lambda: KVzip(ratio=0.5, part=0), "part 0; allowed: at least 1"),
        (lambda: StreamingLLM(budget=8, sinks=-1), "sinks -1; allowed: at least 0"),
    ],
)
def test_bad_options_are_refused_with_numbers(build, message):
    with pytest.raises(FormatError, match=message):
        build()


@pytest.mark.parametrize("kind", POLICIES.values())
def test_policies_say_what_they_need(kind):
    """What the engine and legality ask; a policy that depends on the query records attention."""
    assert kind.channels or not kind.by_query
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert kind.reindexed == (kind is StreamingLLM) and kind.replays == (kind is KVzip)
