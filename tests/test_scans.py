"""Selective scan and linear attention: chunks equal the step-by-step recurrence, what pads a row leaves no trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import ir
from optx.cache import Layout, Ragged, View
from optx.nn import LinearAttention, Mamba1, RMSNorm
from optx.pallas.linear_attention.reference import linear_attention
from optx.pallas.selective_scan.reference import selective_scan

B, C, S = 2, 6, 4  # rows, channels, states of a channel
N, HK, HV = 3, 4, 5
D = 12


def scan_arguments(rng, length, speed):
    """x, dt, a, b, c, state."""
    x, dt = rng.normal(size=(B, length, C)), speed * rng.exponential(size=(B, length, C))
    b, c = rng.normal(size=(2, B, length, S))
    return x, dt, -rng.uniform(0.1, 3, size=(C, S)), b, c, rng.normal(size=(B, C, S))


def scan_recurrence(x, dt, a, b, c, state):
    out = []
    for t in range(x.shape[1]):
        added = (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        state = np.exp(dt[:, t, :, None] * a) * state + added
        out.append(np.einsum("bcs,bs->bc", state, c[:, t]))
    return np.stack(out, axis=1), state


def attention_arguments(rng, length, speed):
    """q, k, v, log_decay, state."""
    q, k = rng.normal(size=(2, B, length, N, HK))
    v, decay = rng.normal(size=(B, length, N, HV)), -speed * rng.exponential(size=(B, length, N))
    return q, k, v, decay, rng.normal(size=(B, N, HK, HV))


def attention_recurrence(q, k, v, log_decay, state):
    out = []
    for t in range(q.shape[1]):
        state = np.exp(log_decay[:, t])[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append(np.einsum("bnk,bnkv->bnv", q[:, t], state))
    return np.stack(out, axis=1), state


OPS = {  # op: (function, arguments, definition, which arguments have tokens)
    "selective_scan": (jax.jit(selective_scan), scan_arguments, scan_recurrence, (0, 1, 3, 4)),
    "linear_attention": (jax.jit(linear_attention), attention_arguments, attention_recurrence, (0, 1, 2, 3)),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def floats(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def assert_close(got, want):
    for mine, its in zip(got, want, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("speed", [0.01, 1.0, 40.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("op", OPS)
def test_chunks_are_the_recurrence(op, length, speed, rng):
    run, arguments, recurrence, _ = OPS[op]
    args = arguments(rng, length, speed)
    assert_close(run(*floats(args)), recurrence(*args))


@pytest.mark.parametrize("op", OPS)
def test_step_by_step_is_one_call(op, rng):
    run, arguments, _, tokens = OPS[op]
    args = floats(arguments(rng, 9, 1.0))
    whole, last = run(*args)
    *args, state = args
    parts = []
    for t in range(9):
        now = [x[:, t : t + 1] if i in tokens else x for i, x in enumerate(args)]
        y, state = run(*now, state)
        parts.append(y)
    assert_close((jnp.concatenate(parts, axis=1), state), (whole, last))


def test_what_takes_no_time_leaves_the_state_alone(rng):
    x, dt, a, b, c, state = floats(scan_arguments(rng, 40, 1.0))
    np.testing.assert_array_equal(OPS["selective_scan"][0](x, 0 * dt, a, b, c, state)[1], state)
    q, k, v, decay, state = floats(attention_arguments(rng, 70, 1.0))
    np.testing.assert_array_equal(OPS["linear_attention"][0](q, 0 * k, v, 0 * decay, state)[1], state)


MIXERS = {
    "mamba1": lambda: Mamba1(D, inner=16, state_dim=S, rank=3, bias=True, norm=RMSNorm),
    "mamba1_plain": lambda: Mamba1(D, inner=16, state_dim=S, rank=3, conv_bias=False),
    "linear_attention": lambda: LinearAttention(D, heads=N, head_dim=HK, rate=0.7),
}


@pytest.fixture(scope="module", params=MIXERS)
def mixer(request):
    return ir.init_weights(MIXERS[request.param]())


def run(mixer, x, ragged, pool, slots=None):
    """The mixer as one program; pool None: without caches."""

    def call(x, pool):
        return mixer(x, ragged, None if pool is None else View(pool=pool, slots=slots))

    return jax.jit(call)(jnp.asarray(x, jnp.float32), pool)


def test_padding_may_be_nan(mixer, rng):
    """Rows of 3, 0 and 2 tokens in a flat batch whose padding is NaN: each equals the row alone, the idle one stays."""
    x = rng.normal(size=(8, D)).astype(np.float32)
    x[5:] = np.nan
    pool = mixer.cache.init(Layout(pages=1, page_size=1, slots=3))
    pool = jax.tree.map(lambda p: p.at[0].set(jnp.nan).at[1].set(7.0), pool)  # row 0 starts anew in a used slot
    rows, positions = np.array([0, 0, 0, 2, 2, 3, 3, 3]), np.array([0, 1, 2, 0, 1, 0, 0, 0])
    starts, counts = jnp.array([0, 3, 3]), jnp.array([3, 0, 2])
    ragged = Ragged(rows=jnp.asarray(rows), starts=starts, counts=counts, positions=jnp.asarray(positions), longest=4)
    y, after = run(mixer, x, ragged, pool, jnp.array([0, 1, 2]))
    for row, start, count in ((0, 0, 3), (2, 3, 2)):
        alone, _ = run(mixer, x[start : start + count], Ragged.dense(1, count), None)
        np.testing.assert_allclose(y[start : start + count], alone, rtol=1e-4, atol=1e-5)
        assert all(np.isfinite(p[row]).all() for p in after.values())
    assert all((p[1] == 7.0).all() for p in after.values())


def test_decode_goes_on_from_the_state(mixer, rng):
    x = rng.normal(size=(7, D))
    whole, _ = run(mixer, x, Ragged.dense(1, 7), None)
    pool, slots = mixer.cache.init(Layout(pages=1, page_size=1, slots=2)), jnp.array([1])
    parts = []
    for start, count in ((0, 5), (5, 1), (6, 1)):
        ragged = Ragged.dense(1, count)
        ragged = dataclasses.replace(ragged, positions=ragged.positions + start)
        y, pool = run(mixer, x[start : start + count], ragged, pool, slots)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-4, atol=1e-5)


def test_selective_mixer_is_its_equations(rng):
    """One token from nothing: the convolution is its last tap, the state is dt x B."""
    mixer = ir.init_weights(MIXERS["mamba1"]())
    x = rng.normal(size=(1, D)).astype(np.float32)
    y, _ = mixer(jnp.asarray(x), Ragged.dense(1, 1), None)
    value = {path: np.asarray(v.get_value()) for path, v in ir.params(mixer).items()}
    inner, z = np.split(x @ value["in_proj/weight"] + value["in_proj/bias"], 2, axis=-1)
    inner = np.asarray(jax.nn.silu(inner * value["conv_weight"][-1] + value["conv_bias"]))
    dt, b, c = np.split(inner @ value["select/weight"], [3, 3 + S], axis=-1)
    dt, b, c = mixer.dt_norm(jnp.asarray(dt)), mixer.b_norm(jnp.asarray(b)), mixer.c_norm(jnp.asarray(c))
    dt = jax.nn.softplus(dt @ value["dt/weight"] + value["dt_bias"])
    out = (dt * (b * c).sum() + value["skip"]) * inner * jax.nn.silu(z)
    np.testing.assert_allclose(y, out @ value["out/weight"] + value["out/bias"], rtol=1e-4, atol=1e-5)


def test_heads_forget_at_their_own_rates():
    decays = LinearAttention(D, heads=4, head_dim=2, rate=0.5).decays
    np.testing.assert_allclose(decays, -0.5 * np.array([2**-2, 2**-4, 2**-6, 2**-8]), rtol=1e-6)
