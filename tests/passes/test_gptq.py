"""GPTQ against the paper's algorithm in float64, less error than rounding, experts apart, what cannot be solved."""

import dataclasses

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, ir, tensor
from optx.errors import LegalityError, PassError
from optx.nn.core import Linear
from optx.passes.gptq import GPTQ, gptq, solve
from optx.recipe import Recipe
from optx.registry import Noted, Seen, Site
from optx.tensor import QTensor

INT4 = GPTQ(format="int4", group=32)
FORMATS = ("int4", "int3_asym", "int4_g32", "fp8_e4m3", "nvfp4", "mxfp4")


def problem(d=96, f=24, tokens=400, seed=0):
    """rows [f, d] and the Gram matrix of inputs whose channels differ in size and lean on each other."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)) / np.sqrt(d))
    x *= np.exp(rng.standard_normal(d))
    return jnp.asarray(rng.standard_normal((f, d)), jnp.float32), jnp.asarray(x.T @ x / tokens, jnp.float32)


def rows_of(parts, format_, d) -> np.ndarray:
    return np.asarray(format_.decode(parts, d, jnp.float32), np.float64)


def loss(rows, parts, gram, format_) -> float:
    off = rows_of(parts, format_, rows.shape[1]) - np.asarray(rows, np.float64)
    return float(np.einsum("fd,de,fe->", off, np.asarray(gram, np.float64), off))


def paper(rows, gram, format_, damp, order) -> np.ndarray:
    """Optimal brain surgeon step by step with the explicit inverse (arXiv:2210.17323, section 3.1), in float64 -> [f, d]."""
    w, h = np.array(rows, np.float64), np.array(gram, np.float64)
    d = w.shape[1]
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(d))
    step, offset = (np.asarray(x, np.float64) for x in format_.steps(*format_.grid(rows), d))
    out = np.zeros_like(w)
    for i in np.argsort(-np.diag(h), kind="stable") if order else range(d):
        here = (jnp.asarray(x[:, i], jnp.float32) for x in (w, step, offset))
        x, s, o = here
        out[:, i] = format_.value(format_.code(x, s, o), s, o)
        error = (w[:, i] - out[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0  # eliminated
        inverse[i, i] = 1
    return out


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_papers_algorithm(name, order):
    rows, gram = problem()
    format_ = formats.parse(name)
    parts, factor = solve(rows, gram, format=format_, act_order=order, block=32)
    want = paper(rows, gram, format_, 0.01, order)
    same = np.isclose(rows_of(parts, format_, rows.shape[1]), want, rtol=1e-5, atol=1e-6)
    assert np.mean(same) > 0.99, "but for numbers that float32 tips to the next code"
    assert np.isfinite(factor)


@pytest.mark.parametrize("name", FORMATS)
def test_less_error_than_rounding_alone(name):
    rows, gram = problem()
    format_ = formats.parse(name)
    rounded = loss(rows, format_.encode(rows), gram, format_)
    assert loss(rows, solve(rows, gram, format=format_)[0], gram, format_) < 0.75 * rounded
    searched = loss(rows, solve(rows, gram, format=format_, scales="mse")[0], gram, format_)
    assert searched < 0.85 * rounded


def test_blocks_change_nothing():
    rows, gram = problem()
    format_ = formats.parse("int4")
    whole = rows_of(solve(rows, gram, format=format_, block=96)[0], format_, 96)
    for block in (16, 128):  # 96 is no multiple of 128
        got = rows_of(solve(rows, gram, format=format_, block=block)[0], format_, 96)
        assert np.mean(np.isclose(got, whole, rtol=1e-5)) > 0.99


def test_experts_are_rounded_each_by_its_own_tokens():
    each = [problem(seed=seed) for seed in range(3)]
    rows, grams = (jnp.stack(parts) for parts in zip(*each, strict=True))
    format_ = formats.parse("int4_g32")
    together, _ = solve(rows, grams, format=format_)
    for i, (w, gram) in enumerate(each):
        alone = rows_of(solve(w, gram, format=format_)[0], format_, 96)
        got = rows_of(dataclasses.replace(together, data=together.data[i], scale=together.scale[i]), format_, 96)
        assert np.mean(np.isclose(got, alone, rtol=1e-5)) > 0.99


def test_a_channel_that_was_never_active_is_rounded_alone():
    rows, gram = problem()
    gram = gram.at[5].set(0).at[:, 5].set(0)
    format_ = formats.parse("int4")
    got = rows_of(solve(rows, gram, format=format_)[0], format_, 96)
    want = rows_of(format_.encode(rows), format_, 96)
    np.testing.assert_array_equal(got[:, 5], want[:, 5])
    assert np.all(np.isfinite(got))


def linear(weight) -> Linear:
    return ir.replace(Linear(*weight.shape), weight=weight)


def test_a_gram_matrix_without_a_factor_is_an_error():
    rows, gram = problem()
    singular = gram.at[7].set(gram[3]).at[:, 7].set(gram[:, 3])
    site = Site(path="layers/0/mlp/up", layers=1, seen=Seen(tokens=jnp.int32(400), gram=singular))
    with pytest.raises(PassError, match="layers/0/mlp/up: the Gram matrix of 400 tokens.*larger damp"):
        gptq(site, linear(rows.T), dataclasses.replace(INT4, damp=-0.5))


def test_without_statistics_it_says_so():
    rows, _ = problem()
    with pytest.raises(PassError, match="no statistics of its inputs; compile with calibration text"):
        gptq(Site(path="x", layers=1), linear(rows.T), INT4)


def test_what_does_not_divide_or_is_packed():
    rows, gram = problem()
    site = Site(path="x", layers=1, seen=Seen(tokens=jnp.int32(400), gram=gram))
    with pytest.raises(PassError, match="axis of 96 is not a multiple of the group 64"):
        gptq(site, linear(rows.T), dataclasses.replace(INT4, group=64))
    with pytest.raises(PassError, match="packed already"):
        gptq(site, linear(tensor.quantize(rows.T, formats.parse("int8"))), INT4)


def test_a_model_comes_out_as_planned():
    model = families.concrete("llama")
    out, (record,) = calibrated.through(model, Recipe(weights=[dataclasses.replace(INT4, match="layers/.*")]))
    weight = out.layers[0].mixer.q.weight.get_value()
    assert isinstance(weight, QTensor) and str(weight.format) == "int4_g32"
    assert record.sites == 14 and set(record.errors) and record.notes == {}


def test_twice_is_refused():
    model = families.abstract("llama")
    from optx.passes.quantize_weights import QuantizeWeights

    with pytest.raises(LegalityError, match="packed"):
        calibrated.through(
            ir.init_weights(model), Recipe(weights=[INT4, QuantizeWeights(format="int8", match="layers/.*")])
        )


def test_experts_with_few_tokens_are_told():
    rows, gram = problem()
    from optx.nn.moe import GroupedLinear

    part = ir.replace(GroupedLinear(2, 96, 24), weight=jnp.stack([rows.T, rows.T]))
    seen = Seen(tokens=jnp.asarray([3, 4000]), gram=jnp.stack([gram, gram]))
    found = gptq(Site(path="x", layers=1, seen=seen), part, INT4)
    assert isinstance(found, Noted) and found.note == "1 of 2 experts saw under 0.5% of the tokens: 0 (3)"
