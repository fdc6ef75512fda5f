"""Perplexity, KL divergence and agreement, against numpy; windows that score each token once."""

import dataclasses
import math

import families
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import optx
from optx import evaluate
from optx.checkpoint.source import from_module
from optx.errors import RequestError
from optx.evaluate import windows_of

TEXT = "It was the best of times, it was the wörst of times 世界 🤽."


def compiled(family="llama", seed=0, add_bos=False, tokenizer=True, **changes):
    changes = {"num_hidden_layers": 1} | changes
    source = from_module(families.concrete(family, seed, **changes))
    if tokenizer:
        source = dataclasses.replace(source, tokenizer=families.tokenizer(add_bos))
    return optx.compile(source)


@pytest.fixture(scope="module")
def plain():
    return compiled()


@pytest.fixture(scope="module")
def bos():
    return compiled(add_bos=True)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def surprises(model, ids, room, stride, first) -> list[float]:
    """-log p of every token that is scored, from the protocol's words: windows of `room` tokens of text every `stride`,
    each behind the first token; only what no earlier window scored; an incomplete window only where windows overlap."""
    out, scored = [], set()
    for start in range(0, len(ids), stride):
        chunk = ids[start : start + room]
        if len(chunk) < room and stride == room and start:
            break
        lead = [] if first is None else [first]
        logp = log_softmax(families.oracle(model, lead + chunk))
        for i, token in enumerate(lead + chunk):
            at = start + i - len(lead)
            if i and at not in scored:
                scored.add(at)
                out.append(-logp[i - 1, token])
        if start + room >= len(ids):
            break
    return out


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("stride", [None, 5, 11])
def test_perplexity_is_numpys(add_bos, stride, plain, bos):
    model = bos if add_bos else plain
    first = families.BOS if add_bos else None
    ids = model.tokenizer.encode(TEXT, add_special=False)
    assert len(ids) == len(TEXT.encode()), "a token a byte"
    room = 12 - add_bos
    want = surprises(model.tree, ids, room, stride or room, first)
    got = model.evaluate(TEXT, context=12, stride=stride)
    assert got.tokens == len(want)
    assert got.perplexity == pytest.approx(math.exp(np.mean(want)), rel=1e-5)
    assert (
        got.kl is None
        and got.top1 is None
        and set(got.to_dict()) == {"perplexity", "bits_per_byte", "windows", "tokens"}
    )


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_other_families(family):
    model = compiled(family, add_bos=True)
    want = surprises(model.tree, model.tokenizer.encode(TEXT, add_special=False), 11, 11, families.BOS)
    assert model.evaluate(TEXT, context=12).perplexity == pytest.approx(math.exp(np.mean(want)), rel=1e-5)


def test_bits_a_byte(bos):
    """A byte a token: bits a byte are bits a token."""
    text = "plain ascii text, scored in full"
    got = bos.evaluate(text, context=12, stride=7)
    assert got.tokens == len(text)
    assert got.bits_per_byte == pytest.approx(math.log2(got.perplexity))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = families.concrete("llama", num_hidden_layers=1)
    head = model.output.weight
    head.set_value(0 * head.get_value())
    source = dataclasses.replace(from_module(model), tokenizer=families.tokenizer())
    assert optx.compile(source).evaluate(TEXT, context=12).perplexity == pytest.approx(families.VOCAB)


def test_a_model_beyond_all_floats_is_still_reported():
    model = families.concrete("llama", num_hidden_layers=1)
    head = model.output.weight
    head.set_value(1e5 * head.get_value())
    source = dataclasses.replace(from_module(model), tokenizer=families.tokenizer())
    assert optx.compile(source).evaluate(TEXT, context=12).perplexity > 1e300


@pytest.mark.parametrize("stride", [None, 4])
def test_a_model_against_itself(stride, bos):
    got = bos.evaluate(TEXT, context=12, stride=stride, against=bos)
    assert got.kl == pytest.approx(0, abs=1e-6) and got.top1 == 1
    assert got.perplexity == bos.evaluate(TEXT, context=12, stride=stride).perplexity


def test_a_model_against_another(bos):
    other = compiled(seed=1, add_bos=True)
    ids = bos.tokenizer.encode(TEXT, add_special=False)
    kl, agree = [], []
    for start in range(0, len(ids) - 10, 11):
        window = [families.BOS, *ids[start : start + 11]]
        p, q = (log_softmax(families.oracle(model.tree, window))[:-1] for model in (other, bos))
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    got = bos.evaluate(TEXT, context=12, against=other)
    assert got.kl == pytest.approx(np.mean(kl), rel=1e-4), "KL(reference || model)"
    assert got.top1 == pytest.approx(np.mean(agree)) and got.top1 < 1
    assert got.perplexity == bos.evaluate(TEXT, context=12).perplexity
    assert other.evaluate(TEXT, context=12, against=bos).kl != pytest.approx(got.kl, rel=1e-3)


def test_max_windows(bos):
    whole = bos.evaluate(TEXT, context=12)
    assert bos.evaluate(TEXT, context=12, max_windows=99) == whole
    two = bos.evaluate(TEXT, context=12, max_windows=2)
    assert (two.windows, two.tokens) == (2, 22)
    assert two == bos.evaluate(TEXT.encode()[:22].decode(), context=12)


def test_a_short_text_is_one_window(plain, bos):
    assert plain.evaluate("ab", context=12).tokens == 1
    assert bos.evaluate("a", context=12).tokens == 1
    assert bos.evaluate("ab", context=12).tokens == 2


def test_the_bar_shows_the_perplexity(bos, capsys):
    bos.evaluate(TEXT, context=12, progress=True)
    assert "perplexity=" in capsys.readouterr().err
    bos.evaluate(TEXT, context=12)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text, options, told",
    [
        ("", {}, "the text has 0 tokens; at least 2 needed"),
        ("a", {}, "the text has 1 tokens; at least 2 needed"),
        ("abc", {"context": 1}, "context 1; allowed: 2 to the model's 128"),
        ("abc", {"context": 129}, "context 129; allowed: 2 to the model's 128"),
        ("abc", {"stride": 0}, "stride 0; allowed: 1 to 12, the tokens of text in a window"),
        ("abc", {"stride": -3}, "stride -3; allowed: 1 to 12"),
        ("abc", {"stride": 13}, "stride 13; allowed: 1 to 12"),
        ("abc", {"max_windows": 0}, "max_windows 0; allowed: at least 1"),
        ("abc", {"max_windows": -1}, "max_windows -1; allowed: at least 1"),
        ("a\udfff", {}, "a lone surrogate"),
    ],
)
def test_what_cannot_be_scored(text, options, told, plain):
    with pytest.raises(RequestError, match=told):
        plain.evaluate(text, **{"context": 12, **options})


def test_with_a_first_token_a_window_holds_one_less(bos):
    with pytest.raises(RequestError, match="stride 12; allowed: 1 to 11, the tokens of text in a window"):
        bos.evaluate("abc", context=12, stride=12)
    with pytest.raises(RequestError, match="the text has 0 tokens; at least 1 needed"):
        bos.evaluate("", context=12)


def test_models_that_cannot_be_compared(plain):
    small = compiled(vocab_size=262)
    with pytest.raises(RequestError, match="vocabularies of 264 and 262 tokens cannot be compared"):
        plain.evaluate(TEXT, context=12, against=small)
    short = compiled(max_position_embeddings=8)
    with pytest.raises(RequestError, match="context 12; allowed: up to the reference's 8"):
        plain.evaluate(TEXT, context=12, against=short)
    with pytest.raises(RequestError, match="the model has no tokenizer"):
        compiled(tokenizer=False).evaluate(TEXT, context=12)
    few = compiled(vocab_size=100)
    with pytest.raises(RequestError, match="the tokenizer gave the id [0-9]+; the model has 100 ids"):
        few.evaluate(TEXT, context=12)


def test_the_function_is_the_method(plain):
    assert evaluate.evaluate(plain, TEXT, context=12) == plain.evaluate(TEXT, context=12)


@hypothesis.given(
    length=st.integers(0, 60), context=st.integers(2, 12), stride=st.integers(1, 12), first=st.sampled_from([None, 999])
)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_windows_score_each_token_once(length, context, stride, first):
    lead = int(first is not None)
    room = context - lead
    hypothesis.assume(stride <= room)
    ids = list(range(length))
    scored = []
    for window, fresh in windows_of(ids, context, stride, first):
        assert len(window) <= context and window[:lead] == [first] * lead
        text = window[lead:]
        assert text == list(range(text[0], text[0] + len(text))), "a window is a piece of the text"
        assert fresh >= 1, "the first token has nothing before it"
        scored += window[fresh:]
        assert not scored or text[0] == 0 or fresh >= room - stride + lead, "as much context as the stride leaves"
    assert scored == sorted(set(scored)), "no token twice"
    unscored = set(ids) - set(scored)
    if stride < room:
        assert unscored <= ({0} if first is None else set())
    else:
        tail = length - length % room if length > room else length
        begins = set() if first is not None else set(range(0, length, room))
        assert unscored == begins | set(range(tail, length)), "only window starts and the last incomplete window"
