"""Speculation changes no token: drafts of any quality are verified against the target's own choices."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from optx.engine.ngram import LONGEST, History
from optx.engine.sampling import choose, mark
from optx.engine.speculation import BURST, PROBE, Governor, Speculation, prior_cost, verify
from optx.errors import RequestError

V = 6
PLAIN = (1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)  # KNOBS of a draw at temperature 1


def row(x, count, dtype=jnp.float32):
    return jnp.tile(jnp.asarray(x, dtype), (count, *[1] * np.ndim(x)))


def chain(rng, strength=1.5):
    """Logits of the next token by the one before: a toy model."""
    return jnp.asarray(rng.normal(size=(V, V)) * strength, jnp.float32)


def plain(table, first, count, knobs, seeds):
    """Tokens [B, count] drawn one after the other."""
    out = [first]
    for i in range(count):
        steps = jnp.full(len(seeds), 1 + i, jnp.int32)
        out.append(choose("sampled", table[out[-1]], knobs, seeds, steps).tokens)
    return np.stack(out[1:], axis=1)


def speculated(table, drafter, first, count, knobs, seeds, width):
    """The same with `width` drafts a tick of another toy model, and the share of drafts that were accepted."""
    b = len(seeds)
    out, have, newest = np.full((b, count + width + 1), -1), np.zeros(b, int), first
    accepted = offered = 0
    while have.min() < count:
        steps = jnp.asarray(1 + have, jnp.int32)
        drafts = [newest]
        for i in range(width):
            drafts.append(choose("sampled", drafter[drafts[-1]], knobs, seeds, steps + i).tokens)
        tokens = jnp.stack(drafts, axis=1)
        counts = jnp.full(b, width + 1, jnp.int32)
        chosen, taken = verify("sampled", table[tokens], tokens, counts, knobs, seeds, steps)
        taken = np.asarray(taken)
        for i, row_tokens in enumerate(np.asarray(chosen.tokens)):
            live = (i <= taken) & (have + i < out.shape[1])
            assert (row_tokens >= 0).tolist() == (i <= taken).tolist()
            out[np.flatnonzero(live), (have + i)[live]] = row_tokens[live]
        newest = jnp.asarray(np.asarray(chosen.tokens)[taken, np.arange(b)])
        going = have < count
        accepted, offered = accepted + taken[going].sum(), offered + width * going.sum()
        have = np.minimum(have + taken + 1, count)
        newest = jnp.where(have < count, newest, first)
    return out[:, :count], accepted / offered


@pytest.mark.parametrize("knobs", [PLAIN, (0.7, 4, 0.9, 0.02, 1.0, 0.0, 0.0)], ids=["plain", "cut"])
def test_the_distribution_is_the_targets(knobs, rng):
    """Chi-square over triples of tokens, whose probabilities are those of the target alone; and the very tokens of no drafts."""
    table, drafter = chain(rng), chain(rng)
    b = 24_000
    seeds, first = jnp.arange(b, dtype=jnp.uint32), jnp.zeros(b, jnp.int32)
    found, _ = speculated(table, drafter, first, 3, row(knobs, b), seeds, width=3)
    np.testing.assert_array_equal(found, plain(table, first, 3, row(knobs, b), seeds))
    one = np.asarray(table, np.float64) / knobs[0]
    p = np.exp(one - one.max(-1, keepdims=True))
    order = np.argsort(-p, axis=-1)
    for i in range(V):  # min-p, then top-k, then of what they weigh together top-p, by sorting
        kept = [t for t in order[i] if p[i, t] >= knobs[3]][: knobs[1] or V]
        mass = p[i, kept] / p[i, kept].sum()
        kept = [t for t, before in zip(kept, np.cumsum(mass) - mass, strict=True) if before < knobs[2]]
        p[i] = np.where(np.isin(np.arange(V), kept), p[i], 0)
    p /= p.sum(-1, keepdims=True)
    wanted = (p[0][:, None, None] * p[:, :, None] * p[None]).reshape(-1) * b
    times = np.bincount(np.ravel_multi_index(found.T, (V, V, V)), minlength=V**3)
    assert times[wanted == 0].sum() == 0
    common = wanted >= 5
    rare = (times[~common].sum(), wanted[~common].sum())
    times, wanted = np.append(times[common], rare[0]), np.append(wanted[common], rare[1])
    many = wanted > 0
    assert scipy.stats.chisquare(times[many], wanted[many]).pvalue > 1e-3


def test_the_wrong_distribution_would_be_seen(rng):
    """The drafts themselves fail the same chi-square test."""
    table, drafter = chain(rng), chain(rng)
    b = 24_000
    seeds, first = jnp.arange(b, dtype=jnp.uint32), jnp.zeros(b, jnp.int32)
    times = np.bincount(plain(drafter, first, 1, row(PLAIN, b), seeds)[:, 0], minlength=V)
    wanted = scipy.special.softmax(np.asarray(table[0], np.float64)) * b
    assert scipy.stats.chisquare(times, wanted).pvalue < 1e-9


@pytest.mark.parametrize("near", [0.2, 0.6, 3.0])
def test_shared_noise_accepts_nearly_as_much_as_a_maximal_coupling(near, rng):
    """Drafts are accepted as arXiv:2408.07978 works out, at least (1 - d) / (1 + d) where a maximal coupling has 1 - d."""
    target = rng.normal(size=V) * 1.5
    p, q = (scipy.special.softmax(x) for x in (target, target + near * rng.normal(size=V)))
    b = 40_000
    tables = [row(np.log(x), V) for x in (p, q)]  # whatever came before
    seeds, first = jnp.arange(b, dtype=jnp.uint32), jnp.zeros(b, jnp.int32)
    _, share = speculated(*tables, first, 1, row(PLAIN, b), seeds, width=1)
    expected = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(V))
    distance = np.abs(p - q).sum() / 2
    assert share == pytest.approx(expected, abs=0.012)
    assert (1 - distance) / (1 + distance) <= expected <= 1 - distance + 1e-12


def test_greedy_rows_keep_drafts_that_are_the_argmax(rng):
    logits = jnp.asarray(rng.normal(size=(4, 4, V)), jnp.float32)
    best = np.asarray(logits.argmax(-1))
    tokens = np.concatenate([np.zeros((4, 1), np.int64), best[:, :3]], axis=1)
    tokens[1, 2] = (tokens[1, 2] + 1) % V  # the second draft is wrong
    counts = jnp.asarray([4, 4, 2, 0])  # all drafts, a wrong one, one draft alone, idle
    for way in ("greedy", "sampled"):
        chosen, accepted = verify(
            way, logits, jnp.asarray(tokens, jnp.int32), counts, jnp.zeros((4, 7)).at[:, 2].set(1),
            jnp.zeros(4, jnp.uint32), jnp.zeros(4, jnp.int32),
        )  # fmt: skip
        assert accepted.tolist() == [3, 1, 1, 0]
        assert chosen.tokens[:, 0].tolist() == best[0].tolist()
        assert chosen.tokens[:, 1].tolist() == [best[1, 0], best[1, 1], -1, -1]
        assert chosen.tokens[:, 2].tolist() == [best[2, 0], best[2, 1], -1, -1]
        assert chosen.tokens[:, 3].tolist() == [-1] * 4


def test_penalties_bias_and_logprobs_are_those_of_plain_ticks(rng):
    """Each position is penalized for the drafts before it."""
    b, q = 3, 4
    logits = jnp.asarray(rng.normal(size=(b, q, V)), jnp.float32)
    knobs = row((0.0, 0, 1.0, 0.0, 1.3, 0.6, 0.8), b).at[1, 0].set(0.9)
    seeds, steps = jnp.arange(b, dtype=jnp.uint32), jnp.asarray([5, 6, 7], jnp.int32)
    bias = (row([2, -1], b, jnp.int32), row([1.5, 0.0], b))
    known = seen = mark(jnp.zeros((b, V), jnp.uint16), jnp.arange(b), jnp.asarray([1, 2, 3]), jnp.zeros(b, bool))
    one_by_one = []
    for i in range(q):
        one_by_one.append(choose("full", logits[:, i], knobs, seeds, steps + i, seen, bias))
        seen = mark(seen, jnp.arange(b), one_by_one[-1].tokens, jnp.zeros(b, bool))
    drafts = jnp.stack([jnp.zeros(b, jnp.int32), *(chosen.tokens for chosen in one_by_one[:-1])], axis=1)
    chosen, accepted = verify("full", logits, drafts, jnp.full(b, q), knobs, seeds, steps, known, bias)
    assert accepted.tolist() == [q - 1] * b
    jax.tree.map(np.testing.assert_array_equal, chosen, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


def test_options_are_checked():
    for wrong, message in (
        ({"method": "ngrams"}, "did you mean 'ngram'"),
        ({"tokens": 8}, "got 8; allowed: 1 to 7"),
        ({"method": "draft"}, "none given for method 'draft'"),
        ({"draft": object()}, "a model given for method 'ngram'"),
        ({"least": 0}, "at least 1"),
    ):
        with pytest.raises(RequestError, match=message):
            Speculation(**wrong)


# Drafts from the text.


def looked_up(text, count, least):
    """The longest shared end, the latest of those, by trying all places; what follows it repeats."""
    best = max(range(len(text) - 1), key=lambda i: (agree(text, i), i), default=None)
    if best is None or agree(text, best) < least:
        return []
    return [text[best + 1 + j % (len(text) - best - 1)] for j in range(count)]


def agree(text, i):
    return next((n for n in range(LONGEST) if i < n or text[i - n] != text[len(text) - 1 - n]), LONGEST)


@pytest.mark.parametrize("vocab", [2, 5, 40])
def test_lookup_finds_the_longest_latest_end(vocab, rng):
    text = rng.integers(0, vocab, 200).tolist()
    history = History(text[:1])
    for end in range(1, len(text)):
        for least in (1, 2, 4):
            assert history.draft(4, least).tolist() == looked_up(text[:end], 4, least)
        history.extend(text[end : end + 1])


def test_lookup_goes_on_with_a_repetition():
    assert History([9, 1, 2, 1, 2]).draft(5, 2).tolist() == [1, 2, 1, 2, 1]
    assert History([1, 2, 3]).draft(3, 1).size == 0


def test_lookup_is_quick(rng):
    history = History(rng.integers(0, 200, 8000).tolist())
    history.extend([1, 2, 3])
    seconds = min(_seconds(lambda: history.draft(4, 2)) for _ in range(200))
    assert seconds < 50e-6


def _seconds(do):
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


# When to speculate.


def governor(cost=1.2):
    return Governor(Speculation(tokens=4), lambda rows: cost)


def wanted(judge, rows, dispatches):
    out = []
    for _ in range(dispatches):
        out.append(judge.wants(rows))
        judge.asked += 1
    return out


def test_speculates_while_it_pays():
    judge = governor()
    for _ in range(40):
        assert wanted(judge, 2, 1) == [True]
        judge.verified(2, 6)
    assert judge.gain == pytest.approx(3, abs=0.1)
    for _ in range(40):
        judge.verified(2, 2)
    assert wanted(judge, 2, 3 * PROBE).count(True) == 3 * BURST, "now and then it is tried again"
    assert Governor(Speculation(always=True), lambda rows: 100.0).wants(8)


def test_measured_times_outweigh_the_prior():
    judge = governor(cost=1.0)
    judge.gain = 2.0
    for _ in range(3):
        judge.took(True, 4, 0.030)
        judge.took(False, 4, 0.010)
    assert judge.cost(4) == pytest.approx(3) and judge.cost(1) == 1
    assert wanted(judge, 4, PROBE).count(True) <= BURST
    assert wanted(judge, 1, PROBE).count(True) >= PROBE - 1


def test_prior_grows_with_the_batch_and_the_draft():
    cost = prior_cost(Speculation(tokens=4), share=0.0)
    assert cost(1) == 1 and cost(64) == pytest.approx(320 / 256) and cost(512) == pytest.approx(5)
    assert prior_cost(Speculation(tokens=4), share=0.1)(1) == pytest.approx(1.5)
