"""Token choice: which tokens can come, what penalties and bias do, and log-probabilities, against plain numpy."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.engine.sampling import mark, penalize, sample
from optx.errors import RequestError

V = 12


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> set[int]:
    """The tokens that may come, by sorting."""
    x = logits / temperature
    p = np.exp(x - x.max())
    order = [i for i in np.argsort(-x, kind="stable") if p[i] >= min_p]
    order = order[: top_k or V]
    mass = p[order] / p[order].sum()
    return {int(token) for token, before in zip(order, np.cumsum(mass) - mass, strict=True) if before < top_p}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 5, "top_p": 0.5, "temperature": 2.0},
        {"top_k": 6, "min_p": 0.05, "top_p": 0.8, "temperature": 0.5},
        {"top_k": 100},
    ],
)
def test_exactly_the_kept_tokens_come(knobs):
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5 - 1
    draws = 6000
    row = lambda value, dtype=jnp.float32: jnp.full(draws, value, dtype)  # noqa: E731
    tokens = sample(
        jnp.tile(logits, (draws, 1)),
        row(knobs.get("temperature", 1.0)),
        row(knobs.get("top_k", 0), jnp.int32),
        row(knobs.get("top_p", 1.0)),
        jnp.arange(draws, dtype=jnp.uint32),
        row(0, jnp.int32),
        row(knobs.get("min_p", 0.0)),
    )
    wanted = kept(logits, **knobs)
    share = np.bincount(np.asarray(tokens), minlength=V) / draws
    assert set(np.flatnonzero(share)) <= wanted
    p = np.exp(logits / knobs.get("temperature", 1.0))
    p = np.where([i in wanted for i in range(V)], p, 0)
    np.testing.assert_allclose(share, p / p.sum(), atol=0.03)


def test_equal_logits_stay_together():
    logits = jnp.asarray([[1.0, 3.0, 3.0, -2.0]] * 200)
    seeds = jnp.arange(200, dtype=jnp.uint32)
    ones = jnp.ones(200)
    tokens = sample(logits, ones, jnp.ones(200, jnp.int32), ones, seeds, jnp.zeros(200, jnp.int32))
    assert set(np.asarray(tokens)) == {1, 2}


def test_marks_and_penalties():
    seen = jnp.zeros((3, V), jnp.uint16)
    slots = jnp.asarray([0, 0, 0, 2, 3], jnp.int32)  # 3: no row
    seen = mark(seen, slots, jnp.asarray([4, 4, 5, 6, 7]), jnp.asarray([True, True, True, False, True]))
    for _ in range(3):
        seen = mark(seen, jnp.asarray([0, 2]), jnp.asarray([5, 6]), jnp.zeros(2, bool))
    assert (
        np.asarray(seen)[0, [4, 5]].tolist() == [1, 7] and np.asarray(seen)[2, 6] == 8 and np.asarray(seen).sum() == 16
    )
    logits = np.random.default_rng(1).normal(size=(3, V)).astype(np.float32)
    found = penalize(jnp.asarray(logits), seen, *(jnp.asarray(x) for x in ([2.0, 2.0, 1.0], [0.5] * 3, [0.25] * 3)))
    wanted = logits.copy()
    for token, times in ((4, 0), (5, 3)):
        x = wanted[0, token]
        wanted[0, token] = (x / 2 if x > 0 else x * 2) - 0.25 * times - 0.5 * (times > 0)
    wanted[2, 6] -= 0.25 * 4 + 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@functools.cache
def model():
    return optx.compile(families.concrete("llama"))


@functools.cache
def engine(ticks: int) -> Engine:
    return Engine(model().program, EngineOptions(rows=3, context=48, page_size=4, chunks=(4,), ticks=ticks))


def answer(prompts, how, ticks=1):
    requests = [engine(ticks).add_request(prompt, how) for prompt in prompts]
    engine(ticks).run()
    return requests


@pytest.mark.parametrize("ticks", [1, 3])
def test_penalties_bias_and_logprobs_in_the_engine(ticks):
    """Greedy under penalties, worked out from the full forward's logits; a plain request runs beside them."""
    how = Sampling(
        max_tokens=7,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.7,
        logit_bias={7: 1.5, 9: -3},
        logprobs=3,
    )
    prompts = [families.prompt(length, seed=length) for length in (9, 3)]
    plain = engine(ticks).add_request(prompts[0], Sampling(max_tokens=7))
    for request, prompt in zip(answer(prompts, how, ticks), prompts, strict=True):
        tokens, times = list(prompt), np.zeros(families.VOCAB)
        for i, token in enumerate(request.output):
            raw = np.asarray(model().logits([tokens])[0, -1], np.float64)
            likely = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
            x = raw.copy()
            x[7] += 1.5
            x[9] -= 3
            met = (times > 0) | np.isin(np.arange(len(x)), prompt)
            x = np.where(met, np.where(x > 0, x / 1.3, x * 1.3), x) - 0.7 * times - 0.4 * (times > 0)
            assert token == x.argmax()
            found = request.logprobs[i]
            assert found.chosen == pytest.approx(likely[token], abs=1e-3)
            assert [t for t, _ in found.top] == np.argsort(-likely)[:3].tolist()
            np.testing.assert_allclose([p for _, p in found.top], np.sort(likely)[::-1][:3], atol=1e-3)
            tokens.append(token)
            times[token] += 1
    assert plain.output == answer([prompts[0]], Sampling(max_tokens=7))[0].output
    assert not plain.logprobs


def test_a_row_forgets_what_the_one_before_saw():
    how = Sampling(max_tokens=5, frequency_penalty=2.0)
    alone = answer([families.prompt(5)], how)[0].output
    for _ in range(4):
        assert answer([families.prompt(5)], how)[0].output == alone


@pytest.mark.parametrize(
    "field, value",
    [
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("logit_bias", {1: 200}),
        ("logit_bias", [1]),
        ("logprobs", 21),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(RequestError, match=f"sampling.{field}: got"):
        dataclasses.replace(Sampling(), **{field: value})


def test_no_sort_in_the_program():
    """A sort of a row of 150k logits would take longer than the rest of the choice."""
    text = jax.jit(sample).lower(*(jnp.zeros(s) for s in ((2, 64), 2)), jnp.zeros(2, jnp.int32), jnp.zeros(2),
                                 jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.int32)).as_text()  # fmt: skip
    assert "sort" not in text
