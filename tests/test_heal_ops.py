"""Ops of a training step equal the reference ops, forward and in their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import heal_ops
from optx.pallas import dispatch
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.grouped_matmul.reference import grouped_matmul


def drawn(*shapes, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def close(found, wanted, tolerance):
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_and_their_gradients(dtype):
    """x of 16 bits, or float32 that came from 16 bits as the head's input does."""
    x, w, slope = drawn((2, 5, 24), (24, 40), (2, 5, 40))
    x, slope = x.astype(dtype), slope.astype(dtype)

    def through(x, w):
        with heal_ops.fast():
            return dispatch.call("matmul", (), x, w)

    assert "custom_vjp" in str(jax.make_jaxpr(through)(x, w))
    found, pull = jax.vjp(through, x, w)
    wanted, exact = jax.vjp(lambda x, w: x @ w, x.astype(jnp.float32), w.astype(jnp.float32))
    assert found.dtype == x.dtype
    close(found, wanted, 1e-5 if dtype == "float32" else 8e-3)
    for mine, its, like in zip(pull(slope), exact(slope.astype(jnp.float32)), (x, w), strict=True):
        assert mine.dtype == like.dtype
        close(mine, its, 8e-3)


def test_products_of_float32_weights_stay_as_they_are():
    x, w = drawn((3, 8), (8, 16), dtype="float32")
    with heal_ops.fast():
        text = str(jax.make_jaxpr(lambda x, w: dispatch.call("matmul", (), x, w))(x, w))
    assert "custom_vjp" not in text


def test_products_of_experts_and_their_gradients():
    """Rows that no expert owns give 0 and pass nothing on."""
    x, w, slope = drawn((11, 16), (4, 16, 8), (11, 8))
    sizes = jnp.array([3, 0, 5, 2], jnp.int32)
    found, pull = jax.vjp(lambda x, w: heal_ops.grouped(x, w, sizes), x, w)
    wanted, exact = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), *(part.astype(jnp.float32) for part in (x, w)))
    assert not found[10].any()
    close(found, wanted, 8e-3)
    for mine, its in zip(pull(slope), exact(slope.astype(jnp.float32)), strict=True):
        close(mine, its, 8e-3)
    assert not pull(slope)[1][1].any()


def test_which_experts_run_at_once(monkeypatch):
    x, w, sizes = *drawn((5, 16), (4, 16, 8)), jnp.array([1, 1, 1, 2], jnp.int32)

    def text():
        with heal_ops.fast():
            return str(jax.make_jaxpr(lambda *args: dispatch.call("grouped_matmul", (), *args))(x, w, sizes))

    assert " scan[" not in text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert " scan[" in text()
    monkeypatch.setattr(heal_ops, "EXPERTS", 3)
    assert " scan[" not in text()


MASKS = [Mask(), Mask(window=7), Mask(window=99), Mask(window=7, sinks=3), Mask(window=7, sinks=1, block=4)]


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dims", [(16, 16), (20, 12), (8, 24)])
def test_attention_as_cudnn_is_asked_for_it(mask, dims, chosen):
    """The same call to jax in XLA's implementation: masks, blocks that heads choose, scales, padded heads, groups of heads."""
    q, k, v, slope = drawn((2, 34, 6, dims[0]), (2, 34, 2, dims[0]), (2, 34, 2, dims[1]), (2, 34, 6, dims[1]))
    more = {}
    if chosen:  # its own block, and some
        own = jnp.arange(34)[:, None] // 8 == jnp.arange(5)
        more = {"chosen": own | (jax.random.uniform(jax.random.key(0), (2, 2, 34, 5)) < 0.5), "block": 8}
    assert heal_ops.declines(q, k, v, mask=mask, scale=0.3, backend="gpu", **more) is None

    def mine(q, k, v):
        return heal_ops._attention(q, k, v, mask=mask, scale=0.3, implementation="xla", **more)[:2]

    def its(q, k, v):
        return reference.flash_attention(q, k, v, mask=mask, scale=0.3, **more)[:2]

    (found, lse), pull = jax.vjp(mine, q, k, v)
    (wanted, sums), exact = jax.vjp(its, q, k, v)
    close(found, wanted, 1e-2)
    close(lse, sums, 1e-2)
    for a, b in zip(pull((slope, jnp.zeros_like(lse))), exact((slope, jnp.zeros_like(sums))), strict=True):
        close(a, b, 2e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": Mask(causal=False)}, "causal=False"),
        ({"mask": Mask(window=4, skip=2)}, "skip=2"),
        ({"mask": Mask(lag=4)}, "lag=4"),
        ({"softcap": 30.0}, "softcap"),
        ({"sink_logits": jnp.zeros(4)}, "sink_logits"),
        ({"backend": "cpu"}, "no GPU"),
    ],
)
def test_what_cudnn_does_not_take(change, said):
    q, k, v = drawn((1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16))
    assert said in heal_ops.declines(q, k, v, **{"mask": Mask(), "scale": 1.0, "backend": "gpu"} | change)


def test_what_cudnn_does_not_take_of_arrays():
    q, k, v = drawn((1, 8, 4, 256), (1, 8, 2, 256), (1, 8, 2, 256))
    assert "256" in heal_ops.declines(q, k, v, mask=Mask(), backend="gpu")
    q, k, v = drawn((1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16), dtype="float32")
    assert "float32" in heal_ops.declines(q, k, v, mask=Mask(), backend="gpu")
