"""Format `trellis2`: what is walked is what is read, at errors that two bits a number can have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, tensor
from optx.errors import FormatError
from optx.formats import Int, Trellis
from optx.formats import trellis as module
from optx.formats.base import pack_bits, unpack_bits

TURNED = [
    4.78481,
    -4.75705,
    4.20954,
    -3.05901,
    -4.94058,
    -11.76984,
    -5.66974,
    7.12805,
    4.20668,
    7.99008,
    5.66867,
    -8.59263,
]
LLOYD_MAX = 0.1175  # mean squared error of the best 2-bit scalar code of a standard normal (Max 1960, table I)


def normal(*shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_the_states_are_windows_of_the_stream():
    codes = np.random.default_rng(0).integers(0, 4, (2, 20)).astype(np.uint8)
    found = np.asarray(module.states(unpack_bits(pack_bits(jnp.asarray(codes), 2), 2), 10))
    for row, states in zip(codes, found, strict=True):
        state = 0
        for code, got in zip(row, states, strict=True):
            state = (state << 2 | int(code)) % 1024
            assert got == state


def test_the_code_is_the_papers():
    """1MAD by plain integers, and its moments over all states."""
    for state in (0, 1, 12345, 65535):
        word = (34038481 * state + 76625530) % 2**32
        want = (sum(word.to_bytes(4, "little")) - 510) / 147.800537109375
        assert float(module.code_values(jnp.uint32(state))) == pytest.approx(want, abs=1e-6)
    every = np.asarray(module.code_values(jnp.arange(2**16, dtype=jnp.uint32)))
    assert abs(every.mean()) < 0.01 and abs(every.var() - 1) < 0.01


def test_the_rotation_is_the_one_that_stored_weights_were_turned_by():
    """Signs come of numpy's generator: were its stream another, what is stored would be read as noise."""
    turned = Trellis().rotation(12)(jnp.arange(12.0))
    np.testing.assert_allclose(turned, TURNED, atol=1e-5)
    x = normal(3, 576)
    turn = Trellis().rotation(576)
    np.testing.assert_allclose(turn.back(turn(x)), x, atol=1e-5)


@pytest.mark.parametrize(("memory", "bound"), [(8, 0.092), (10, 0.084)])
def test_the_error_on_normal_numbers(memory, bound):
    x = normal(16, 256)
    _, values = module.walk(x, None, memory)
    error = float(jnp.mean((x - values) ** 2))
    assert 1 / 16 < error < bound < LLOYD_MAX, error  # 1/16: the rate-distortion bound at 2 bits


def test_viterbi_finds_the_least_error():
    """All 4^5 streams of five numbers, each weighted in its own way, from a state that is not 0."""
    target, weight, start = normal(5, seed=3), jnp.asarray([1.0, 0.5, 2.0, 1.0, 0.1]), 37
    path = module._viterbi(target, weight, jnp.uint32(start), 6)
    streams = np.stack(np.meshgrid(*[np.arange(4)] * 5, indexing="ij"), axis=-1).reshape(-1, 5)
    state, states = np.full(len(streams), start), []
    for i in range(5):
        state = (state << 2 | streams[:, i]) % 64
        states.append(state)
    every = np.asarray(module.code_values(jnp.asarray(np.stack(states, axis=-1), jnp.uint32)))
    costs = np.sum(np.asarray(weight) * (np.asarray(target) - every) ** 2, axis=-1)
    found = float(jnp.sum(weight * (target - module.code_values(path)) ** 2))
    assert found == pytest.approx(costs.min(), rel=1e-5)


@pytest.mark.parametrize("d", [32, 96, 100])
def test_what_is_read_is_what_was_walked(d):
    """Blocks that the axis does not fill, rows of very different size, a row of zeros."""
    x = normal(5, d) * jnp.asarray([1e-3, 1.0, 0.02, 0.0, 300.0])[:, None]
    format_ = Trellis(memory=8)
    packed = tensor.quantize(x, format_, axis=-1)
    packed.validate()
    assert packed.data.shape == (5, d // 4) and packed.nbytes == 5 * (d // 4 + 2)
    turn = format_.rotation(d)
    rows = turn(x)
    _, values = module.walk(rows / format_.scale(rows), None, 8)
    want = turn.back(values * packed.scale.astype(jnp.float32))
    np.testing.assert_allclose(packed.dequantize(), want, rtol=1e-5, atol=1e-6)
    error = jnp.linalg.norm(packed.dequantize() - x, axis=-1) / jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-9)
    assert bool(jnp.all(packed.dequantize()[3] == 0)) and float(jnp.max(error)) < 0.5


def test_an_outlier_costs_the_others_nothing():
    """Two bits by scale and rounding lose a row with one large number; rotated, it is a normal row."""
    x = normal(8, 128).at[:, 5].set(20.0)
    rows = {}
    for format_ in (Int(width=2), Trellis(memory=8)):
        back = tensor.quantize(x, format_, axis=-1).dequantize()
        rows[str(format_)] = float(jnp.mean((back - x).at[:, 5].set(0) ** 2))
    assert rows["trellis2_l8"] < 0.5 * rows["int2"], rows


def test_feedback_lessens_the_output_error():
    """Inputs that go together: errors made good by later channels cost the output less than the least error of weights."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((512, 8)) @ rng.standard_normal((8, 128)) + 0.1 * rng.standard_normal((512, 128))
    gram = jnp.asarray(x.T @ x / 512, jnp.float32)
    upper = jnp.linalg.cholesky(jnp.linalg.inv(gram + 1e-3 * jnp.eye(128))).T
    w = normal(16, 128)
    plain, fed = (module.walk(w, u, 8)[1] - w for u in (None, upper))
    costs = [float(jnp.sum((e @ gram) * e)) for e in (plain, fed)]
    assert costs[1] < 0.6 * costs[0], costs


def test_shapes_are_those_of_the_abstract_form():
    shape = jax.ShapeDtypeStruct((3, 64, 32), jnp.float32)
    abstract = tensor.quantize(shape, Trellis(memory=8))
    concrete = tensor.quantize(jnp.zeros(shape.shape, shape.dtype), Trellis(memory=8))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), concrete)
    assert abstract.bits_per_weight == 2 + 16 / 64


def test_names():
    assert str(formats.parse("trellis2_l12")) == "trellis2_l12"
    with pytest.raises(FormatError, match="memory 7; allowed: even numbers of bits from 8 to 16"):
        formats.parse("trellis2_l7")
    with pytest.raises(FormatError, match="axis of 30 is not a multiple of 4"):
        tensor.quantize(jnp.zeros((2, 30)), Trellis(memory=8), axis=-1)
