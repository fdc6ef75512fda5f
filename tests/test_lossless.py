"""Format `lossless`: every bf16 number comes back bit for bit, in a room that is known beforehand, or as NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optx import formats, tensor
from optx.errors import FormatError
from optx.formats import Lossless
from optx.formats.lossless import at_rank, gathered, pack_threes, unpack_threes


def bits(x) -> np.ndarray:
    return np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.uint16))


def from_bits(x) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.uint16), jnp.bfloat16)


def trained(rows, d, seed=0) -> jax.Array:
    """Gaussian rows of different size, as the weights of trained models are."""
    rng = np.random.default_rng(seed)
    size = 0.02 * np.exp(rng.normal(size=(rows, 1)))
    return jnp.asarray(rng.standard_normal((rows, d)) * size, jnp.bfloat16)


@pytest.mark.parametrize("d", [64, 576])
def test_gaussian_rows_of_any_size_come_back_within_the_bar(d):
    x, format_ = trained(256, d), Lossless()
    packed = tensor.quantize(x, format_, axis=-1)
    packed.validate()
    np.testing.assert_array_equal(bits(packed.dequantize()), bits(x))
    assert packed.bits_per_weight == format_.bits(d)
    assert d < 576 or packed.bits_per_weight <= 11.5, packed.bits_per_weight
    assert int(jnp.max(format_.needed(x))) <= format_.room(d)


def test_a_heavy_tail_fits_too():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_t(6, (512, 576)) * 0.01, jnp.bfloat16)
    np.testing.assert_array_equal(bits(tensor.quantize(x, Lossless(), axis=-1).dequantize()), bits(x))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=32, max_size=32))
def test_any_bits_come_back_where_there_is_room(values):
    """Zeros of both signs, subnormals, infinities and NaN with their payloads among them."""
    x = from_bits(np.array(values, np.uint16)[None])
    np.testing.assert_array_equal(bits(tensor.quantize(x, Lossless(spare=150), axis=-1).dequantize()), bits(x))


SPECIAL = {
    "zeros": [0x0000, 0x8000] * 32,
    "subnormals": [0x0001, 0x807F, 0x0040, 0x8001] * 16,
    "infinities": [0x7F80, 0xFF80] * 32,
    "nan payloads": [0x7FC0, 0xFFC1, 0x7F81, 0xFFFF] * 16,
    "largest": [0x7F7F, 0xFF7F] * 32,
    "ones and zeros": [0x3F80, 0x0000, 0xBF80, 0x8000] * 16,
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers_need_no_spare_room(name):
    x = from_bits(np.array(SPECIAL[name], np.uint16)[None])
    np.testing.assert_array_equal(bits(tensor.quantize(x, Lossless(), axis=-1).dequantize()), bits(x))


def test_a_row_that_does_not_fit_is_nan_and_leaves_the_others_alone():
    rng = np.random.default_rng(0)
    x = bits(trained(4, 256)).copy()
    x[2] = rng.integers(0, 0x7F80, 256)  # exponents all over the place
    format_ = Lossless()
    out = tensor.quantize(from_bits(x), format_, axis=-1).dequantize()
    need = np.asarray(format_.needed(from_bits(x)))[:, 0]
    assert need[2] > format_.room(256) and need[[0, 1, 3]].max() <= format_.room(256)
    assert bool(jnp.all(jnp.isnan(out[2])))
    np.testing.assert_array_equal(bits(out)[[0, 1, 3]], x[[0, 1, 3]])


def test_the_room_is_exact():
    """Eight listed numbers cost three bytes, one listed again a byte more: the last row that fits, and the next."""
    d, format_ = 64, Lossless()
    fits = max(n for n in range(d) if 3 * -(-n // 8) + n <= format_.room(d))
    for count, whole in ((fits, True), (fits + 1, False)):
        x = np.full((1, d), 0x3F80, np.uint16)
        x[0, :count] = 0x1000
        out = bits(tensor.quantize(from_bits(x), format_, axis=-1).dequantize())
        assert np.array_equal(out, x) == whole


def test_shapes_are_those_of_the_abstract_form():
    shape = jax.ShapeDtypeStruct((3, 64, 32), jnp.bfloat16)
    abstract = tensor.quantize(shape, Lossless(spare=2))
    concrete = tensor.quantize(jnp.zeros(shape.shape, shape.dtype), Lossless(spare=2))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), concrete)


def test_a_product_and_a_lookup_read_the_same_bits():
    w = trained(48, 64).T
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 64)), jnp.bfloat16)
    packed = tensor.quantize(trained(48, 64), Lossless(), axis=-1)
    ids = jnp.asarray([3, 0, 47])
    np.testing.assert_array_equal(bits(tensor.take(packed, ids)), bits(trained(48, 64)[ids]))
    product = tensor.matmul(x, tensor.quantize(w, Lossless(), axis=-2))
    np.testing.assert_array_equal(bits(product), bits(tensor.matmul(x, w)))


@given(st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_lists_and_three_bit_codes_round_trip(groups, seed):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(0, 8, (2, 8 * groups)), jnp.uint8)
    np.testing.assert_array_equal(unpack_threes(pack_threes(codes)), codes)
    mask = jnp.asarray(rng.random(codes.shape) < 0.4)
    back = at_rank(gathered(codes, mask, codes.shape[-1]), mask)
    np.testing.assert_array_equal(np.asarray(back)[np.asarray(mask)], np.asarray(codes)[np.asarray(mask)])


def test_names():
    for text in ("lossless", "lossless_s7"):
        assert str(formats.parse(text)) == text
    with pytest.raises(FormatError, match="spare 151; allowed: 0 to 150"):
        formats.parse("lossless_s151")
    with pytest.raises(FormatError, match="did you mean 'lossless'"):
        formats.parse("lossles")
    with pytest.raises(FormatError, match="axis of 30 is not a multiple of 4"):
        tensor.quantize(jnp.zeros((2, 30), jnp.bfloat16), Lossless(), axis=-1)
