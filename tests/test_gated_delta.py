"""The gated delta rule: chunks equal the step-by-step recurrence, and what pads a row leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import ir
from optx.cache import Layout, Ragged, View
from optx.errors import ConfigError
from optx.nn import GatedDelta
from optx.pallas.gated_delta import reference

B, K, N, HK, HV = 2, 2, 4, 8, 6
gated_delta = jax.jit(reference.gated_delta)


def arguments(length, decay=1.0, seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, length, K, HK), dtype=np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((B, length, N, HV), dtype=np.float32)
    g = -decay * rng.exponential(size=(B, length, N)).astype(np.float32)
    beta = rng.uniform(size=(B, length, N)).astype(np.float32)
    state = rng.standard_normal((B, N, HK, HV), dtype=np.float32)
    return q, k, v, g, beta, state


def recurrence(q, k, v, g, beta, state):
    """The definition, in float64."""
    state, out = state.astype(np.float64), []
    q, k = (np.repeat(x.astype(np.float64), N // K, axis=2) for x in (q, k))
    for t in range(v.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None]
        found = np.einsum("bnk,bnkv->bnv", k[:, t], state)
        update = beta[:, t, :, None] * (v[:, t] - found)
        state = state + k[:, t, :, :, None] * update[..., None, :]
        out.append(np.einsum("bnk,bnkv->bnv", q[:, t], state))
    return np.stack(out, axis=1), state


@pytest.mark.parametrize("decay", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunks_are_the_recurrence(length, decay):
    args = arguments(length, decay)
    for got, want in zip(gated_delta(*args), recurrence(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_equal_keys_that_overwrite_each_other():
    """beta = 1 and one key for all tokens: the system has ones everywhere below its diagonal."""
    q, k, v, _, _, state = arguments(130)
    k = np.broadcast_to(k[:, :1], k.shape)
    args = (q, k, v, np.zeros((B, 130, N), np.float32), np.ones((B, 130, N), np.float32), state)
    for got, want in zip(gated_delta(*args), recurrence(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 70])
def test_zero_gate_and_rate_leave_the_state_alone(length):
    q, k, v, g, beta, state = arguments(length)
    _, after = gated_delta(q, k, v, 0 * g, 0 * beta, state)
    np.testing.assert_array_equal(after, state)


def test_step_by_step_is_one_call():
    q, k, v, g, beta, state = arguments(20)
    whole, last = gated_delta(q, k, v, g, beta, state)
    parts = []
    for t in range(20):
        now = (x[:, t : t + 1] for x in (q, k, v, g, beta))
        o, state = gated_delta(*now, state)
        parts.append(o)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def mixer():
    return ir.init_weights(GatedDelta(12, heads=N, key_heads=K, head_dim=HV, key_dim=HK))


def test_mixer_is_its_equations(mixer):
    """One token from nothing: the convolution is its last tap, the state is k u."""
    x = np.random.default_rng(3).standard_normal((1, 12)).astype(np.float32)
    y, _ = mixer(jnp.asarray(x), Ragged.dense(1, 1), None)
    qkv, z = np.split(x @ mixer.qkvz.weight.get_value(), [2 * K * HK + N * HV], axis=-1)
    b, _ = np.split(x @ mixer.ba.weight.get_value(), 2, axis=-1)
    qkv = np.asarray(jax.nn.silu(qkv * mixer.conv_weight.get_value()[-1]))[0]
    q, k = (np.repeat(t.reshape(K, HK), N // K, axis=0) for t in np.split(qkv[: 2 * K * HK], 2))
    q, k = (t / np.sqrt((t * t).sum(-1, keepdims=True) + 1e-6) for t in (q, k))
    v = qkv[2 * K * HK :].reshape(N, HV)
    o = jax.nn.sigmoid(b).reshape(N, 1) * v * (q * k).sum(-1, keepdims=True) / HK**0.5
    normed = mixer.norm(jnp.asarray(o)).reshape(1, -1) * jax.nn.silu(z)
    np.testing.assert_allclose(y, normed @ mixer.out.weight.get_value(), rtol=1e-4, atol=1e-5)


def test_padding_may_be_nan(mixer):
    """Rows of 3, 0 and 2 tokens in a flat batch whose padding is NaN: each equals the row alone, the idle one stays."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 12)).astype(np.float32)
    x[5:] = np.nan
    pool = mixer.cache.init(Layout(pages=1, page_size=1, slots=3))
    pool = jax.tree.map(lambda p: p.at[0].set(jnp.nan).at[1].set(7.0), pool)  # row 0 starts anew in a used slot
    rows, positions = np.array([0, 0, 0, 2, 2, 3, 3, 3]), np.array([0, 1, 2, 0, 1, 0, 0, 0])
    starts, counts = jnp.array([0, 3, 3]), jnp.array([3, 0, 2])
    ragged = Ragged(rows=jnp.asarray(rows), starts=starts, counts=counts, positions=jnp.asarray(positions), longest=4)
    y, after = mixer(jnp.asarray(x), ragged, View(pool=pool, slots=jnp.array([0, 1, 2])))
    for row, start, count in ((0, 0, 3), (2, 3, 2)):
        alone, _ = mixer(jnp.asarray(x[start : start + count]), Ragged.dense(1, count), None)
        np.testing.assert_allclose(y[start : start + count], alone, rtol=1e-4, atol=1e-5)
        assert all(np.isfinite(p[row]).all() for p in after.values())
    assert all((p[1] == 7.0).all() for p in after.values())


def test_heads_that_do_not_group():
    with pytest.raises(ConfigError, match="3 value heads do not divide into 2 key heads"):
        GatedDelta(12, heads=3, key_heads=2, head_dim=4, key_dim=4)
